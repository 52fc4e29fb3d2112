"""Opening an MLflow tracking store: the embedded SQLite file, a database or a server, without waiting for a dead one.

Importing MLflow costs about a second and creating the SQLite store another two, so both happen only inside
`connect`, and only processes that must talk to MLflow call it.
"""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit, urlunsplit

from modelmill.components.core.errors import UserError

if TYPE_CHECKING:
    from mlflow import MlflowClient

_SQLITE = "sqlite:///"
_PORTS = {"http": 80, "https": 443, "postgresql": 5432, "mysql": 3306, "mssql": 1433}
_CONNECT_SECONDS = 5.0
# A server that answers slowly or not at all costs seconds, not the minutes of MLflow's own defaults.
_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}


class StoreUnavailable(Exception):
    """The tracking store cannot be used now; what was to be written stays on disk and can be delivered later."""


def safe_uri(uri: str) -> str:
    """The URI without a user name and password, fit for a file or a message."""
    parts = urlsplit(uri)
    if "@" not in parts.netloc:
        return uri
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def sqlite_path(uri: str) -> Path | None:
    """File of a SQLite tracking URI, or None for a server or another database."""
    return Path(uri.removeprefix(_SQLITE)) if uri.startswith(_SQLITE) else None


def connect(uri: str) -> MlflowClient:
    """Client of a tracking store, made if it is a SQLite file that does not exist yet.

    Raises:
        UserError: MLflow is not installed, or the URI is not one.
        StoreUnavailable: nothing listens at the server's address, or the database cannot be opened.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    _refuse_dead_server(uri)
    try:
        from mlflow import MlflowClient
    except ModuleNotFoundError as error:
        raise UserError(f"tracking: {error.name} is not installed; pip install 'modelmill[track]'") from None
    for name in ("mlflow.store.db.utils", "mlflow.store.model_registry", "mlflow.tracking", "alembic"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        with _alone(uri):
            client = MlflowClient(uri, registry_uri=os.environ.get("MLFLOW_REGISTRY_URI") or uri)
            client.search_experiments(max_results=1)
    except Exception as error:  # whatever a database driver raises for a file or server it cannot use
        raise StoreUnavailable(one_line(error)) from None
    return client


def _refuse_dead_server(uri: str) -> None:
    """Fail within seconds when nothing listens, before MLflow is imported and starts to retry."""
    import socket
    import ssl
    import urllib.error
    import urllib.request
    from http.client import HTTPException

    parts = urlsplit(uri)
    usual_port = _PORTS.get(parts.scheme.partition("+")[0])
    if usual_port is None:
        return
    try:
        host, port = parts.hostname, parts.port or usual_port
    except ValueError:
        host, port = None, 0
    if not host:
        raise UserError(f"MLFLOW_TRACKING_URI: {safe_uri(uri)!r} names no host; write http://host:port")
    try:
        if parts.scheme in ("http", "https"):
            urllib.request.urlopen(f"{safe_uri(uri).rstrip('/')}/health", timeout=_CONNECT_SECONDS).close()
        else:
            socket.create_connection((host, port), timeout=_CONNECT_SECONDS).close()
    except urllib.error.HTTPError:
        return  # whatever it says, something answers
    except OSError as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, ssl.SSLError):
            return  # MLflow may be configured with a certificate that this probe does not know
        raise StoreUnavailable(f"{host}:{port}: {getattr(reason, 'strerror', None) or reason}") from None
    except (ValueError, HTTPException) as error:
        raise StoreUnavailable(f"{host}:{port} speaks no HTTP: {one_line(error)}") from None


@contextmanager
def _alone(uri: str) -> Iterator[None]:
    """Let one process at a time create or migrate a SQLite store: MLflow itself does not guard it."""
    database = sqlite_path(uri)
    if database is None:
        yield
        return
    database.parent.mkdir(parents=True, exist_ok=True)
    with database.with_name(f".{database.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def experiment_id(client: MlflowClient, name: str, artifact_root: Path | None) -> str:
    """Id of an experiment, created when there is none.

    Args:
        client: made by `connect`.
        name: the experiment.
        artifact_root: where a new experiment of the embedded store keeps artifacts; None lets the server decide.

    Raises:
        StoreUnavailable: the experiment was deleted, so runs in it would not be seen.
    """
    from mlflow.exceptions import MlflowException

    for _ in range(2):  # two runs may create it at the same time: one wins, the other reads it
        found = client.get_experiment_by_name(name)
        if found is not None and found.lifecycle_stage != "active":
            raise StoreUnavailable(f"experiment {name!r} is deleted; restore it in MLflow or set tracking.experiment")
        if found is not None:
            return str(found.experiment_id)
        try:
            location = artifact_root.absolute().as_uri() if artifact_root is not None else None
            return str(client.create_experiment(name, artifact_location=location))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
    raise StoreUnavailable(f"experiment {name!r} can be neither found nor created")


def is_outage(error: Exception) -> bool:
    """Whether a call failed because of the store (try again later) and not because of what was sent.

    Refused logins count as outages too: nothing is wrong with the records.
    """
    from mlflow.exceptions import MlflowException

    if not isinstance(error, MlflowException):
        return isinstance(error, OSError)  # requests' exceptions are among them
    status = error.get_http_status_code()
    return status >= 500 or status in (401, 403, 408, 429)


def one_line(error: BaseException, limit: int = 300) -> str:
    """An error's message on one line, without the credentials a URL in it may hold."""
    words = [safe_uri(word) if "://" in word and "@" in word else word for word in str(error).split()]
    text = " ".join(words) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"
