"""What steps spool arrives in MLflow once each: after crashes at any point, outages, resumes and races."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from modelmill.components.core import delivery, mlflow_store
from modelmill.components.core.delivery import deliver, deliver_pending
from modelmill.components.core.errors import UserError
from modelmill.components.core.events import append_line
from modelmill.components.core.home import Home
from modelmill.components.core.mlflow_writer import flatten, is_headline
from tests.components.conftest import RunFolder, TrackingServer

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


class Dying:
    """An MLflow client whose process dies at the n-th call, before or after the store has done it."""

    def __init__(self, client: MlflowClient, calls: int, after: bool) -> None:
        self._client, self._left, self._after = client, calls, after

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._client, name)

        def call(*arguments: Any, **named: Any) -> Any:
            self._left -= 1
            if self._left == 0 and not self._after:
                raise KeyboardInterrupt
            result = method(*arguments, **named)
            if self._left == 0:
                raise KeyboardInterrupt
            return result

        return call


@pytest.mark.parametrize("after", [False, True], ids=["before-the-call", "after-the-call"])
def test_death_at_any_call_loses_and_duplicates_nothing(
    store_home: Home, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, after: bool
) -> None:
    client, deaths = client_of(store_home), 0
    monkeypatch.setattr(delivery, "_CHUNK", 4)  # several offsets in one small spool
    real = mlflow_store.connect
    for calls in range(1, 60):
        run = make_run(store_home, f"death-{calls}")
        small_run(run)
        monkeypatch.setattr(mlflow_store, "connect", lambda uri, calls=calls: Dying(real(uri), calls, after))
        try:
            died = deliver(run.path) is None
        except KeyboardInterrupt:
            died = True
        monkeypatch.setattr(mlflow_store, "connect", real)
        if not died:
            break
        deaths += 1
        assert deliver(run.path).complete
        assert_small_run(client, run.run_id)
    assert deaths >= 15, "every call of a delivery was tried"


def follow(run: RunFolder, **environment: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "modelmill.components.core.delivery", str(run.path), "--follow"]
    inherited = {key: value for key, value in os.environ.items() if key not in ("MODELMILL_RUN_DIR", "MODELMILL_STEP")}
    return subprocess.Popen(command, env={**inherited, **environment}, stderr=subprocess.PIPE)


def wait_for(condition: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)


def offset(run: RunFolder, spool: str) -> int:
    try:
        return int(json.loads((run.path / "spool" / ".delivery.json").read_text())["offsets"].get(spool, 0))
    except (OSError, ValueError):
        return 0


def test_kill_9_while_following_loses_and_duplicates_nothing(store_home: Home, make_run: MakeRun) -> None:
    run = make_run(store_home)
    small_run(run, points=6_000)
    size = (run.path / "spool" / "train.jsonl").stat().st_size
    reached = []
    for goal in (0, size // 2):
        process = follow(run)
        wait_for(lambda goal=goal: (run.path / "mlflow.json").exists() and offset(run, "train") >= goal)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        reached.append(offset(run, "train"))
    assert reached[0] < size, "the first kill came in the middle"
    process = follow(run)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert not errors
    assert_small_run(client_of(store_home), run.run_id, points=6_000)


def test_follow_delivers_while_the_run_goes_on_and_ends_with_it(store_home: Home, make_run: MakeRun) -> None:
    run = make_run(store_home)
    run.begin()
    process = follow(run)
    client = client_of(store_home)
    try:
        run.record("train", "start")
        run.record("train", "metrics", values={"loss": 3.0}, step=1)
        wait_for(lambda: offset(run, "train") == (run.path / "spool" / "train.jsonl").stat().st_size)
        _, nested = runs_of(client, run.run_id)
        assert nested["train"][0].info.status == "RUNNING"
        assert history(client, nested["train"][0], "loss") == [(1, 3.0)]
        os.kill(process.pid, signal.SIGINT)  # Ctrl-C reaches the whole group; the run's end is still to come
        run.record("train", "metrics", values={"loss": 2.0}, step=2)
        run.end("KILLED")
        process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 0
    parents, nested = runs_of(client, run.run_id)
    assert history(client, nested["train"][0], "loss") == [(1, 3.0), (2, 2.0)]
    assert parents[0].info.status == "KILLED"
    assert nested["train"][0].info.status == "KILLED", "a step that could not say goodbye is closed with its run"


def test_follow_ends_when_its_starter_is_gone(store_home: Home, make_run: MakeRun) -> None:
    run = make_run(store_home)
    run.begin()
    code = (
        "import subprocess, sys, time\n"
        "p = subprocess.Popen([sys.executable, '-m', 'modelmill.components.core.delivery', sys.argv[1], '--follow'],"
        " start_new_session=True)\n"
        "print(p.pid, flush=True); time.sleep(600)\n"
    )
    inherited = {key: value for key, value in os.environ.items() if key != "MODELMILL_RUN_DIR"}
    starter = subprocess.Popen([sys.executable, "-c", code, str(run.path)], stdout=subprocess.PIPE, env=inherited)
    assert starter.stdout is not None
    pid = int(starter.stdout.readline())
    wait_for(lambda: (run.path / "mlflow.json").exists())
    run.record("train", "metrics", values={"loss": 1.0}, step=0)
    starter.kill()
    starter.wait()
    wait_for(lambda: not _alive(pid))
    _, nested = runs_of(client_of(store_home), run.run_id)
    assert history(client_of(store_home), nested["train"][0], "loss") == [(0, 1.0)]


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_server_killed_in_the_middle_gets_the_rest_later(
    home: Home, make_run: MakeRun, tracking_server: TrackingServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_server.uri)
    run = make_run(home)
    run.begin()
    run.record("train", "start")
    for step in range(50):
        values = {"loss": float(step), "odd": float("nan") if step % 2 else float("inf")}
        run.record("train", "metrics", values=values, step=step)
    assert not deliver(run.path).warnings
    tracking_server.kill()

    for step in range(50, 100):
        run.record("train", "metrics", values={"loss": float(step)}, step=step)
    report_file = run.path / "report.html"
    report_file.write_text("late")
    run.record("train", "artifact", path=str(report_file), folder="")
    run.record("train", "end", status="FINISHED")
    run.end()
    began = time.monotonic()
    report = deliver(run.path)
    assert time.monotonic() - began < 20
    assert not report.complete
    (warning,) = report.warnings
    assert warning.startswith(f"MLFLOW_TRACKING_URI: {tracking_server.uri} cannot be used")
    assert "\n" not in warning

    small_run(make_run(home, "run-2"))  # a second run, which never reached the server
    down = deliver_pending(home)
    assert len(down) == 1, "a dead server is tried once"
    tracking_server.start()
    monkeypatch.delenv("MLFLOW_TRACKING_URI")  # the first run knows where it belongs
    first = deliver_pending(home)
    assert [each.run_id for each in first if each.complete] == ["run-1", "run-2"]
    client = MlflowClient(tracking_server.uri)
    parents, nested = runs_of(client, "run-1")
    assert len(parents) == 1
    train = nested["train"][0]
    assert history(client, train, "loss") == [(step, float(step)) for step in range(100)]
    assert len(history(client, train, "odd")) == 50, "numbers that are none are numbers too"
    assert [item.path for item in client.list_artifacts(train.info.run_id)] == ["report.html"]
    assert parents[0].info.status == "FINISHED"
    assert not (home.root / "mlflow.db").exists() or not runs_of(client_of(home), "run-1")[0]
    assert deliver_pending(home) == []


def test_two_runs_create_one_new_store_at_the_same_time(home: Home, make_run: MakeRun) -> None:
    runs = [make_run(home, f"twin-{number}") for number in range(2)]
    for run in runs:
        small_run(run)
    processes = [follow(run) for run in runs]
    for process in processes:
        _, errors = process.communicate(timeout=90)
        assert process.returncode == 0, errors
    client = client_of(home)
    for run in runs:
        assert_small_run(client, run.run_id)
    assert len([e for e in client.search_experiments() if e.name == "tests"]) == 1


def test_a_resumed_step_goes_on_in_its_run(store_home: Home, make_run: MakeRun) -> None:
    """The attempt after a crash repeats the points after its checkpoint; equal ones are one point."""
    run = make_run(store_home)
    run.begin()
    run.record("train", "start")
    for step in range(4):
        run.record("train", "metrics", values={"loss": 4.0 - step, "seconds": step / 7}, step=step)
    run.record("train", "end", status="FAILED")
    run.end("FAILED")
    assert deliver(run.path).complete
    client = client_of(store_home)
    assert runs_of(client, run.run_id)[1]["train"][0].info.status == "FAILED"

    time.sleep(0.01)  # the second attempt has other times
    run.begin()
    run.record("train", "start")
    for step in range(2, 6):
        run.record("train", "metrics", values={"loss": 4.0 - step, "seconds": step / 3}, step=step)
    deliver(run.path)
    parents, nested = runs_of(client, run.run_id)
    assert parents[0].info.status == nested["train"][0].info.status == "RUNNING"
    run.record("train", "end", status="FINISHED")
    run.end()
    assert deliver(run.path).complete
    parents, nested = runs_of(client, run.run_id)
    assert (len(parents), len(nested["train"])) == (1, 1)
    assert history(client, nested["train"][0], "loss") == [(step, 4.0 - step) for step in range(6)]
    assert len(history(client, nested["train"][0], "seconds")) == 8, "what came out differently stays"
    assert parents[0].info.status == nested["train"][0].info.status == "FINISHED"


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


def test_a_store_that_lost_the_run_gets_everything_again(
    store_home: Home, make_run: MakeRun, empty_store: Path
) -> None:
    run = make_run(store_home)
    small_run(run)
    deliver(run.path)
    (store_home.root / "mlflow.db").write_bytes(empty_store.read_bytes())
    run.record("_run", "tags", values={"again": "yes"})
    assert deliver(run.path).complete
    assert_small_run(client_of(store_home), run.run_id)


def test_a_run_that_another_process_delivers_is_left_to_it(store_home: Home, make_run: MakeRun) -> None:
    live, done = make_run(store_home, "live"), make_run(store_home, "done")
    live.begin()
    small_run(done)
    process = follow(live)
    try:
        wait_for(lambda: (live.path / "mlflow.json").exists())
        assert [report.run_id for report in deliver_pending(store_home)] == ["done"]
    finally:
        process.terminate()
        process.communicate(timeout=30)


def test_torn_lines_neither_stop_nor_repeat(store_home: Home, make_run: MakeRun) -> None:
    run = make_run(store_home)
    small_run(run)
    with (run.path / "spool" / "train.jsonl").open("ab") as spool:
        spool.write(b'{"type":"metrics","ti\n{"type":"metrics","time":5,"values":{"loss":9.9')
    assert deliver(run.path).complete, "half a line at the end is no record"
    assert_small_run(client_of(store_home), run.run_id)
    assert deliver_pending(store_home) == []


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
