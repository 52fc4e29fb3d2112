"""The folder of a model's manifest. Torch-free."""

from __future__ import annotations

from pathlib import Path

from modelmill.components.core.errors import UserError
from modelmill.components.core.manifest import Manifest
from modelmill.components.core.uri import local_path
from modelmill.components.core.weights import weights_digest


def model_folder(model: Manifest) -> Path:
    """The exported model's folder, each of its files verified.

    Raises:
        UserError: there is none, or a file is missing or not what was written.
    """
    names = [entry.path for entry in model.files if entry.path.startswith("model/")]
    if not names:
        raise UserError(f"model: {model.uri} holds no model/ folder; give the output of a training step")
    for name in names:
        model.path(name)
    return local_path(model.uri) / "model"


def digest_of(model: Manifest) -> str:
    """Digest of a model's weights, see `weights_digest`; computed where its step did not state it."""
    return str(model.metadata.get("weights_digest") or weights_digest(model_folder(model)))
