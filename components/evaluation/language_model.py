"""Any causal language model of transformers, loaded to be judged. Importing this costs the import of torch."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from modelmill.components.core.errors import UserError
from modelmill.components.evaluation.config import ModelUseConfig
from modelmill.components.training.pretrained import load_causal_lm

_DTYPES = {"auto": torch.float32, "fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class LanguageModel:
    """A loaded model.

    Attributes:
        model: in evaluation mode, on its device.
        positions: tokens it can see at once; None where it states no limit.
        last_logits: arguments with which its forward pass computes the logits of the last token only.
    """

    model: PreTrainedModel
    positions: int | None
    last_logits: dict[str, int]

    @property
    def device(self) -> torch.device:
        return self.model.device

    def check_vocabulary(self, size: int) -> None:
        """Refuse a model that has fewer entries than its tokenizer.

        Raises:
            UserError: it has.
        """
        rows = self.model.get_output_embeddings().weight.shape[0]
        if rows < size:
            raise UserError(
                f"model: its vocabulary has {rows} entries and its tokenizer {size}; resize the model's embeddings, or"
                " use the tokenizer it was trained with"
            )


def load_language_model(folder: Path, config: ModelUseConfig) -> LanguageModel:
    """Load a model from safetensors; code that comes with a model is never run.

    Args:
        folder: a Hugging Face folder.
        config: where and in which precision it runs. A checkpoint in fp64 is never narrowed.

    Raises:
        UserError: there is no GPU, or the folder holds no causal language model that transformers implements, or is
            damaged.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("device: cuda is not in this machine; use auto or cpu")
    device = "cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu"
    narrow = None if config.precision == "auto" and device != "cpu" else _DTYPES[config.precision]
    model: Any = load_causal_lm(folder, dtype=narrow, parameter="model")
    with memory_explained():
        model = model.to(device).eval()
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
    return LanguageModel(model, positions, {"logits_to_keep": 1} if keeps else {})


@contextmanager
def memory_explained() -> Iterator[None]:
    """Say what to lower where a GPU's memory does not suffice."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        reason = next(iter(str(error).splitlines()))
        raise UserError(
            f"batch_tokens: the GPU's memory does not suffice ({reason}); lower it, or use precision bf16"
        ) from None
