"""Small decoders of every architectural kind, and the transformers models that they must equal."""

from typing import Any

import pytest
import torch

from modelmill.components.llama.config import LlamaConfig

BASE: dict[str, Any] = {
    "vocab_size": 211,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_layers": 2,
    "num_heads": 4,
    "max_sequence_length": 64,
}
KINDS: dict[str, dict[str, Any]] = {
    "mha_untied": {},
    "gqa_untied": {"num_kv_heads": 2},
    "mqa_tied": {"num_kv_heads": 1, "tie_embeddings": True},
    "gqa_llama3_rope": {
        "num_kv_heads": 2,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "factor": 8.0,
            "low_frequency_factor": 1.0,
            "high_frequency_factor": 4.0,
            "original_max_position": 32,
        },
    },
}


def make_config(**changes: Any) -> LlamaConfig:
    """The base configuration with some fields changed."""
    return LlamaConfig.model_validate({**BASE, **changes})


@pytest.fixture(params=list(KINDS))
def config(request: pytest.FixtureRequest) -> LlamaConfig:
    """One configuration of each kind."""
    return make_config(**KINDS[request.param])


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
