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

from modelmill.components.core import delivery, mlflow_store
from modelmill.components.core.delivery import deliver, deliver_pending
from modelmill.components.core.home import Home
from tests.components.conftest import RunFolder, TrackingServer
from tests.components.core.deliveries import MakeRun, assert_small_run, client_of, history, runs_of, small_run


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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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
