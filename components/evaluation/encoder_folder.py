"""Where an encoder for BERTScore lies. Cheap: nothing is loaded, so that a plan can ask."""

from __future__ import annotations

from pathlib import Path

from modelmill.components.core.errors import UserError
from modelmill.components.core.uri import local_path

_PARAMETER = "bertscore.encoder"


def encoder_folder(path: str) -> Path:
    """The folder, with the files an encoder needs.

    Raises:
        UserError: it does not exist, or has no config or no safetensors.
    """
    folder = local_path(path, parameter=_PARAMETER)
    if not folder.is_dir():
        raise UserError(
            f"{_PARAMETER}: {path} is not a folder; give one with config.json, safetensors and a tokenizer"
        )
    if not (folder / "config.json").is_file():
        raise UserError(f"{_PARAMETER}: {path} has no config.json; give the folder of a transformers encoder")
    if not any(folder.glob("*.safetensors")):
        raise UserError(
            f"{_PARAMETER}: {path} has no weights in safetensors; save it again with save_pretrained"
            " (pickled weights are not read, unpickling runs code)"
        )
    return folder
