"""Parts of a step that have runs of their own below the step's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from modelmill.components.core import tracking
from modelmill.components.core.delivery import deliver
from modelmill.components.core.events import read_lines
from modelmill.components.core.home import Home
from modelmill.components.core.recipe import Section
from modelmill.components.core.step import StepResult, run_step, section
from tests.components.core.deliveries import MakeRun, client_of, runs_of


def test_a_part_of_a_step_is_a_run_below_it(store_home: Home, make_run: MakeRun) -> None:
    run = make_run(store_home)
    run.begin()
    run.record("search", "start", run=run.run_id)
    run.enter("search")
    with tracking.child("trial-1"):
        tracking.log_params({"learning_rate": 1e-5})
        tracking.log_metrics({"validation_sql": 0.5}, step=3)
    with tracking.child("trial-2") as part:
        part.status = "KILLED"
    with pytest.raises(KeyError), tracking.child("trial-3"):
        raise KeyError
    tracking.log_metrics({"validation_sql": 0.4})
    run.record("search", "end", status="FINISHED")
    assert not deliver(run.path).warnings, "the run goes on"
    with tracking.child("trial-2"):  # a resumed step, and a delivery that begins anew
        tracking.log_metrics({"loss": 1.0})
    run.end()
    assert deliver(run.path).complete
    parents, nested = runs_of(client_of(store_home), run.run_id)
    assert {name: len(found) for name, found in nested.items()} == dict.fromkeys(
        ["search", "search.trial-1", "search.trial-2", "search.trial-3"], 1
    )
    step, first = nested["search"][0], nested["search.trial-1"][0]
    assert step.data.tags["mlflow.parentRunId"] == parents[0].info.run_id
    assert first.data.tags["mlflow.parentRunId"] == step.info.run_id
    assert first.info.run_name == "trial-1"
    assert (first.data.params, first.data.metrics) == ({"learning_rate": "1e-05"}, {"validation_sql": 0.5})
    ends = [nested[f"search.trial-{number}"][0].info.status for number in (1, 2, 3)]
    assert ends == ["FINISHED", "FINISHED", "FAILED"]
    assert parents[0].data.metrics == {"validation_sql": 0.4}, "a trial's quality is not the run's"


def test_processes_of_a_part_record_for_it(home: Home, make_run: MakeRun) -> None:
    run = make_run(home)
    run.enter("search")
    command = "from modelmill.components.core import tracking; tracking.log_metrics({'loss': 1.0})"
    with tracking.child("trial-1"):
        subprocess.run([sys.executable, "-c", command], check=True, timeout=60)
    assert tracking.CHILD_VARIABLE not in os.environ
    kinds = [record["type"] for _, record in read_lines(run.path / "spool" / "search.trial-1.jsonl")]
    assert kinds == ["start", "metrics", "end"]
    assert not (run.path / "spool" / "search.jsonl").exists()


def test_a_killed_part_is_closed_with_the_run(store_home: Home, make_run: MakeRun) -> None:
    run = make_run(store_home)
    run.begin()
    run.record("search", "start", run=run.run_id)
    run.record("search.trial-1", "start", run=run.run_id)
    run.record("search", "end", status="FAILED")
    run.end("FAILED")
    assert deliver(run.path).complete
    nested = runs_of(client_of(store_home), run.run_id)[1]
    assert nested["search.trial-1"][0].info.status == "KILLED"


def test_a_killed_part_does_not_keep_a_delivery_open(
    store_home: Home, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = client_of(store_home)
    outer = client.create_run("0").info.run_id
    run = make_run(store_home)
    for spool, kind in (("search", "start"), ("search.trial-1", "start"), ("search", "end")):
        run.record(spool, kind, status="FAILED")
    monkeypatch.setenv("MLFLOW_RUN_ID", outer)
    assert deliver(run.path).complete
    found = client.search_runs(["0"], "tags.`modelmill.step` = 'search.trial-1'")
    assert [one.info.status for one in found] == ["KILLED"]


class SearchConfig(Section):
    """A section."""


def search(config: SearchConfig, output: Path) -> StepResult:
    """A step of two parts that report the same value; the second reports a part of its own once more."""
    for number, status in ((1, "FINISHED"), (2, "KILLED")):
        (output / f"{number}.txt").write_text("kept")
        with tracking.child(f"trial-{number}") as part:
            part.status = status
            tracking.log_params({"trial": number})
            tracking.log_metrics({"loss": 1.0}, step=3)
            tracking.log_artifact(output / f"{number}.txt")
            gone = output.parent / "gone.txt"
            gone.write_text("cleared with the step's scratch")
            tracking.log_artifact(gone)
    with tracking.child("trial-2"):  # as a step does that goes on from a checkpoint
        tracking.log_metrics({"loss": 1.0}, step=3)
        tracking.log_metrics({"loss": 0.5}, step=4)
    return StepResult("model")


def test_a_reused_step_has_its_parts_below_it(store_home: Home, make_run: MakeRun) -> None:
    text = section("search", SearchConfig(), search)
    for name in ("run-a", "run-b"):
        run = make_run(store_home, name)
        run.begin()
        run.enter()
        manifest = run_step(search, text, {}, {}, number=1)
        run.end()
    first, second = (
        [record for _, record in read_lines(store_home.runs / name / "spool" / "search-1.trial-2.jsonl")]
        for name in ("run-a", "run-b")
    )
    points = [record for record in second if record["type"] == "metrics" and record["values"]]
    assert [(record["values"], record["step"]) for record in points] == [({"loss": 1.0}, 3), ({"loss": 0.5}, 4)]
    assert [record["time"] for record in second if record["type"] == "start"] == [
        record["time"] for record in first if record["type"] == "start"
    ]
    report = deliver(run.path)
    assert (report.complete, report.warnings) == (True, [])
    client = client_of(store_home)
    nested = runs_of(client, "run-b")[1]
    assert sorted(nested) == ["search-1", "search-1.trial-1", "search-1.trial-2"]
    parent, trial, other = (nested[name][0] for name in sorted(nested))
    assert {trial.data.tags["mlflow.parentRunId"], other.data.tags["mlflow.parentRunId"]} == {parent.info.run_id}
    assert (trial.info.run_name, trial.data.params, trial.data.metrics) == ("trial-1", {"trial": "1"}, {"loss": 1.0})
    assert trial.data.tags["modelmill.reused_from"] == parent.data.tags["modelmill.reused_from"] == "run-a"
    assert trial.data.tags["modelmill.key"] == manifest.key
    assert [file.path for file in client.list_artifacts(trial.info.run_id)] == ["1.txt"]
    assert (trial.info.status, other.data.metrics) == ("FINISHED", {"loss": 0.5})
    assert not parent.data.metrics
