"""A small base, packed conversations and configurations for the fine-tuning tests."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from modelmill.components.core.manifest import Manifest
from modelmill.components.core.weights import weights_digest
from modelmill.components.data.instruction_packing import TokenStore, write_rows
from modelmill.components.finetuning.config import FinetuneConfig
from modelmill.components.training.launch import LAUNCHED_VARIABLE
from tests.components.training.samples import TRAINING, make_tokenizer

VOCAB, LENGTH = 97, 24
BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
ADAPTER: dict[str, Any] = {"rank": 4, "alpha": 8, "learning_rate_ratio": 4.0}
MEDIUM: dict[str, Any] = {"steps": 6, "micro_batch_size": 2, "clip_norm": 0.5, "parallel": {"processes_per_node": 1}}


def make_base(folder: Path, model_class: type[PreTrainedModel] = LlamaForCausalLM, **changes: Any) -> Path:
    """A folder with random weights and a tokenizer."""
    torch.manual_seed(3)
    config = model_class.config_class(**{**BASE, **changes}) if model_class is not LlamaForCausalLM else None
    model = model_class(config or LlamaConfig(**{**BASE, **changes}))
    make_tokenizer(folder)
    model.save_pretrained(str(folder))
    return folder


def make_instructions(folder: Path, *, conversations: int = 90, longest: int = LENGTH + 1) -> Manifest:
    """Packed conversations: a prompt of random tokens, and the answer counts on from its last one."""
    folder.mkdir(parents=True)
    scratch = folder.parent / f"{folder.name}-scratch"
    scratch.mkdir()
    generator = np.random.default_rng(7)
    counts: dict[str, int] = {"vocab_size": VOCAB, "sequence_length": LENGTH}
    for split, number in (("train", conversations), ("validation", 15), ("test", 6)):
        store = TokenStore(scratch, split, np.dtype("<u2"))
        for _ in range(number):
            prompt = generator.integers(1, VOCAB, generator.integers(2, 7))
            answer = (prompt[-1] + np.arange(1, generator.integers(2, longest - 8))) % VOCAB
            tokens = np.concatenate([prompt, answer])
            store.append(tokens, np.arange(len(tokens)) >= len(prompt))
        packed = write_rows(store, folder / split, LENGTH + 1, 0, 0)
        np.save(folder / f"{split}.places.npy", packed.places)
        np.save(folder / f"{split}.targets.npy", packed.targets)
        (folder / f"{split}.jsonl").write_text("".join(json.dumps({"id": str(n)}) + "\n" for n in range(number)))
        counts |= {f"{split}_conversations": number, f"{split}_rows": packed.rows}
        counts |= {f"{split}_tokens": int(packed.places[:, 2].sum()), f"{split}_targets": int(packed.targets.sum())}
    return Manifest.describe(folder, kind="instructions", counts=counts, metadata={"template": {"kind": "test"}})


def model_manifest(folder: Path) -> Manifest:
    """A model's folder as the artifact of the step that made it, made once."""
    artifact = folder.parent / f"{folder.name}-artifact"
    if not artifact.exists():
        shutil.copytree(folder, artifact / "model")
    metadata = {"weights_digest": weights_digest(artifact / "model")}
    return Manifest.describe(artifact, kind="model", metadata=metadata)


def finetune_config(**changes: Any) -> FinetuneConfig:
    """A section; what is no field of it changes `training`."""
    own = {name: changes.pop(name) for name in ("method", "adapter", "quantization") if name in changes}
    adapter = own.pop("adapter", {} if own.get("method") == "full" else ADAPTER)
    training = {**TRAINING, **MEDIUM, **changes}
    return FinetuneConfig.model_validate({"adapter": adapter, "training": training, **own})


def job_spec(config: FinetuneConfig, base: Path, instructions: Manifest, output: Path) -> dict[str, Any]:
    """What the step gives to its ranks."""
    os.environ.setdefault(LAUNCHED_VARIABLE, repr(time.time()))
    output.mkdir(parents=True, exist_ok=True)
    return {
        "base": {"folder": str(base), "digest": weights_digest(base), "name": "base"},
        "method": config.method,
        "adapter": config.adapter.model_dump(mode="json"),
        "quantization": config.quantization.model_dump(mode="json"),
        "instructions": instructions.model_dump(mode="json"),
        "output": str(output),
    }
