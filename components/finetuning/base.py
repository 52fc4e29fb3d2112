"""The model a fine-tuning starts from: found in a folder, a pipeline, the registry or on the Hub. Torch-free.

Whatever its place, it becomes a local folder of safetensors with a digest of its weights. An adapter means nothing
without exactly those weights.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelmill.components.core.errors import UserError
from modelmill.components.core.home import Home
from modelmill.components.core.manifest import Manifest
from modelmill.components.core.mlflow_store import StoreUnavailable, connect, one_line
from modelmill.components.core.uri import local_path
from modelmill.components.core.weights import weights_digest
from modelmill.components.data.files import folder_state

_REGISTRY, _HUB = "models:/", "hf:"
# Weights as safetensors only: a pickle runs code when it is read.
_FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt"]


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


def find_base(reference: str | None, model: Manifest | None, scratch: Path, parameter: str) -> Base:
    """Bring the base to this machine.

    Args:
        reference: a local folder, `models:/<name>@<alias>`, `hf:<id>` or `hf:<id>@<revision>`.
        model: or the manifest of a step that exported `model/`.
        scratch: folder for what is downloaded.
        parameter: of the recipe, for messages.

    Raises:
        UserError: both or neither are given, it cannot be had, or it holds no safetensors.
    """
    if (reference is None) == (model is None):
        what = "both a name and an earlier step's model" if model is not None else "no base"
        raise UserError(f"{parameter}: {what} given; use exactly one: a folder, models:/name@alias, hf:id, or a step")
    if model is not None:
        folder = _exported(model)
        digest = weights_digest(folder)
        told = str(model.metadata.get("weights_digest", digest))
        if told != digest:
            raise UserError(
                f"{parameter}: the weights in {folder} have the digest {digest[:16]}, the step that made them wrote"
                f" {told[:16]}; delete its folder and run again"
            )
        return Base(folder, digest, f"sha256:{digest[:16]}")
    assert reference is not None
    if reference.startswith(_REGISTRY):
        folder = _from_registry(reference, scratch, parameter)
    elif reference.startswith(_HUB):
        folder = _from_hub(reference, parameter)
    else:
        folder = local_path(reference, parameter=parameter).absolute()
        if not folder.is_dir():
            raise UserError(
                f"{parameter}: {reference!r} is no folder; give one, models:/name@alias, or hf:id for one of the Hub"
            )
    _check_folder(folder, reference, parameter)
    return Base(folder, weights_digest(folder), reference)


def base_state(reference: str | None, parameter: str) -> str:
    """What the name stands for now, so that a step is not reused when that changes.

    Raises:
        UserError: it stands for nothing.
    """
    if reference is None:
        return ""
    if reference.startswith(_REGISTRY):
        return str(_registered(reference, parameter).version)
    if reference.startswith(_HUB):
        from huggingface_hub import HfApi

        name, revision = _hub_name(reference)
        if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
            return f"{revision or 'main'} as cached"
        try:
            return str(HfApi().model_info(name, revision=revision, timeout=20).sha)
        except Exception as error:  # the HTTP stack below raises its own families of errors
            raise _unreachable(reference, parameter, error) from None
    folder = local_path(reference, parameter=parameter)
    if not folder.is_dir():
        raise UserError(f"{parameter}: {reference!r} is no folder; give one, models:/name@alias or hf:id")
    return folder_state(folder)


def read_model_config(base: Base, parameter: str) -> dict[str, Any]:
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


def _exported(model: Manifest) -> Path:
    names = [entry.path for entry in model.files if entry.path.startswith("model/")]
    if not names:
        raise UserError(f"{model.kind}: {model.uri} holds no model/ folder; give the output of a training step")
    for name in names:
        model.path(name)
    return local_path(model.uri).absolute() / "model"


def _check_folder(folder: Path, reference: str, parameter: str) -> None:
    if not (folder / "config.json").is_file():
        raise UserError(f"{parameter}: {reference} has no config.json; use the folder of a Hugging Face model")
    if not any(folder.glob("*.safetensors")):
        held = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
        why = f"{held[0]} is a pickle, and loading one can run code" if held else "it holds no weights"
        raise UserError(f"{parameter}: {reference} has no safetensors ({why}); convert it with save_pretrained")


def _registered(reference: str, parameter: str) -> Any:
    """MLflow's record of the version that an alias or a number names."""
    name, at, alias = reference.removeprefix(_REGISTRY).partition("@")
    number = ""
    if not at:
        name, _, number = name.partition("/")
    if not name or not (alias or number.isdigit()):
        raise UserError(f"{parameter}: {reference!r} names no version; write models:/name@alias or models:/name/3")
    try:
        client = connect(Home.current().tracking_uri)
        return client.get_model_version_by_alias(name, alias) if alias else client.get_model_version(name, number)
    except StoreUnavailable as error:
        raise UserError(
            f"{parameter}: the registry of {reference} cannot be used ({error}); start it or correct"
            " MLFLOW_TRACKING_URI"
        ) from None
    except Exception as error:
        if type(error).__module__.startswith("mlflow"):
            raise UserError(
                f"{parameter}: {reference} is not in the registry ({one_line(error)}); register a model under that"
                " name first, or name another"
            ) from None
        raise


def _from_registry(reference: str, scratch: Path, parameter: str) -> Path:
    version = _registered(reference, parameter)
    from mlflow.artifacts import download_artifacts

    target = scratch / "base" / f"version-{version.version}"
    target.mkdir(parents=True, exist_ok=True)
    uri = Home.current().tracking_uri
    try:
        # Where the files lie, asked of our own client: of a models:/ URI MLflow would ask its default store.
        place = connect(uri).get_model_version_download_uri(version.name, version.version)
        found = Path(download_artifacts(place, dst_path=str(target), tracking_uri=uri))
    except Exception as error:  # whatever the artifact store below raises
        raise UserError(
            f"{parameter}: the files of {reference} cannot be fetched ({one_line(error)}); check the artifact store"
        ) from None
    for folder in (found / "data" / "model", found / "model", found):
        if (folder / "config.json").is_file():
            return folder.absolute()
    raise UserError(f"{parameter}: {reference} holds no Hugging Face model; name one that register_model entered")


def _hub_name(reference: str) -> tuple[str, str | None]:
    name, _, revision = reference.removeprefix(_HUB).partition("@")
    return name, revision or None


def _from_hub(reference: str, parameter: str) -> Path:
    from huggingface_hub import snapshot_download

    name, revision = _hub_name(reference)
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=_FILES)).absolute()
    except Exception as error:
        raise _unreachable(reference, parameter, error) from None


def _unreachable(reference: str, parameter: str, error: Exception) -> UserError:
    remedy = "check name, network and HF_TOKEN, or give a local folder"
    return UserError(f"{parameter}: {reference} cannot be had from the Hub ({type(error).__name__}); {remedy}")
