"""Ending a run, wherever it is: one word for Ctrl-C, or a termination in Kubeflow Pipelines and what that leaves."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress

import psutil

from modelmill.components.core.errors import UserError
from modelmill.pipelines.launch.kubeflow import ENDED, Endpoint, ended_as
from modelmill.pipelines.launch.kubeflow_runs import profile_of, refresh
from modelmill.pipelines.launch.pods import Cluster
from modelmill.pipelines.launch.runs import Run
from modelmill.pipelines.launch.tracked import end_in_mlflow
from modelmill.pipelines.platform import Profile

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
    """End a run on a cluster that was started from here; see `end_on_kfp`.

    Returns:
        The run's state.

    Raises:
        UserError: there is nothing to end, not in MLflow either.
    """
    profile = profile_of(run)
    endpoint = endpoint or Endpoint(profile)
    refresh(run, endpoint)
    run_id = run.record.place["run_id"]
    if run.state == "running":
        terminated = end_on_kfp(run_id, endpoint, profile, note)
        refresh(run, endpoint, terminated=terminated)
    else:
        _end_tracking(run.id, run.state, run_id, profile, note)
    return run.state


def cancel_foreign(run_id: str, profile: Profile, note: Callable[[str], None]) -> str:
    """End a run on a cluster by its id at KFP, whoever started it; otherwise as `cancel_on_kfp`."""
    endpoint = Endpoint(profile)
    state = ended_as(endpoint.run(run_id))
    if state is not None:
        _end_tracking(run_id, state, run_id, profile, note)
        return state
    terminated = end_on_kfp(run_id, endpoint, profile, note)
    state = ended_as(endpoint.run(run_id))
    return "cancelled" if terminated and state == "failed" else state or "running"


def end_on_kfp(run_id: str, endpoint: Endpoint, profile: Profile, note: Callable[[str], None]) -> bool:
    """Terminate a run by KFP's id, then end its training jobs and its runs in MLflow, and wait until KFP says so.

    A launching step that is told to end leaves its job running, as it would when its node goes away; so the jobs are
    deleted here, once more after the last step has ended. What cannot be reached is left to the reaper. MLflow comes
    last: until then the steps may still say themselves how they ended.

    Returns:
        False when the run ended by itself in this moment, with its exit handler.
    """
    terminated = _terminate(run_id, endpoint)
    cluster: Cluster | None = None
    if profile.trainjob is not None:
        try:
            cluster = Cluster(profile.trainjob.namespace)
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
    if terminated:
        end_in_mlflow(run_id, profile, note)
    return terminated


def _terminate(run_id: str, endpoint: Endpoint) -> bool:
    """Tell a run to end; False when it has ended by itself since it was looked at."""
    try:
        endpoint.terminate(run_id)
    except UserError:  # KFP refuses what has ended, and what was told before
        found = endpoint.run(run_id)
        if str(found.state) not in {*ENDED, "CANCELING"}:
            raise
        return ended_as(found) in (None, "cancelled")
    return True


def _end_tracking(name: str, state: str, run_id: str, profile: Profile, note: Callable[[str], None]) -> None:
    """What is left to do for a run that has ended: MLflow may have been away when it was cancelled.

    Raises:
        UserError: nothing.
    """
    if state != "cancelled" or end_in_mlflow(run_id, profile, note) == 0:
        raise UserError(f"run: {name} is {state}; there is nothing to cancel")
