"""What a step does in a pod: one run however many pods, its log in two places, and MLflow that may be away."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from modelmill.components.core import events, pod, tracking
from modelmill.components.core.delivery import deliver
from modelmill.components.core.errors import UserError
from modelmill.components.core.events import read_lines
from modelmill.components.core.home import Home
from tests.components.core.deliveries import MakeRun, client_of

RUN = "0f1e2d3c-aaaa"
RECIPE = {"name": "words", "description": "d", "tracking": {"experiment": "e"}, "count": {"steps": 3}}


@pytest.fixture
def pod_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    """A pod's environment; MLflow is not in its image."""
    record = {"name": "words", "experiment": "e", "tags": {"team": "tests"}, "recipe": RECIPE}
    for name in (events.RUN_VARIABLE, "MLFLOW_RUN_ID", pod.ANY_CODE_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MODELMILL_HOME", str(tmp_path / "home"))
    monkeypatch.setenv(events.RUN_ID_VARIABLE, RUN)
    monkeypatch.setenv(pod.ANNOUNCEMENT_VARIABLE, pod.announcement(record))
    monkeypatch.setitem(sys.modules, "mlflow", None)  # type: ignore[arg-type]
    return Home.current()


def spool(pod_home: Home, name: str = "_run") -> list[dict[str, object]]:
    return [record for _, record in read_lines(pod_home.runs / RUN / "spool" / f"{name}.jsonl")]


def test_pods_that_start_together_announce_one_run(pod_home: Home) -> None:
    ready = threading.Barrier(8)

    def enter() -> None:
        ready.wait()
        pod._enter()

    threads = [threading.Thread(target=enter) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    os.environ.pop(events.RUN_VARIABLE, None)
    kinds = [record["type"] for record in spool(pod_home)]
    assert kinds == ["start", "params", "tags", "artifact"]
    start, params, tags, artifact = spool(pod_home)
    assert (start["run_id"], start["name"], start["experiment"]) == (RUN, "words 0f1e2d3c", "e")
    assert params["values"] == {"count": {"steps": 3}}
    assert tags["values"] == {"team": "tests", "modelmill.kfp_run_id": RUN}
    assert "steps: 3" in Path(str(artifact["path"])).read_text()


def test_a_run_that_kfp_retries_starts_again_without_saying_everything_twice(pod_home: Home) -> None:
    pod.close_run("FAILED")
    with pod.entered("count", {}):
        tracking.record("end", status="FINISHED", spool="count")
    pod.close_run("SUCCEEDED")
    kinds = [
        (record["type"], record.get("status")) for record in spool(pod_home) if record["type"] in ("start", "end")
    ]
    assert kinds == [("start", None), ("end", "FAILED"), ("start", None), ("end", "FINISHED")]
    assert [record["type"] for record in spool(pod_home)].count("params") == 1


def test_outside_a_pod_and_inside_a_run_nothing_changes(
    pod_home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(events.RUN_VARIABLE, str(tmp_path))
    with pod.entered("count", {}):
        assert not pod.active()
    monkeypatch.delenv(events.RUN_VARIABLE)
    monkeypatch.delenv(events.RUN_ID_VARIABLE)
    with pod.entered("count", {}):
        assert not pod.active()
        pod.check_code("modelmill.components.core.step", "0" * 16)
    assert not pod_home.runs.exists()


def test_the_code_of_the_image_is_compared(pod_home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    module = "modelmill.components.core.step"
    with pod.entered("count", {}):
        pod.check_code(module, pod.source_digest(module))
        with pytest.raises(UserError, match=r"the image holds other code of modelmill\.components\.core\.step"):
            pod.check_code(module, "0" * 16)
        monkeypatch.setenv(pod.ANY_CODE_VARIABLE, "1")
        pod.check_code(module, "0" * 16)
    assert events.run_directory() is None


def test_a_home_that_cannot_be_written_is_one_line(
    pod_home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MODELMILL_HOME", str(tmp_path / "file" / "home"))
    with pytest.raises(SystemExit) as ended, pod.entered("count", {}):
        pass
    assert ended.value.code == 2
    assert capfd.readouterr().err.count("\n") == 1
    assert events.run_directory() is None


def test_what_a_step_writes_is_in_the_home_and_in_the_pods_own_log(pod_home: Home, tmp_path: Path) -> None:
    script = (
        "import json, sys\n"
        "from modelmill.components.core.step import run_step, section\n"
        "from tests.pipelines.sample import steps\n"
        "text = section('write_words', steps.WordsConfig(), steps.write_words, elsewhere=True)\n"
        "def write_words(config: steps.WordsConfig, output):\n"
        "    print('on stdout', flush=True); print('on stderr', file=sys.stderr)\n"
        "    return steps.write_words(config, output)\n"
        "run_step(write_words, text, {}, {'manifest': sys.argv[1]})\n"
    )
    environment = {**os.environ, pod.ANY_CODE_VARIABLE: "1", "MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}
    command = [sys.executable, "-c", script, str(tmp_path / "manifest")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr  # although MLflow is away
    log = (pod_home.runs / RUN / "logs" / "write_words.log").read_text()
    for words in ("on stdout", "on stderr"):
        assert words in log
        assert words in done.stdout
    assert json.loads((tmp_path / "manifest").read_text())["kind"] == "words"
    assert [record["type"] for record in spool(pod_home, "write_words")] == ["start", "params", "end"]


def test_below_runs_that_something_else_opened_each_step_delivers_its_own(
    store_home: Home, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """KFP's MLflow plugin opens a run for every task, and all pods share the spools."""
    run, client = make_run(store_home), client_of(store_home)
    run.begin()
    experiment = client.create_experiment("plugin")
    outer = {}
    for step in ("train", "judge"):
        outer[step] = client.create_run(experiment, run_name=f"task {step}").info.run_id
        for name in (step, f"{step}.trial"):
            run.record(name, "start", run=run.run_id)
            run.record(name, "metrics", values={"loss": 1.0}, step=1)
            run.record(name, "end", status="FINISHED")
        monkeypatch.setenv("MLFLOW_RUN_ID", outer[step])
        report = deliver(run.path, only=step)
        assert report.complete, report.warnings
        assert deliver(run.path, only=step).records == 0
    found = {each.data.tags.get("modelmill.step"): each for each in client.search_runs([experiment])}
    assert found.keys() == {None, "train", "judge", "train.trial", "judge.trial"}
    for step, parent in outer.items():
        assert found[step].data.tags["mlflow.parentRunId"] == parent
        assert found[f"{step}.trial"].data.tags["mlflow.parentRunId"] == found[step].info.run_id
        assert client.get_run(parent).info.status == "RUNNING", "whoever opened it closes it"
