"""Where a model comes from: a folder, an installed package, the MLflow registry, S3 or the Hub. Torch-free.

Whatever its place, it becomes a local folder of safetensors. Files that are pickles are never taken: reading one can
run code.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Collection
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

from modelmill.components.core import events, s3
from modelmill.components.core.errors import UserError
from modelmill.components.core.home import Home
from modelmill.components.core.mlflow_store import StoreUnavailable, connect, one_line, sqlite_path
from modelmill.components.core.uri import local_path, split_s3
from modelmill.components.data.files import folder_state
from modelmill.components.data.record_ids import RECORDS_FILE

_REGISTRY, _HUB, _PACKAGE, _S3 = "models:/", "hf:", "package:", "s3://"
# Weights, configuration and tokenizer, also of the modules in subfolders that sentence-transformers writes.
MODEL_FILES = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt", "*/config.json")
# MLflow answers so for a model, and for an alias, that does not exist.
_ABSENT = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")
_FORMS = "a folder, s3://bucket/prefix, models:/name@alias, hf:id@revision, or package:name/folder"


class NoSuchVersion(UserError):
    """The registry works and has no version under that name."""


@dataclass(frozen=True)
class FoundModel:
    """A model in a local folder.

    Attributes:
        folder: `config.json`, safetensors and tokenizer files.
        version: of the registry, revision of the Hub, else empty.
        records: file of the registry that lists what the model was trained on, where it has one.
    """

    folder: Path
    version: str = ""
    records: Path | None = None


def find_model(reference: str, scratch: Path, parameter: str) -> FoundModel:
    """Bring a model to this machine.

    Args:
        reference: a local folder, `s3://<bucket>/<prefix>`, `models:/<name>@<alias>`, `models:/<name>/<version>`,
            `hf:<id>@<revision>` or `package:<import name>/<folder>`.
        scratch: folder for what is downloaded.
        parameter: of the recipe, for messages.

    Raises:
        NoSuchVersion: the registry has no such version.
        UserError: it cannot be had, or it holds no safetensors.
    """
    if reference.startswith(_REGISTRY):
        found = _from_registry(reference, scratch, parameter)
    elif reference.startswith(_HUB):
        found = _from_hub(reference, parameter)
    elif reference.startswith(_S3):
        found = _from_s3(reference, scratch, parameter)
    else:
        found = FoundModel(_local(reference, parameter))
    _check_names([path.name for path in found.folder.iterdir()], reference, parameter)
    return found


def model_state(reference: str, parameter: str) -> str:
    """What a reference stands for now, so that a step is not reused when that changes.

    Raises:
        NoSuchVersion: the registry has no such version.
        UserError: it stands for nothing.
    """
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
    if reference.startswith(_S3):
        return s3.fingerprint(_model_objects(reference, parameter).values())
    return folder_state(_local(reference, parameter))


def _local(reference: str, parameter: str) -> Path:
    if reference.startswith(_PACKAGE):
        return _packaged(reference, parameter)
    folder = local_path(reference, parameter=parameter).absolute()
    if not folder.is_dir():
        raise UserError(f"{parameter}: {reference!r} is no folder; give {_FORMS}")
    return folder


def _packaged(reference: str, parameter: str) -> Path:
    """Folder inside an installed package, which is found without importing it."""
    package, _, inside = reference.removeprefix(_PACKAGE).partition("/")
    parts = PurePosixPath(inside).parts
    if not package.isidentifier() or ".." in parts or PurePosixPath(inside).is_absolute():
        raise UserError(f"{parameter}: {reference!r} names no folder of a package; write package:name/folder")
    found = importlib.util.find_spec(package)
    for place in (found and found.submodule_search_locations) or ():
        if (folder := Path(place).joinpath(*parts)).is_dir():
            return folder
    raise UserError(
        f"{parameter}: {reference!r} is not installed; install the package that holds it, or give a folder"
    )


def _check_names(names: Collection[str], reference: str, parameter: str) -> None:
    """Refuse what is no Hugging Face model, or only one of pickles, by the names in its folder."""
    if "config.json" not in names:
        raise UserError(f"{parameter}: {reference} has no config.json; use the folder of a Hugging Face model")
    if not any(name.endswith(".safetensors") for name in names):
        held = sorted(name for name in names if name.endswith((".bin", ".pt", ".pth")))
        why = f"{held[0]} is a pickle, and loading one can run code" if held else "it holds no weights"
        raise UserError(f"{parameter}: {reference} has no safetensors ({why}); convert it with save_pretrained")


def _model_objects(reference: str, parameter: str) -> dict[str, s3.RemoteObject]:
    """A model's files below a prefix, by their path there; the store is AWS, or what AWS's own variables name."""
    _, prefix = split_s3(reference, parameter=parameter)
    listed = s3.list_objects(reference, None, parameter)
    base = f"{prefix.rstrip('/')}/" if prefix else ""
    found = {entry.key.removeprefix(base): entry for entry in listed}
    if not found:
        raise UserError(f"{parameter}: {reference} names no object; check the prefix")
    _check_names(found, reference, parameter)
    return {path: entry for path, entry in found.items() if _is_model_file(path)}


def _is_model_file(path: str) -> bool:
    """Whether `MODEL_FILES` names the path of an object, which may hold anything S3 allows."""
    parts = path.split("/")
    if any(part in ("", ".", "..") for part in parts):
        return False
    wanted = (pattern.split("/") for pattern in MODEL_FILES)
    return any(len(parts) == len(names) and all(map(fnmatchcase, parts, names)) for names in wanted)


def _from_s3(reference: str, scratch: Path, parameter: str) -> FoundModel:
    objects = _model_objects(reference, parameter)
    bucket, _ = split_s3(reference, parameter=parameter)
    folder, client = scratch / "download" / "s3", s3.s3_client(None, parameter)
    for path, entry in objects.items():
        events.progress(f"fetching {path}")
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        with s3.explained(f"s3://{bucket}/{entry.key}", None, parameter):
            s3.download(client, bucket, entry.key, folder / path)
    if _model_objects(reference, parameter) != objects:
        raise UserError(f"{parameter}: {reference} changed while it was read; run again")
    return FoundModel(folder.absolute())


def _registered(reference: str, parameter: str) -> Any:
    """MLflow's record of the version that an alias or a number names."""
    name, at, alias = reference.removeprefix(_REGISTRY).partition("@")
    number = ""
    if not at:
        name, _, number = name.partition("/")
    if not name or not (alias or number.isdigit()):
        raise UserError(f"{parameter}: {reference!r} names no version; write models:/name@alias or models:/name/3")
    uri = os.environ.get("MLFLOW_REGISTRY_URI") or Home.current().tracking_uri
    embedded = sqlite_path(uri)
    if embedded is not None and not embedded.exists():  # asking would make it
        raise NoSuchVersion(
            f"{parameter}: {reference} is not in the registry, which is empty; register a model under that name"
            " first, or name another"
        )
    try:
        client = connect(Home.current().tracking_uri)
        return client.get_model_version_by_alias(name, alias) if alias else client.get_model_version(name, number)
    except StoreUnavailable as error:
        raise UserError(
            f"{parameter}: the registry of {reference} cannot be used ({error}); start it or correct"
            " MLFLOW_TRACKING_URI"
        ) from None
    except Exception as error:
        if not type(error).__module__.startswith("mlflow"):
            raise
        problem = one_line(error)
        if getattr(error, "error_code", "") in _ABSENT:
            raise NoSuchVersion(
                f"{parameter}: {reference} is not in the registry ({problem}); register a model under that name"
                " first, or name another"
            ) from None
        raise UserError(
            f"{parameter}: the registry of {reference} cannot be used ({problem}); start it or correct"
            " MLFLOW_TRACKING_URI"
        ) from None


def _from_registry(reference: str, scratch: Path, parameter: str) -> FoundModel:
    version = _registered(reference, parameter)
    from mlflow.artifacts import download_artifacts

    target = scratch / "download" / f"version-{version.version}"
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
    records = found / RECORDS_FILE
    for folder in (found / "data" / "model", found / "model", found):
        if (folder / "config.json").is_file():
            return FoundModel(folder.absolute(), str(version.version), records if records.is_file() else None)
    raise UserError(f"{parameter}: {reference} holds no Hugging Face model; name one that register_model entered")


def _hub_name(reference: str) -> tuple[str, str | None]:
    name, _, revision = reference.removeprefix(_HUB).partition("@")
    return name, revision or None


def _from_hub(reference: str, parameter: str) -> FoundModel:
    from huggingface_hub import snapshot_download

    name, revision = _hub_name(reference)
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=list(MODEL_FILES))).absolute()
    except Exception as error:
        raise _unreachable(reference, parameter, error) from None
    return FoundModel(folder, folder.name)  # the cache names a snapshot by its commit


def _unreachable(reference: str, parameter: str, error: Exception) -> UserError:
    remedy = "check name, network and HF_TOKEN, or give a local folder"
    return UserError(f"{parameter}: {reference} cannot be had from the Hub ({type(error).__name__}); {remedy}")
