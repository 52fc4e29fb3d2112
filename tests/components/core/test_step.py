"""Running a step: publication, reuse, resumption, failures, races, and what a run gets to see of it."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from modelmill.components.core import events, tracking
from modelmill.components.core.errors import UserError
from modelmill.components.core.events import read_lines
from modelmill.components.core.home import Home
from modelmill.components.core.manifest import Manifest
from modelmill.components.core.recipe import Section
from modelmill.components.core.step import (
    FINISHED_VARIABLE,
    StepResult,
    finished_manifest,
    output_key,
    run_step,
    section,
    step_options,
)
from tests.components.conftest import RunFolder

CALLS: list[str] = []


class Config(Section):
    """A step's section."""

    text: str = "hello"
    fail: str = ""


def write(config: Config, output: Path, **upstream: Manifest) -> StepResult:
    """A step: writes its text, its inputs and scratch, and fails when told to."""
    CALLS.append(config.text)
    (output / "deep").mkdir(exist_ok=True)
    (output / "text.txt").write_text(config.text)
    (output / "deep" / "inputs.json").write_text(json.dumps({name: each.digest for name, each in upstream.items()}))
    (output.parent / "checkpoints").mkdir(exist_ok=True)
    (output.parent / "checkpoints" / "1").write_text("scratch")
    (output.parent / "note").write_text("scratch")
    tracking.log_params({"letters": len(config.text)})
    tracking.log_metrics({"loss": 1.0}, step=len(CALLS))
    tracking.log_artifact(output / "text.txt")
    print("said on stdout")
    os.system("echo said by a child")
    if config.fail == "user":
        raise UserError("text: cannot be written; write another")
    if config.fail == "crash":
        raise RuntimeError("a bug")
    if config.fail == "disk":
        raise OSError(28, "No space left on device", str(output / "text.txt"))
    return StepResult("text", counts={"letters": len(config.text)}, metrics={"loss": 1.0}, metadata={"upper": False})


@step_options(reuse=False)
def register(config: Config, output: Path) -> StepResult:
    """A step with a side effect."""
    return write(config, output)


@step_options(resumable=True)
def train(config: Config, output: Path) -> StepResult:
    """A step with a checkpoint: fails the first time, goes on the second."""
    checkpoint = output.parent / "checkpoint"
    before = checkpoint.read_text() if checkpoint.exists() else ""
    checkpoint.write_text(before + "x")
    if not before:
        raise RuntimeError("killed")
    (output / "result").write_text(checkpoint.read_text())
    return StepResult("model")


@pytest.fixture(autouse=True)
def _fresh() -> None:
    CALLS.clear()


def run(function: Any, config: Config | None = None, inputs: dict[str, str] | None = None, **outputs: str) -> Manifest:
    name = function.__name__
    return run_step(function, section(name, config or Config(), function), inputs or {}, outputs)


def kinds(folder: RunFolder) -> list[str]:
    return [record["event"] for _, record in read_lines(folder.path / "events.jsonl")]


def test_a_step_publishes_its_files_and_drops_its_scratch(home: Home, tmp_path: Path) -> None:
    targets = {"manifest": str(tmp_path / "kfp" / "manifest"), "text.txt": str(tmp_path / "kfp" / "out" / "text")}
    manifest = run(write, **targets)
    folder = Path(manifest.uri)
    assert folder == home.store / "write" / manifest.key / "data"
    assert [entry.path for entry in manifest.files] == ["deep/inputs.json", "text.txt"]
    assert (manifest.kind, manifest.counts, manifest.step) == ("text", {"letters": 5}, "write")
    assert Manifest.read(targets["manifest"]) == manifest == Manifest.read(folder.parent / "manifest.json")
    assert Path(targets["text.txt"]).read_text() == "hello"
    assert sorted(path.name for path in folder.parent.iterdir()) == ["data", "manifest.json"]
    assert sorted(path.name for path in folder.parent.parent.iterdir()) == [manifest.key, f"{manifest.key}.lock"]


def test_equal_work_is_done_once(home: Home) -> None:
    first = run(write)
    assert run(write) == first
    assert CALLS == ["hello"]
    other = run(write, Config(text="other"))
    assert other.key != first.key
    run(register)
    run(register)
    assert CALLS == ["hello", "other", "hello", "hello"]


def test_the_key_is_made_of_everything_that_decides_the_output(home: Home, tmp_path: Path) -> None:
    base = section("write", Config(), write)
    assert base == section("write", Config(), f"{write.__module__}:write"), "a caller need not import the step"
    keys = {
        output_key(base, {}),
        output_key(base, {"corpus": "a"}),
        output_key(base, {"corpus": "b"}),
        output_key(base, {"tokens": "a"}),
        output_key(section("write", Config(text="x"), write), {}),
        output_key(section("again", Config(), write), {}),
        output_key(section("write", Config(), write, fingerprint="mtime"), {}),
        output_key(section("write", Config(), "modelmill.components.core.step:run_step"), {}),
    }
    assert len(keys) == 8
    upstream = run(write)
    upstream.write(tmp_path / "m.json")
    chained = run(write, Config(text="second"), {"corpus": str(tmp_path / "m.json")})
    inputs = json.loads(chained.path("deep/inputs.json").read_text())
    assert inputs == {"corpus": upstream.digest}


@pytest.mark.parametrize("damage", ["missing file", "short file", "no folder", "broken manifest"])
def test_a_damaged_output_is_made_again(home: Home, damage: str) -> None:
    manifest = run(write)
    folder = Path(manifest.uri)
    if damage == "missing file":
        (folder / "text.txt").unlink()
    elif damage == "short file":
        (folder / "text.txt").write_text("hell")
    elif damage == "no folder":
        folder.rename(folder.with_name("gone"))
    else:
        (folder.parent / "manifest.json").write_text('{"kind":')
    assert finished_manifest(home.store, "write", manifest.key) is None
    again = run(write)
    assert (again.key, again.digest) == (manifest.key, manifest.digest)
    assert again.path("text.txt").read_text() == "hello"
    assert len(CALLS) == 2


def component(home: Home | Path, function: Any, config: Config, folder: RunFolder | None = None) -> Any:
    """Run a step in a process of its own, as a component does."""
    code = (
        "import sys\nfrom tests.components.core import test_step as steps\n"
        "from modelmill.components.core.step import run_step\n"
        "run_step(getattr(steps, sys.argv[1]), sys.argv[2], {}, {})\n"
    )
    root = home.root if isinstance(home, Home) else home
    environment = {**os.environ, "MODELMILL_HOME": str(root)}
    environment.pop(events.RUN_VARIABLE, None)
    if folder is not None:
        environment[events.RUN_VARIABLE] = str(folder.path)
    # The test module's name as the step's module, so that the section is the one `run` makes here.
    command = [sys.executable, "-c", code, function.__name__, section(function.__name__, config, function)]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(("fail", "code"), [("user", 2), ("crash", 1), ("disk", 2)])
def test_a_failed_step_leaves_nothing_and_says_why(home: Home, make_run: Any, fail: str, code: int) -> None:
    folder: RunFolder = make_run(home)
    done = component(home, write, Config(fail=fail), folder)
    assert done.returncode == code
    assert done.stdout == done.stderr == "", "the step's words are in its log"
    assert [path.suffix for path in (home.store / "write").iterdir()] == [".lock"]
    *_, (_, event) = read_lines(folder.path / "events.jsonl")
    assert (event["event"], event["kind"]) == ("failed", "crash" if fail == "crash" else "user")
    log = (folder.path / "logs" / "write.log").read_text()
    assert ("Traceback" in log) == (fail == "crash")
    assert event["message"] in log
    assert "\n" not in event["message"]
    if fail == "disk":
        assert "the disk is full" in event["message"]
        assert "MODELMILL_HOME" in event["message"]
    *_, (_, end) = read_lines(folder.path / "spool" / "write.jsonl")
    assert (end["type"], end["status"]) == ("end", "FAILED")


def test_a_run_sees_events_log_and_spool(home: Home, make_run: Any) -> None:
    folder: RunFolder = make_run(home, "run-a")
    assert component(home, write, Config(), folder).returncode == 0
    assert kinds(folder) == ["started", "finished"]
    *_, (_, finished) = read_lines(folder.path / "events.jsonl")
    assert (finished["counts"], finished["metrics"]) == ({"letters": 5}, {"loss": 1.0})
    assert (Path(finished["uri"]) / "text.txt").read_text() == "hello"
    log = (folder.path / "logs" / "write.log").read_text()
    assert "said on stdout" in log
    assert "said by a child" in log
    spool = [record for _, record in read_lines(folder.path / "spool" / "write.jsonl")]
    assert [record["type"] for record in spool] == ["start", "params", "params", "metrics", "artifact", "end"]
    assert spool[1]["values"] == {"text": "hello", "fail": ""}


def test_a_process_gets_its_output_back(home: Home, make_run: Any, capfd: pytest.CaptureFixture[str]) -> None:
    folder: RunFolder = make_run(home)
    folder.enter()
    run(write)
    os.system("echo back")
    assert capfd.readouterr().out.endswith("back\n")
    assert "back" not in (folder.path / "logs" / "write.log").read_text()


def test_a_reused_step_shows_its_points_and_where_they_are_from(home: Home, make_run: Any) -> None:
    first: RunFolder = make_run(home, "run-a")
    first.enter()
    manifest = run(write)
    second: RunFolder = make_run(home, "run-b")
    second.enter()
    assert run(write) == manifest
    assert kinds(second) == ["started", "reused"]
    original = {record["type"]: record for _, record in read_lines(first.path / "spool" / "write.jsonl")}
    replayed = {record["type"]: record for _, record in read_lines(second.path / "spool" / "write.jsonl")}
    assert replayed["metrics"] == original["metrics"], "also the time"
    assert replayed["params"] == original["params"], "also those the step worked out"
    assert Path(replayed["artifact"]["path"]).read_text() == "hello", "where the file is now"
    assert replayed["tags"]["values"] == {
        "modelmill.reused": "true",
        "modelmill.reused_from": "run-a",
        "modelmill.key": manifest.key,
    }
    assert replayed["end"]["status"] == "FINISHED"


def test_a_resumable_step_goes_on_from_its_checkpoint(home: Home, make_run: Any) -> None:
    folder: RunFolder = make_run(home)
    folder.enter()
    with pytest.raises(SystemExit):
        run(train)
    manifest = run(train)
    assert manifest.path("result").read_text() == "xx"
    assert sorted(path.name for path in Path(manifest.uri).parent.iterdir()) == [
        "data",
        "manifest.json",
        "tracking.jsonl",
    ]
    assert kinds(folder) == ["started", "failed", "started", "finished"]


@pytest.mark.parametrize("finished", ["register", "register-1", "fetch,register-1"])
def test_a_resumed_task_of_a_loop_repeats_no_side_effect(
    home: Home, monkeypatch: pytest.MonkeyPatch, finished: str
) -> None:
    text = section("register", Config(), register)
    made = run_step(register, text, {}, {}, number=1)
    monkeypatch.setenv(FINISHED_VARIABLE, finished)
    assert run_step(register, text, {}, {}, number=1) == made
    assert len(CALLS) == 1
    run_step(register, section("register", Config(text="other"), register), {}, {}, number=2)
    assert len(CALLS) == 2


def compete(home: Path, folder: Path) -> None:
    os.environ.update({"MODELMILL_HOME": str(home), events.RUN_VARIABLE: str(folder)})
    run_step(slow, section("slow", Config(), slow), {}, {})


def slow(config: Config, output: Path) -> StepResult:
    """A step that leaves a trace of every time it ran."""
    with (output.parent.parent.parent / "ran").open("a") as file:
        file.write("x")
    time.sleep(0.5)
    (output / "x").write_text("x")
    return StepResult("text")


def test_two_runs_that_want_the_same_output_take_turns(home: Home, make_run: Any) -> None:
    folders = [make_run(home, name).path for name in ("run-a", "run-b")]
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=compete, args=(home.root, folder)) for folder in folders]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert (home.store / "ran").read_text() == "x", "it ran once"
    last = sorted([record for _, record in read_lines(folder / "events.jsonl")][-1]["event"] for folder in folders)
    assert last == ["finished", "reused"]


def test_a_missing_input_is_one_line(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as failure:
        run(write, inputs={"corpus": "/nowhere/manifest.json"})
    assert failure.value.code == 2
    assert "manifest: /nowhere/manifest.json does not exist" in capsys.readouterr().err
    assert CALLS == []


def test_a_home_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    """Root may write to a read-only folder, so a file where a folder should be stands in."""
    (tmp_path / "home").write_text("not a folder")
    done = component(tmp_path / "home" / "sub", write, Config())
    assert done.returncode == 2, done.stderr
    assert "MODELMILL_HOME: cannot write" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("limit", [0, 100, 700])
def test_a_disk_that_fills_up_at_any_time_is_one_line(home: Home, make_run: Any, limit: int) -> None:
    """No file may grow beyond the limit: the records of the run, the output, its manifest."""
    folder: RunFolder = make_run(home)
    code = (
        "import resource, signal, sys\n"
        "from tests.components.core import test_step as steps\n"
        "from modelmill.components.core.step import run_step, section\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "payload = section('write', steps.Config(text='x' * 600), steps.write)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)\n"
        "try:\n    run_step(steps.write, payload, {}, {})\n"
        "except SystemExit as failure:\n    sys.exit(failure.code)\n"
    )
    environment = {**os.environ, events.RUN_VARIABLE: str(folder.path)}
    done = subprocess.run([sys.executable, "-c", code, str(limit)], env=environment, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    log = folder.path / "logs" / "write.log"
    said = done.stderr + (log.read_text() if log.exists() else "")
    assert "MODELMILL_HOME: cannot write" in said, "a full disk cannot hide why"
    assert "Traceback" not in said
    assert [path.suffix for path in (home.store / "write").glob("*")] in ([], [".lock"])
