"""Names of what fine-tuning writes, and the files it takes over from others."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

ADAPTER_FOLDER, MODEL_FOLDER = "adapter", "model"


def copy_tokenizer(base: Path, folder: Path) -> None:
    """Copy the tokenizer's files of a Hugging Face folder into another."""
    from modelmill.components.llama.huggingface import TOKENIZER_FILES

    for name in TOKENIZER_FILES:
        if (base / name).is_file():
            shutil.copyfile(base / name, folder / name)


def take_file(source: Path, target: Path) -> None:
    """Link a finished file into an output, or copy it where the file system has no links."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
