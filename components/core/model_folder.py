"""The exported model of a manifest, checked before anything reads it."""

from __future__ import annotations

from pathlib import Path

from modelmill.components.core.errors import UserError
from modelmill.components.core.manifest import Manifest
from modelmill.components.core.weights import weights_digest


def model_folder(model: Manifest, parameter: str = "model") -> Path:
    """The folder `model/` of an artifact on this machine, each of its files verified.

    Raises:
        UserError: there is none, or a file is missing or not what was written.
    """
    if not any(entry.path.startswith("model/") for entry in model.files):
        raise UserError(f"{parameter}: {model.uri} holds no model/ folder; give the output of a step with a model")
    return model.folder("model").absolute()


def digest_of(model: Manifest, parameter: str = "model") -> str:
    """Digest of a model's weights, see `weights_digest`; computed where its step did not state it."""
    return str(model.metadata.get("weights_digest") or weights_digest(model_folder(model, parameter)))


def proven_folder(model: Manifest, parameter: str = "model") -> tuple[Path, str]:
    """The folder and the digest of its weights, computed anew: for what is worthless on other weights.

    Raises:
        UserError: as `model_folder`, or the weights are not those that the step wrote.
    """
    folder = model_folder(model, parameter)
    found = weights_digest(folder)
    told = str(model.metadata.get("weights_digest") or found)
    if told != found:
        raise UserError(
            f"{parameter}: the weights in {folder} have the digest {found[:16]}, the step that made them wrote"
            f" {told[:16]}; delete its folder and run again"
        )
    return folder, found
