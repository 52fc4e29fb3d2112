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
from modelmill.components.core.uri import local_path
from modelmill.components.core.weights import weights_digest


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
    names = [entry.path for entry in model.files if entry.path.startswith("model/")]
    if not names:
        raise UserError(
            f"{parameter}: {model.uri} holds no model/ folder; give the output of a step that makes a model"
        )
    for name in names:
        model.path(name)
    folder = local_path(model.uri).absolute() / "model"
    digest = weights_digest(folder)
    told = str(model.metadata.get("weights_digest", digest))
    if told != digest:
        raise UserError(
            f"{parameter}: the weights in {folder} have the digest {digest[:16]}, the step that made them wrote"
            f" {told[:16]}; delete its folder and run again"
        )
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
