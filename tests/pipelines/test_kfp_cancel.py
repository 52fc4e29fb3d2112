"""Cancelling a run on a cluster: what it leaves in MLflow, whoever cancels, and whatever is away meanwhile."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from mlflow import MlflowClient

from modelmill.components.core.delivery import deliver
from modelmill.components.core.errors import UserError
from modelmill.pipelines.launch import cancel, kubeflow_runs, tracker
from modelmill.pipelines.launch.kubeflow import ended_as
from modelmill.pipelines.launch.runs import Run
from tests.components.core.deliveries import runs_of
from tests.pipelines.cluster import Cluster, cluster
from tests.pipelines.conftest import recipe, wait_for


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared_store: str) -> Iterator[Cluster]:
    with cluster(tmp_path, monkeypatch, shared_store) as found:
        yield found


def begun(here: Cluster) -> Run:
    """A run on its way, as its pods have told MLflow: one step finished, one in the middle of a trial."""
    run = here.submit()
    inside = here.home_of(run)
    inside.mkdir(parents=True)
    tracker.record(inside, "start", run_id=inside.name, name="words", experiment="cancelled")
    tracker.record(inside, "start", spool="write_words")
    tracker.record(inside, "end", spool="write_words", status="FINISHED")
    tracker.record(inside, "start", spool="count_words")
    tracker.record(inside, "start", spool="count_words.trial-1")
    deliver(inside, here.tracking)
    return run


def statuses(here: Cluster, run: Run) -> dict[str, str]:
    """Status in MLflow of the parent, called `run`, and of what is nested."""
    parents, nested = runs_of(MlflowClient(here.tracking), run.record.place["run_id"])
    assert len(parents) == 1
    return {"run": parents[0].info.status} | {name: found[0].info.status for name, found in nested.items()}


BEGUN = {"run": "RUNNING", "write_words": "FINISHED", "count_words": "RUNNING", "count_words.trial-1": "RUNNING"}
ENDED = {"run": "KILLED", "write_words": "FINISHED", "count_words": "KILLED", "count_words.trial-1": "KILLED"}


@pytest.mark.parametrize("history", [True, False], ids=["history", "no-history"])
def test_whoever_cancels_ends_the_run_in_mlflow(here: Cluster, history: bool) -> None:
    here.api.history = history
    ours, other, theirs = begun(here), begun(here), begun(here)
    told: list[str] = []
    assert cancel.cancel_on_kfp(ours, told.append) == "cancelled"
    assert told == [f"ended 3 open runs of {ours.record.place['run_id']} in MLflow as KILLED"]
    assert statuses(here, ours) == ENDED
    assert cancel.cancel_foreign(theirs.record.place["run_id"], here.profile(), told.append) == "cancelled"
    assert statuses(here, theirs) == ENDED
    assert statuses(here, other) == BEGUN, "that one goes on"


def test_cancelling_twice_ends_nothing_twice(here: Cluster) -> None:
    run = begun(here)
    run_id = run.record.place["run_id"]
    cancel.cancel_on_kfp(run, print)
    ends = [each.info.end_time for each in runs_of(MlflowClient(here.tracking), run_id)[0]]
    with pytest.raises(UserError, match=rf"run: {run.id} is cancelled; there is nothing to cancel"):
        cancel.cancel_on_kfp(Run.open(run.folder), print)
    with pytest.raises(UserError, match=rf"run: {run_id} is cancelled; there is nothing to cancel"):
        cancel.cancel_foreign(run_id, here.profile(), print)
    assert [each.info.end_time for each in runs_of(MlflowClient(here.tracking), run_id)[0]] == ends


@pytest.mark.parametrize("state", ["SUCCEEDED", "FAILED"])
def test_a_run_that_has_ended_is_left_as_it_is(here: Cluster, state: str) -> None:
    run = begun(here)
    here.api.end(run.record.place["run_id"], state)
    for attempt in (
        lambda: cancel.cancel_on_kfp(run, print),
        lambda: cancel.cancel_foreign(run.record.place["run_id"], here.profile(), print),
    ):
        with pytest.raises(UserError, match=f"is {state.lower()}; there is nothing to cancel"):
            attempt()
    assert statuses(here, run) == BEGUN, "its exit handler is on its way"


def test_a_run_that_ends_in_the_same_moment_keeps_its_own_end(here: Cluster) -> None:
    run, endpoint = begun(here), here.endpoint()
    here.api.end(run.record.place["run_id"], "FAILED")
    assert not cancel.end_on_kfp(run.record.place["run_id"], endpoint, here.profile(), print)
    kubeflow_runs.refresh(run, endpoint)
    assert run.state == "failed"
    assert statuses(here, run) == BEGUN


@pytest.mark.parametrize("where", ["profile", "variable"])
def test_a_dead_tracking_server_costs_one_line_and_can_be_made_up_for(
    here: Cluster, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        dead = f"http://user:secret@127.0.0.1:{free.getsockname()[1]}"
    run = begun(here)
    run_id = run.record.place["run_id"]
    profile = here.profile(tracking={"uri": dead}) if where == "profile" else here.profile()
    (run.folder / "profile.json").write_text(profile.model_dump_json())
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    if where == "variable":
        monkeypatch.setenv("MLFLOW_TRACKING_URI", dead)
    told: list[str] = []
    assert cancel.cancel_on_kfp(run, told.append) == "cancelled"
    (line,) = told
    assert line.startswith(f"run {run_id} may stay open in MLflow: MLFLOW_TRACKING_URI: http://127.0.0.1:")
    assert line.endswith("set it to the server's address for this machine and cancel again")
    assert "secret" not in line
    assert cancel.cancel_on_kfp(run, told.append) == "cancelled", "still away: said again, no error"
    assert statuses(here, run) == BEGUN
    monkeypatch.setenv("MLFLOW_TRACKING_URI", here.tracking)
    assert cancel.cancel_on_kfp(run, told.append) == "cancelled"
    assert statuses(here, run) == ENDED


def test_a_store_in_a_home_that_is_elsewhere_is_said(
    here: Cluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    run = here.submit(tracking={"uri": ""})
    told: list[str] = []
    assert cancel.cancel_on_kfp(run, told.append) == "cancelled"
    assert "its store is in the home of the cluster, which this machine does not mount" in told[0]


def test_a_server_that_never_heard_of_the_run_is_said(
    here: Cluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = here.submit()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/none.db")
    told: list[str] = []
    assert cancel.cancel_on_kfp(run, told.append) == "cancelled"
    assert f"has no run of {run.record.place['run_id']}, so nothing was ended there" in told[0]
    assert not (tmp_path / "none.db").exists()


@pytest.mark.parametrize(
    ("states", "ended"),
    [
        (["RUNNING"], None),
        (["RUNNING", "CANCELING"], None),
        (["RUNNING", "CANCELING", "FAILED"], "cancelled"),
        (["RUNNING", "CANCELING", "FAILED", "FAILED"], "cancelled"),
        (["RUNNING", "CANCELING", "FAILED", "RUNNING", "FAILED"], "failed"),
        (["RUNNING", "CANCELING", "SUCCEEDED"], "succeeded"),
        (["FAILED"], "failed"),
        (["CANCELED"], "cancelled"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else str(value),
)
def test_how_a_run_ended_is_in_its_history(states: list[str], ended: str | None) -> None:
    found = SimpleNamespace(state=states[-1], state_history=[SimpleNamespace(state=state) for state in states])
    assert ended_as(found) == ended


@pytest.mark.slow
def test_pods_that_are_ended_leave_no_open_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared_store: str
) -> None:
    with cluster(tmp_path, monkeypatch, shared_store, execute=True) as here:
        here.api.images_without = ()
        run = here.submit(recipe(count__behaviour="sleep", count__scratch=tmp_path))
        wait_for(lambda: (tmp_path / "pids").exists())
        wait_for(lambda: runs_of(MlflowClient(here.tracking), run.record.place["run_id"])[1].get("count_words"))
        assert cancel.cancel_on_kfp(run, print) == "cancelled"
        found = statuses(here, run)
        assert found["run"] == "KILLED"
        assert "RUNNING" not in found.values()
