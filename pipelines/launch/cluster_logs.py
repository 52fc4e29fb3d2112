"""What the steps of a run on a cluster wrote: from their pods, or from the home when the pods are gone."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from modelmill.components.core.errors import UserError
from modelmill.pipelines.launch.kubeflow import ENDED, Endpoint
from modelmill.pipelines.launch.kubeflow_runs import profile_of
from modelmill.pipelines.launch.platform_tasks import STEP_LABEL
from modelmill.pipelines.launch.pods import Cluster
from modelmill.pipelines.launch.runs import Run
from modelmill.pipelines.platform import Profile

_POLL = 1.0
_WAITING = ("Pending", "Unknown")


def show(run: Run, step: str, *, follow: bool, write: Callable[[str], None]) -> None:
    """Write the logs of a run that was started from here; see `show_foreign`."""
    show_foreign(profile_of(run), run.record.place.get("run_id", ""), step, follow=follow, write=write)


def show_foreign(profile: Profile, run_id: str, step: str, *, follow: bool, write: Callable[[str], None]) -> None:
    """Write the logs of a run by its id at KFP.

    Args:
        profile: where it runs.
        run_id: KFP's id.
        step: one step; empty: all of them, one attempt after the other.
        follow: go on until the run has ended.
        write: gets the text, in pieces.

    Raises:
        UserError: the pods are gone and the home is not mounted here.
    """
    try:
        cluster = Cluster(profile.namespace)
    except UserError:
        if _from_home(profile, run_id, step, write):
            return
        raise
    endpoint = Endpoint(profile) if follow else None
    shown: set[str] = set()
    while True:
        ended = endpoint is None or str(endpoint.run(run_id).state) in ENDED  # asked first: nothing last is missed
        for pod in cluster.pods(run_id, step):
            name = pod.metadata.name
            if name in shown or pod.status.phase in _WAITING:
                continue
            shown.add(name)
            if not step:
                write(f"==> {pod.metadata.labels[STEP_LABEL]} ({name}) <==\n")
            for piece in cluster.log(name, follow=follow):
                write(piece)
        if ended:
            break
        time.sleep(_POLL)
    if not shown and not _from_home(profile, run_id, step, write):
        raise UserError(_gone(profile, run_id, step))


def _gone(profile: Profile, run_id: str, step: str) -> str:
    what = f"step {step} of run {run_id}" if step else f"run {run_id}"
    place = f"{profile.home.mount}/runs/{run_id}/logs" if profile.home else "the home"
    return (
        f"logs: {what} has no pod in namespace {profile.namespace} (not started, or cleaned up); its log files are in"
        f" {place} of the cluster's volume: run this command in a pod that mounts it, or look at the page of the run"
    )


def _from_home(profile: Profile, run_id: str, step: str, write: Callable[[str], None]) -> bool:
    """Write the log files of a run from the home, where it is mounted; returns whether there were any."""
    folder = Path(profile.home.mount) / "runs" / run_id / "logs" if profile.home and run_id else None
    files = sorted(folder.glob(f"{step or '*'}.log"), key=lambda path: path.stat().st_mtime) if folder else []
    for path in files:
        if not step:
            write(f"==> {path.stem} <==\n")
        write(path.read_text(errors="replace"))
    return bool(files)
