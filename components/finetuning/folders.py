"""Names of what fine-tuning writes, and the files it takes over from the base."""

from __future__ import annotations

import shutil
from pathlib import Path

ADAPTER_FOLDER, MODEL_FOLDER = "adapter", "model"


def copy_tokenizer(base: Path, folder: Path) -> None:
    """Copy the tokenizer's files of a Hugging Face folder into another."""
    from modelmill.components.llama.huggingface import TOKENIZER_FILES

    for name in TOKENIZER_FILES:
        if (base / name).is_file():
            shutil.copyfile(base / name, folder / name)
