"""What arrives in MLflow of a run's spool, and what is said of records and stores that cannot be used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from modelmill.components.core import delivery, mlflow_store
from modelmill.components.core.delivery import deliver, deliver_pending
from modelmill.components.core.errors import UserError
from modelmill.components.core.events import append_line
from modelmill.components.core.home import Home
from modelmill.components.core.mlflow_writer import flatten, is_headline
from tests.components.core.deliveries import MakeRun, assert_small_run, client_of, runs_of, small_run


def test_a_finished_run_arrives_whole(store_home: Home, make_run: MakeRun) -> None:
    run = make_run(store_home)
    small_run(run)
    report = deliver(run.path)
    assert report.complete
    assert not report.warnings
    client = client_of(store_home)
    assert_small_run(client, run.run_id)
    index = json.loads((run.path / "mlflow.json").read_text())
    parents, nested = runs_of(client, run.run_id)
    assert index["parent_run_id"] == report.parent_run_id == parents[0].info.run_id
    assert index["steps"] == {"train": nested["train"][0].info.run_id}
    assert index["experiment_id"] == client.get_experiment_by_name("tests").experiment_id
    assert index["tracking_uri"] == store_home.tracking_uri
    lines = [json.loads(line) for line in (run.path / "spool" / "train.jsonl").read_text().splitlines()]
    train = nested["train"][0].info
    assert (train.start_time, train.end_time) == (lines[0]["time"], lines[-1]["time"])
    assert train.artifact_uri.startswith(store_home.artifact_root.as_uri())
    assert deliver(run.path).records == 0, "a second delivery has nothing to do"
    assert_small_run(client, run.run_id)


def test_records_mlflow_refuses_hold_up_nothing(store_home: Home, make_run: MakeRun) -> None:
    run = make_run(store_home)
    run.begin()
    run.record("train", "params", values={"rate": 0.1, "note": "x" * 9000, "": "nameless"})
    run.record("train", "params", values={"rate": 0.2, "late": 1})
    run.record("train", "metrics", values={"good": 1.0, "bad": "text"}, step=0)
    run.record("train", "artifact", path=str(run.path / "absent"), folder="")
    run.record("train", "unknown kind")
    run.record("train", "tags", values={"a b(c)": "kept", "long": "y" * 9000})
    append_line(run.path / "spool" / "train.jsonl", {"time": 1})
    run.record("train", "metrics", values={"after": 2.0}, step=0)
    run.record("train", "end", status="FINISHED")
    run.end()
    report = deliver(run.path)
    assert report.complete
    train = runs_of(client_of(store_home), run.run_id)[1]["train"][0]
    assert train.data.metrics == {"good": 1.0, "after": 2.0}
    assert train.data.params["rate"] == "0.1"
    assert train.data.params["late"] == "1"
    assert len(train.data.params["note"]) == 6000
    assert train.data.tags["a b_c_"] == "kept"
    text = "\n".join(report.warnings)
    assert "parameters keep their first value: rate" in text
    assert "parameter '' skipped" in text
    assert "metric bad skipped" in text
    assert "absent is gone" in text


def test_an_artifact_is_found_where_the_step_published_it(store_home: Home, make_run: MakeRun) -> None:
    run = make_run(store_home)
    final = store_home.store / "evaluate" / "abc" / "data"
    final.mkdir(parents=True)
    (final / "report.html").write_text("published")
    partial = store_home.store / "evaluate" / "abc.partial" / "data" / "report.html"
    run.begin()
    run.record("evaluate", "artifact", path=str(partial), folder="")
    run.end()
    assert not deliver(run.path).warnings
    client = client_of(store_home)
    evaluate = runs_of(client, run.run_id)[1]["evaluate"][0]
    assert [item.path for item in client.list_artifacts(evaluate.info.run_id)] == ["report.html"]


def test_mlflow_run_id_is_logged_into_and_left_open(
    store_home: Home, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """KFP's MLflow plugin opens and closes the outer run; ours nest below it."""
    client = client_of(store_home)
    outer = client.create_run(client.create_experiment("kfp", store_home.artifact_root.as_uri()), run_name="outer")
    monkeypatch.setenv("MLFLOW_RUN_ID", outer.info.run_id)
    run = make_run(store_home)
    run.record("train", "start")  # a pod holds one step and no spool of the run
    run.record("train", "metrics", values={"test_loss": 1.5}, step=0)
    run.record("train", "end", status="FINISHED")
    assert deliver(run.path).complete
    parents, nested = runs_of(client, run.run_id)
    assert parents == []
    assert nested["train"][0].data.tags["mlflow.parentRunId"] == outer.info.run_id
    assert nested["train"][0].info.experiment_id == outer.info.experiment_id
    outer = client.get_run(outer.info.run_id)
    assert (outer.info.status, outer.data.metrics, outer.info.run_name) == ("RUNNING", {"test_loss": 1.5}, "outer")


def test_misuse_is_one_line(home: Home, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert delivery.main([str(tmp_path / "nowhere")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(UserError, match=r"MLFLOW_TRACKING_URI: 'http://' names no host"):
        mlflow_store.connect("http://")


def test_a_deleted_experiment_is_named(store_home: Home, make_run: MakeRun) -> None:
    client = client_of(store_home)
    client.delete_experiment(client.create_experiment("tests", store_home.artifact_root.as_uri()))
    run = make_run(store_home)
    small_run(run)
    report = delivery.DeliveryReport("")
    for report in deliver_pending(store_home):
        assert "experiment 'tests' is deleted" in report.warnings[0]
    assert not report.complete
    client.restore_experiment(client.get_experiment_by_name("tests").experiment_id)
    assert deliver(run.path).complete
    assert_small_run(client, run.run_id)


def test_secrets_of_a_uri_reach_no_file(home: Home, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:hunter2@127.0.0.1:9")
    run = make_run(home)
    small_run(run)
    (report,) = deliver_pending(home)
    written = "".join(path.read_text() for path in run.path.rglob("*") if path.is_file()) + str(report)
    assert "hunter2" not in written
    assert "127.0.0.1:9" in written


@pytest.mark.parametrize(
    ("values", "flat"),
    [
        ({"a": {"b": {"c": 1}}}, {"a.b.c": "1"}),
        ({"a": [1, 2.5], "b": None, "c": True, "d": "text"}, {"a": "[1, 2.5]", "b": "null", "c": "true", "d": "text"}),
        ({"s": [{"path": "x"}, {"path": "y"}]}, {"s.0.path": "x", "s.1.path": "y"}),
        ({"empty": {}, "none": []}, {"empty": "{}", "none": "[]"}),
        ({"a?b": 1}, {"a_b": "1"}),
    ],
)
def test_parameters_are_flattened(values: dict[str, Any], flat: dict[str, str]) -> None:
    assert flatten(values) == flat


def test_headline_metrics() -> None:
    wanted = ["test_loss", "validation_loss", "perplexity", "bits_per_byte", "bigram_bits_per_byte"]
    assert all(map(is_headline, wanted))
    assert not any(map(is_headline, ["loss", "learning_rate", "tokens_per_second", "test_rows", "test_bytes"]))
