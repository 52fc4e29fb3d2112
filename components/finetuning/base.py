"""The model a fine-tuning starts from, as an earlier step left it. Torch-free.

An adapter means nothing without exactly those weights, so their digest is checked here and kept with what is made.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelmill.components.core.errors import UserError
from modelmill.components.core.manifest import Manifest
from modelmill.components.core.model_folder import proven_folder


@dataclass(frozen=True)
class Base:
    """A model in a local folder.

    Attributes:
        folder: `config.json`, safetensors and tokenizer files.
        digest: of the weights, see `weights_digest`.
        name: how the recipe calls it; of a pipeline's own model, its digest.
    """

    folder: Path
    digest: str
    name: str


def open_base(model: Manifest, parameter: str = "base") -> Base:
    """Check an artifact with `model/` and say where it lies.

    Raises:
        UserError: it holds no model, or its weights are not those its step wrote.
    """
    folder, digest = proven_folder(model, parameter)
    return Base(folder, digest, str(model.metadata.get("reference") or f"sha256:{digest[:16]}"))


def read_model_config(base: Base, parameter: str = "base") -> dict[str, Any]:
    """The base's `config.json`.

    Raises:
        UserError: it is missing or no JSON object, or describes a quantised model.
    """
    try:
        config = json.loads((base.folder / "config.json").read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{parameter}: {base.folder} has no readable config.json ({error}); copy it again") from None
    if not isinstance(config, dict):
        raise UserError(f"{parameter}: config.json in {base.folder} is no JSON object; copy it again")
    if config.get("quantization_config"):
        raise UserError(f"{parameter}: {base.name} holds quantised weights; use the model they were made from")
    return config
