"""Runs with every kind of record, and what MLflow must hold of them after their delivery."""

from __future__ import annotations

import json
from collections.abc import Callable

from mlflow import MlflowClient
from mlflow.entities import Run

from modelmill.components.core.home import Home
from tests.components.conftest import RunFolder

MakeRun = Callable[..., RunFolder]


def client_of(home: Home) -> MlflowClient:
    return MlflowClient(home.tracking_uri)


def runs_of(client: MlflowClient, run_id: str) -> tuple[list[Run], dict[str, list[Run]]]:
    """Parents and nested runs by step that MLflow has of a pipeline run."""
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    found = client.search_runs(experiments, f"tags.`modelmill.run_id` = '{run_id}'")
    nested: dict[str, list[Run]] = {}
    for run in found:
        if "modelmill.step" in run.data.tags:
            nested.setdefault(run.data.tags["modelmill.step"], []).append(run)
    return [run for run in found if "modelmill.step" not in run.data.tags], nested


def history(client: MlflowClient, run: Run, metric: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, metric)]


def small_run(run: RunFolder, points: int = 5) -> None:
    """A finished run with every kind of record."""
    report = run.path / "report.html"
    report.write_text("<p>report</p>")
    run.begin()
    run.record("_run", "params", values={"training": {"steps": points, "betas": [0.9, 0.95]}})
    run.record("_run", "tags", values={"team": "tests"})
    run.record("train", "start", run=run.run_id)
    run.record("train", "params", values={"steps": points})
    for step in range(points):
        run.record("train", "metrics", values={"loss": 5 - step / 10, "validation_loss": 6 - step / 10}, step=step)
    source = {"name": "rows", "digest": "d" * 64, "source": "s3://bucket/rows"}
    run.record("train", "dataset", **source, context="training", profile={"rows": 7})
    run.record("train", "artifact", path=str(report), folder="evaluation")
    run.record("train", "end", status="FINISHED")
    run.end()


def assert_small_run(client: MlflowClient, run_id: str, points: int = 5) -> None:
    """Everything of `small_run` is there, exactly once."""
    parents, nested = runs_of(client, run_id)
    assert len(parents) == 1
    assert {name: len(found) for name, found in nested.items()} == {"train": 1}
    parent, train = parents[0], nested["train"][0]
    assert train.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert parent.data.params == {"training.steps": str(points), "training.betas": "[0.9, 0.95]"}
    assert train.data.params == {"steps": str(points)}
    assert parent.data.tags["team"] == "tests"
    assert sorted(history(client, train, "loss")) == [(step, 5 - step / 10) for step in range(points)]
    expected = [(step, 6 - step / 10) for step in range(points)]
    assert sorted(history(client, train, "validation_loss")) == expected
    assert sorted(history(client, parent, "validation_loss")) == expected, "headline metrics compare runs"
    assert "loss" not in parent.data.metrics
    for run in (parent, train):
        assert run.info.status == "FINISHED"
        (entry,) = run.inputs.dataset_inputs
        assert (entry.dataset.name, entry.dataset.digest, entry.tags[0].value) == ("rows", "d" * 36, "training")
        assert json.loads(entry.dataset.source) == {"uri": "s3://bucket/rows"}
    assert [item.path for item in client.list_artifacts(train.info.run_id, "evaluation")] == ["evaluation/report.html"]
