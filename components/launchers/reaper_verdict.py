"""Whether what a run owns has outlived it: the one rule of the reaper, for jobs in the cluster and in SageMaker."""

from __future__ import annotations

from collections.abc import Callable, Collection
from datetime import datetime, timedelta

GONE = "GONE"  # Kubeflow Pipelines says that it has no such run
OVER = frozenset({"SUCCEEDED", "FAILED", "CANCELED", "SKIPPED", GONE})
StateOf = Callable[[str], tuple[str, datetime | None]]


def verdict(
    run_id: str,
    owned: datetime,
    state_of: StateOf,
    *,
    grace: timedelta,
    now: datetime,
    over: Collection[str] = OVER,
) -> tuple[str, bool]:
    """Why something stays or goes, and whether it goes.

    Args:
        run_id: of the run that owns it; empty for none.
        owned: since when it does.
        state_of: (state, end) of a run by its id: KFP's name of the state, or `GONE`; raises OSError or ValueError
            when it cannot be found out.
        grace: how long the run must have been over, and have owned it, before it goes.
        now: the time, with its zone.
        over: states of a run that needs it no longer.
    """
    if not run_id:
        return "belongs to no run of Kubeflow Pipelines", False
    try:
        state, ended = state_of(run_id)
    except (OSError, ValueError) as error:
        return f"the state of run {run_id} is not known ({error})", False
    if state not in over:
        return f"run {run_id} is {state}", False
    since = max(time for time in (ended, owned) if time is not None)
    age = now - since
    if age < grace:
        return f"run {run_id} is {state}, for {age.total_seconds() / 60:.0f} minutes only", False
    return f"run {run_id} is {state} since {since.isoformat(timespec='seconds')}", True
