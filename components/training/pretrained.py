"""Causal language models of transformers, loaded safely: from safetensors, without code of theirs, complete."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from modelmill.components.core.errors import UserError

_LOCAL: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}


def load_causal_lm(
    folder: Path | str, *, dtype: torch.dtype | None, parameter: str, attention: str = "sdpa", **options: Any
) -> PreTrainedModel:
    """Load a causal language model on the CPU from safetensors; code that comes with a model is never run.

    Args:
        folder: a Hugging Face folder.
        dtype: of the parameters; None keeps the checkpoint's. A checkpoint in fp64 is never narrowed.
        parameter: what a user calls the model, for messages.
        attention: `sdpa` or `eager`, as transformers calls them.
        options: of `from_pretrained`.

    Raises:
        UserError: the folder holds no causal language model that transformers implements, or is damaged.
    """
    transformers.logging.disable_progress_bar()
    try:
        config = _read_config(folder)
        stored = _dtype_of(config)
        wanted = stored if dtype is None or stored == torch.float64 else dtype
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            str(folder),
            config=config,
            dtype=wanted,
            attn_implementation=attention,
            use_safetensors=True,
            output_loading_info=True,
            **_LOCAL,
            **options,
        )
    except Exception as error:  # transformers raises whatever its parts do
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"{parameter}: {folder} cannot be loaded ({reason}); use another model") from None
    model, report = loaded
    if missing := sorted(report["missing_keys"]):
        raise UserError(
            f"{parameter}: {folder} lacks tensor {missing[0]} ({len(missing)} in all), which would be random;"
            " copy it again"
        )
    return model


def stored_dtype(folder: Path | str) -> torch.dtype:
    """The precision that a model's `config.json` names for its files."""
    return _dtype_of(_read_config(folder))


def _read_config(folder: Path | str) -> PretrainedConfig:
    return AutoConfig.from_pretrained(str(folder), **_LOCAL)


def _dtype_of(config: PretrainedConfig) -> torch.dtype:
    return getattr(config, "dtype", None) or torch.float32
