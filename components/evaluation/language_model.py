"""Any causal language model of transformers, loaded to be judged. Importing this costs the import of torch."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from modelmill.components.core.errors import UserError
from modelmill.components.evaluation.config import ModelUseConfig

_LOCAL: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}


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
    transformers.logging.disable_progress_bar()
    try:
        settings = AutoConfig.from_pretrained(str(folder), **_LOCAL)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            str(folder),
            config=settings,
            dtype=_dtype(getattr(settings, "dtype", None) or torch.float32, config.precision, device),
            attn_implementation="sdpa",
            use_safetensors=True,
            output_loading_info=True,
            **_LOCAL,
        )
    except Exception as error:  # transformers raises whatever its parts do
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"model: {folder} cannot be loaded ({reason}); use another model") from None
    model, report = loaded
    if missing := sorted(report["missing_keys"]):
        raise UserError(
            f"model: {folder} lacks tensor {missing[0]} ({len(missing)} in all), which would be random; copy it again"
        )
    with memory_explained():
        model = model.to(device).eval()
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
    return LanguageModel(model, positions, {"logits_to_keep": 1} if keeps else {})


def _dtype(stored: torch.dtype, precision: str, device: str) -> torch.dtype:
    if stored == torch.float64 or (precision == "auto" and device != "cpu"):
        return stored
    return torch.bfloat16 if precision == "bf16" else torch.float32


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
