"""What MLflow holds of a run on a cluster, as far as this machine reaches it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from modelmill.components.core import mlflow_store
from modelmill.components.core.errors import UserError
from modelmill.pipelines.platform import Profile

_VARIABLE = "MLFLOW_TRACKING_URI"


def tracking_uri(profile: Profile) -> str:
    """Where the runs of a profile are in MLflow; empty when only the cluster knows.

    The profile has the address inside the cluster; the variable goes before it, for a machine that has another.
    """
    embedded = Path(profile.home.mount, "mlflow.db") if profile.home else None
    there = f"sqlite:///{embedded}" if embedded is not None and embedded.is_file() else ""
    return os.environ.get(_VARIABLE) or profile.tracking.uri or there


def end_in_mlflow(run_id: str, profile: Profile, note: Callable[[str], None]) -> int | None:
    """End a run that was terminated in MLflow: KFP runs no exit handler then, so nothing on the cluster does.

    Args:
        run_id: KFP's id.
        profile: where it ran.
        note: gets one line, unless there was nothing to end.

    Returns:
        How many of its runs were open, or None when MLflow cannot be asked.
    """
    uri = tracking_uri(profile)
    if not uri:
        note(f"{_still_open(run_id)}: its store is in the home of the cluster, which this machine does not mount")
        return None
    try:
        ended = _end(uri, run_id)
    except UserError as error:
        note(f"{_still_open(run_id)}: {error}")
        return None
    except Exception as error:  # whatever MLflow or a database driver raises
        note(
            f"{_still_open(run_id)}: {_VARIABLE}: {mlflow_store.safe_uri(uri)} cannot be used"
            f" ({mlflow_store.one_line(error)}); set it to the server's address for this machine and cancel again"
        )
        return None
    if ended is None:
        note(f"{_VARIABLE}: {mlflow_store.safe_uri(uri)} has no run of {run_id}, so nothing was ended there")
    elif ended:
        note(f"ended {ended} open runs of {run_id} in MLflow as KILLED")
    return ended or 0


def _end(uri: str, run_id: str) -> int | None:
    store = mlflow_store.sqlite_path(uri)
    if store is not None and not store.exists():  # connecting would make one
        return None
    client = mlflow_store.connect(uri)
    from modelmill.components.core.mlflow_writer import end_open_runs

    return end_open_runs(client, run_id, "KILLED")


def _still_open(run_id: str) -> str:
    return f"run {run_id} may stay open in MLflow"
