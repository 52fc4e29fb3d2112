"""Ending a run, wherever it is: one word for Ctrl-C, a termination in Kubeflow Pipelines, and its training jobs."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress

import psutil

from modelmill.components.core.errors import UserError
from modelmill.pipelines.launch.kubeflow import ENDED, Endpoint
from modelmill.pipelines.launch.kubeflow_runs import profile_of, refresh
from modelmill.pipelines.launch.pods import Cluster
from modelmill.pipelines.launch.runs import Run

_POLL = 0.2
_MARGIN = 15.0  # seconds beside the steps' own grace until a local run must have ended
_CLUSTER_SECONDS = 120.0


def cancel_local(run: Run, seconds: float) -> str:
    """End a run of this machine as Ctrl-C does, and wait until its steps have ended (MLflow may hear of it later).

    Args:
        run: a run in progress.
        seconds: time its steps were given to end by themselves, when it was started.

    Returns:
        The run's state.

    Raises:
        UserError: its command runs elsewhere, or does not end.
    """
    if not run.alive:
        raise UserError(f"run: {run.id} is {run.state}; there is nothing to cancel")
    process = _command(run)
    if process is None:
        raise UserError(
            f"run: {run.id} belongs to a process that is not on this machine (pid {run.record.pid}); cancel it there"
        )
    with suppress(ProcessLookupError):
        os.kill(process.pid, signal.SIGTERM)
    deadline = time.monotonic() + seconds + _MARGIN
    while run.alive and Run.open(run.folder).record.state == "running":
        if time.monotonic() > deadline:
            raise UserError(f"run: {run.id} does not end; `kill -9 {process.pid}` ends it at once")
        time.sleep(_POLL)
    return Run.open(run.folder).state


def _command(run: Run) -> psutil.Process | None:
    """The process that holds the run's lock under the recorded id; another one may have the id by now."""
    try:
        process = psutil.Process(run.record.pid or 0)
        held = {os.path.realpath(file.path) for file in process.open_files()}
    except psutil.Error:
        return None
    return process if os.path.realpath(run.folder / "lock") in held else None


def cancel_on_kfp(run: Run, note: Callable[[str], None], endpoint: Endpoint | None = None) -> str:
    """End a run on a cluster, then its training jobs, and wait until KFP says so.

    A launching step that is told to end leaves its job running, as it would when its node goes away; so the jobs are
    deleted here, once more after the last step has ended. What cannot be reached is left to the reaper.

    Returns:
        The run's state.
    """
    profile = profile_of(run)
    endpoint = endpoint or Endpoint(profile)
    refresh(run, endpoint)
    if run.state != "running":
        raise UserError(f"run: {run.id} is {run.state}; there is nothing to cancel")
    end_on_kfp(run.record.place["run_id"], endpoint, profile.trainjob.namespace if profile.trainjob else "", note)
    refresh(run, endpoint)
    return run.state


def end_on_kfp(run_id: str, endpoint: Endpoint, namespace: str, note: Callable[[str], None]) -> None:
    """Terminate a run by KFP's id and delete its training jobs in a namespace (none when it is empty)."""
    endpoint.terminate(run_id)
    cluster: Cluster | None = None
    if namespace:
        try:
            cluster = Cluster(namespace)
        except UserError as error:
            note(f"training jobs are left to the reaper: {error}")
    deadline = time.monotonic() + _CLUSTER_SECONDS
    ended = False
    while not ended and time.monotonic() < deadline:
        ended = str(endpoint.run(run_id).state) in ENDED
        if cluster is not None:  # also after the end: the last step may have made one just before
            try:
                for name in cluster.delete_training_jobs(run_id):
                    note(f"deleted training job {name}")
            except UserError as error:
                note(f"training jobs are left to the reaper: {error}")
                cluster = None
        if not ended:
            time.sleep(_POLL)
    if not ended:
        note("KFP has not said yet that the run has ended; look with `modelmill runs`")
