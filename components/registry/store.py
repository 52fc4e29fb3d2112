"""The MLflow registry as the steps and commands of this domain reach it: opened, locked, asked for versions."""

from __future__ import annotations

import fcntl
import getpass
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from modelmill.components.core import events
from modelmill.components.core.errors import UserError
from modelmill.components.core.home import Home
from modelmill.components.core.manifest import Manifest, json_digest
from modelmill.components.core.mlflow_store import (
    StoreUnavailable,
    connect,
    is_outage,
    one_line,
    safe_uri,
    sqlite_path,
)
from modelmill.components.core.uri import local_path
from modelmill.components.core.verified import file_digest
from modelmill.components.core.weights import weights_digest

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

WEIGHTS_TAG, FILES_TAG = "weights_digest", "files_digest"
_ABSENT = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")


@contextmanager
def open_registry(again: str = "") -> Iterator[MlflowClient]:
    """A client of the registry; trouble with the store inside becomes one line that says what to do.

    Args:
        again: what to run when the store is back; default the step, or the pipeline run it belongs to.
    """
    uri = Home.current().tracking_uri
    run = events.run_directory()
    again = again or (f"`modelmill resume {run.name}`" if run else "this step again")
    try:
        events.progress("opening the registry")
        yield connect(uri)
    except StoreUnavailable as error:
        problem = str(error)
    except UserError:
        raise
    except Exception as error:
        if type(error).__module__.startswith("mlflow") or is_outage(error):
            problem = one_line(error)
        else:
            raise
    else:
        return
    raise UserError(
        f"MLFLOW_TRACKING_URI: the registry at {safe_uri(uri)} cannot be used ({problem}); start it or correct the "
        f"address, then run {again}"
    )


@contextmanager
def exclusive() -> Iterator[None]:
    """Let one process at a time move aliases of the embedded store.

    A tracking server has no such lock. There whoever moves an alias reads it again just before.
    """
    database = sqlite_path(Home.current().tracking_uri)
    if database is None:
        yield
        return
    with database.with_name(".registry.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def is_absent(error: Exception) -> bool:
    """Whether MLflow says that what was asked for is not in the registry."""
    return getattr(error, "error_code", "") in _ABSENT


def find_version(client: MlflowClient, name: str, version: str) -> ModelVersion | None:
    """A version, or None where the registry has none of that number."""
    try:
        return client.get_model_version(name, version)
    except Exception as error:
        if is_absent(error):
            return None
        raise


def all_versions(client: MlflowClient, query: str) -> list[ModelVersion]:
    """Every version that a query of MLflow finds, the lowest first."""
    found: list[ModelVersion] = []
    token = None
    while True:
        page = client.search_model_versions(query, max_results=200, page_token=token)
        found.extend(page)
        token = page.token
        if not token:
            return sorted(found, key=lambda version: int(version.version))


def version_of(client: MlflowClient, name: str, weights: str, files: str) -> ModelVersion | None:
    """The lowest version that has these weights in these files, or None.

    Versions that do not tell the digest of their files are taken by their weights.
    """
    for version in all_versions(client, f"name = '{name}' AND tags.`{WEIGHTS_TAG}` = '{weights}'"):
        if version.tags.get(FILES_TAG, files) == files:
            return version
    return None


def files_digest(model: Manifest) -> str:
    """Digest of the files below `model/` of an artifact: weights, configuration, tokenizer, by name and content.

    Raises:
        UserError: there is none.
    """
    entries = {entry.path: entry.sha256 for entry in model.files if entry.path.startswith("model/")}
    if not entries:
        raise UserError(f"model: {model.uri} holds no model/ folder; give the output of a training step")
    return json_digest(entries)


def registered_folder(client: MlflowClient, version: ModelVersion, scratch: Path) -> Path:
    """Folder of a registered version as MLflow keeps it: read in place, or downloaded where it lies elsewhere.

    Args:
        client: of the registry.
        version: what to bring here.
        scratch: folder for the download.

    Raises:
        UserError: its files are gone or cannot be fetched.
    """
    from mlflow.artifacts import download_artifacts

    place = str(client.get_model_version_download_uri(version.name, version.version))
    if urlsplit(place).scheme in ("", "file"):  # not is_remote: a server's own are mlflow-artifacts:/path
        folder = local_path(place)
        if not folder.is_dir():
            raise UserError(f"registry: the files of {_named(version)} are gone from {folder}; register it again")
        return folder
    target = scratch / "download" / f"version-{version.version}"
    target.mkdir(parents=True, exist_ok=True)
    events.progress(f"fetching version {version.version}")
    try:
        return Path(download_artifacts(place, dst_path=str(target), tracking_uri=Home.current().tracking_uri))
    except Exception as error:  # whatever the artifact store below raises
        raise UserError(
            f"registry: the files of {_named(version)} cannot be fetched ({one_line(error)}); check the artifact store"
        ) from None


def check_files(client: MlflowClient, version: ModelVersion, scratch: Path) -> Path:
    """Folder of a version's exported model, its files digested now and equal to what the registration wrote.

    Raises:
        UserError: they are not.
    """
    folder = registered_folder(client, version, scratch) / "data" / "model"
    if not folder.is_dir():
        raise UserError(f"registry: {_named(version)} holds no data/model folder; register it with register_model")
    events.progress(f"checking the files of version {version.version}")
    found = {WEIGHTS_TAG: weights_digest(folder)}
    if FILES_TAG in version.tags:
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        found[FILES_TAG] = json_digest(
            {f"model/{path.relative_to(folder).as_posix()}": file_digest(path) for path in paths}
        )
    for tag, digest in found.items():
        if version.tags.get(tag) != digest:
            raise UserError(
                f"registry: the files of {_named(version)} have the {tag} {digest[:16]}, "
                f"{str(version.tags.get(tag))[:16]} was registered; they were changed since; register the model anew"
            )
    return folder


def whoever(environment: Mapping[str, str] | None = None) -> str:
    """Who runs this: `$MODELMILL_USER`, the pod of a cluster's step, or the login name."""
    environment = os.environ if environment is None else environment
    if user := environment.get("MODELMILL_USER"):
        return user
    if pod := environment.get("KFP_POD_NAME"):
        return f"pod {pod}"
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without an entry in its password file
        return f"uid {os.getuid()}"


def _named(version: ModelVersion) -> str:
    return f"{version.name} version {version.version}"
