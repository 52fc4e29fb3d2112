"""The command as people and programs use it: help, lists, plans, compiled files, mistakes."""

from __future__ import annotations

import json
import os
import resource
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import yaml

from modelmill.components.core.home import Home
from modelmill.pipelines import plan
from modelmill.pipelines.cli import cli
from modelmill.pipelines.commands.console import number
from modelmill.pipelines.commands.launching import headline
from modelmill.pipelines.launch.runs import all_runs
from modelmill.pipelines.launch.watch import RunView, StepView, duration
from tests.pipelines.conftest import COMMAND, modelmill, recipe, run, wait_for
from tests.pipelines.sample.catalog import CATALOG


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    """The error a user sees: exactly one line, exit code 2, nothing else."""
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["rnu"], "no command is called 'rnu'; did you mean run"),
        (["run"], "Missing argument 'RECIPE'"),
        (["run", "word"], "no recipe is called 'word'; did you mean words?"),
        (["run", "words", "--freshh"], "No such option '--freshh'"),
        (["run", "words", "--set", "count.behavior=crash"], "did you mean behaviour"),
        (["run", "words", "--set", "count"], "'count' is not key=value"),
        (["run", "missing.yaml"], "missing.yaml does not exist"),
        (["run", "words", "--grace", "-1"], "--grace"),
        (["resume", "latest"], "there is no run"),
        (["logs", "latest"], "there is no run"),
        (["compile", "-o", "x"], "name one recipe, or give --all"),
        (["compile", "words", "--all", "-o", "x"], "name one recipe, or give --all"),
        (["plan", "words", "--price-per-hour", "much"], "--price-per-hour"),
        (["ui", "--port", "0"], "--port"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments: list[str], words: str, home: Home) -> None:
    assert words in one_line(modelmill(*arguments))
    assert not home.root.exists(), "a mistake leaves nothing behind"


def test_a_catalog_that_cannot_be_imported_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELMILL_CATALOG", "tests.nowhere:CATALOG")
    assert "MODELMILL_CATALOG: cannot import" in one_line(modelmill("list"))


def test_every_command_shows_examples() -> None:
    for name, command in cli.commands.items():
        assert f"modelmill {name}" in (command.epilog or ""), name
    shown = modelmill("--help").stdout.partition("Commands:")[2].partition("Examples:")[0].splitlines()
    listed = {line.split()[0] for line in shown if line.strip()}
    reading = {"list", "plan", "runs", "logs", "report", "fetch", "schedules", "models", "ui", "doctor"}
    assert listed == reading | {"run", "resume", "cancel", "prune", "schedule", "rollback", "compile"}


def test_help_and_the_reading_commands_import_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['modelmill', sys.argv[1]]\n"
        "from modelmill.pipelines.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "loaded = {name.split('.')[0] for name in sys.modules}\n"
        "print(sorted(loaded & {'torch', 'kfp', 'mlflow', 'transformers', 'pyarrow'}), file=sys.stderr)\n"
    )
    for argument in ("--help", "runs", "list"):
        done = subprocess.run([sys.executable, "-c", code, argument], capture_output=True, text=True)
        assert done.stderr.splitlines()[-1] == "[]", argument


def test_help_is_quick() -> None:
    """0.3 s is promised on an idle machine; processor time leaves out what else runs here."""

    def spent() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        before = usage.ru_utime + usage.ru_stime
        modelmill("--help")
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime - before

    assert min(spent() for _ in range(5)) < 0.3


def test_list_names_pipelines_recipes_and_steps() -> None:
    found = json.loads(modelmill("list", "--json").stdout)
    assert [each["name"] for each in found["pipelines"]] == list(CATALOG.pipelines)
    assert [each["name"] for each in found["recipes"]] == sorted(path.stem for path in CATALOG.recipes.glob("*.yaml"))
    steps = {each["name"]: each for each in found["steps"]}
    assert steps["write_words"]["description"] == "Write the words to a file."
    assert {name for name, step in steps.items() if not step["reuse"]} == {"announce", "draw_number", "report"}
    assert "Count the letters of four words." in modelmill("list").stdout


def test_a_broken_recipe_is_listed_as_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bad.yaml").write_text("pipeline: sample\nname: bad\nwords: {txt: x}\n")
    (tmp_path / "own_catalog.py").write_text(
        "from pathlib import Path\nfrom dataclasses import replace\n"
        "from tests.pipelines.sample.catalog import CATALOG\n"
        f"OWN = replace(CATALOG, recipes=Path({str(tmp_path)!r}))\n"
    )
    monkeypatch.setenv("MODELMILL_CATALOG", "own_catalog:OWN")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ["PYTHONPATH"]]))
    done = modelmill("list")
    assert done.returncode == 0
    assert "broken: words.txt: no such parameter" in done.stdout


def test_plan_predicts_what_the_run_then_reuses_and_touches_nothing(home: Home) -> None:
    planned = json.loads(modelmill("plan", "words", "--json").stdout)
    assert [step["action"] for step in planned["steps"]] == ["run", "run", "always", "run"]
    assert not home.root.exists()
    run()
    steps = plan.trace(recipe(), home.store)
    assert [step.action for step in steps] == ["reuse", "reuse", "always", "run"]
    again = plan.trace(recipe(words__text="other"), home.store)
    assert [step.action for step in again] == ["run", "run", "always", "run"]


def test_plan_of_a_training_recipe_states_its_assumptions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MODELMILL_CATALOG")
    asked = ["plan", "trainium/llama2-7b", "--mfu", "0.5", "--price-per-hour", "2", "--json"]
    training = json.loads(modelmill(*asked).stdout)["training"]
    assert training["layout"]["data"] == 512
    assert training["tokens_per_step"] == 1024 * 4096
    assert training["parameters"] == 6_738_415_616  # Llama 2 7B
    assert training["seconds"] == pytest.approx(training["flops"] / (4096 * 95e12 * 0.5))
    assert training["cost"] == pytest.approx(training["seconds"] / 3600 * 128 * 2)
    assert any("50%" in sentence for sentence in training["assumptions"])
    assert json.loads(modelmill(*asked[:2], "--json").stdout)["training"]["cost"] is None
    assert "did you mean h100" in one_line(modelmill("plan", "gpu/llama3-8b", "--device", "h10"))


def test_compile_writes_kfp_yaml_with_the_sections_as_defaults(tmp_path: Path) -> None:
    from kfp import components

    done = modelmill("compile", "words", "-o", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    target = tmp_path / "out" / "words.yaml"
    assert [path.name for path in target.parent.iterdir()] == ["words.yaml"]
    document = next(yaml.safe_load_all(target.read_text()))
    defaults = {
        name: each["defaultValue"] for name, each in document["root"]["inputDefinitions"]["parameters"].items()
    }
    assert defaults == plan.sections(recipe())
    assert components.load_component_from_file(str(target)).name == "sample"


def test_compile_all_refuses_a_bad_pipeline_before_it_writes_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "is a file; give a folder" in one_line(modelmill("compile", "words", "-o", str(tmp_path / "file")))


@pytest.mark.slow
def test_every_shipped_recipe_compiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MODELMILL_CATALOG")
    done = modelmill("compile", "--all", "-o", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "laptop-llama-demo.yaml" in {path.name for path in tmp_path.iterdir()}


def test_runs_and_logs_read_what_happened() -> None:
    run()
    failed = run(count__behaviour="crash")
    newest, oldest = json.loads(modelmill("runs", "--json").stdout)
    assert (newest["state"], newest["exit_code"]) == ("failed", 1)
    assert (oldest["state"], oldest["metric"], oldest["value"]) == ("succeeded", "count_words.loss", 4.75)
    table = modelmill("runs", "-n", "1").stdout
    assert "RuntimeError: something broke" in table
    log = modelmill("logs", "latest", "count_words").stdout
    assert "RuntimeError: something broke" in log
    assert "==> write_words <==" in modelmill("logs", failed.run.id).stdout
    assert "Executing task" in modelmill("logs", "latest", "driver").stdout
    wrong = modelmill("logs", "latest", "cuont_words")
    assert "has no step 'cuont_words'; did you mean count_words" in one_line(wrong)


def test_logs_follow_a_run_to_its_end(tmp_path: Path) -> None:
    settings = ["--set", "count.behaviour=sleep", "--set", f"count.scratch={tmp_path}", "--grace", "0"]
    command = [*COMMAND, "run", "words", *settings]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(lambda: (tmp_path / "pids").exists())
    follower = subprocess.Popen([*COMMAND, "logs", "latest", "-f"], stdout=subprocess.PIPE, text=True)
    assert follower.stdout is not None
    assert "==> " in follower.stdout.readline()
    assert follower.poll() is None
    process.terminate()
    out = follower.stdout.read()
    assert follower.wait(30) == 0
    assert "counting on standard output" in out
    assert process.wait(30) == 143


def test_a_reader_that_goes_away_is_no_error() -> None:
    for arguments in ("list", "runs", "logs latest driver", "doctor"):
        run(count__behaviour="crash") if arguments == "runs" else None
        command = f"{' '.join(COMMAND)} {arguments} | true"
        done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, ""), arguments


def test_a_run_goes_on_when_its_reader_goes_away(home: Home) -> None:
    command = f"{' '.join(COMMAND)} run words | true"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert all_runs(home)[-1].state == "succeeded"


@pytest.mark.slow
def test_ui_names_an_occupied_port_and_serves_the_store(monkeypatch: pytest.MonkeyPatch, shared_store: str) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert "nothing to show" in one_line(modelmill("ui", "--no-browser"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", shared_store)
    run()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"--port: {port}: Address already in use" in one_line(modelmill("ui", "--port", str(port)))
    process = subprocess.Popen(
        [*COMMAND, "ui", "--no-browser", "--port", str(port)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert "delivered" in process.stdout.readline()
        assert f"http://127.0.0.1:{port}" in process.stdout.readline()
        deadline, answer = time.monotonic() + 60, b""
        while not answer and time.monotonic() < deadline:
            try:
                answer = urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).read()
            except OSError:
                time.sleep(0.2)
        assert answer == b"OK"
    finally:
        process.terminate()
        process.wait(20)


def test_doctor_sees_what_is_wrong(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = run(count__behaviour="crash")
    record = failed.run.record
    record.state, record.exit_code, record.ended = "running", None, None
    failed.run.save()  # as a power cut leaves it
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    done = modelmill("doctor", "--json")
    found = {each["subject"]: each for each in json.loads(done.stdout)}
    assert done.returncode == 1
    assert found["tracking"]["level"] == "fail"
    assert "127.0.0.1:9" in found["tracking"]["text"]
    assert found["runs"]["level"] == "warn"
    assert failed.run.id in found["runs"]["fix"]
    assert found["spools"]["level"] == "warn"
    assert found["torch"]["level"] == "ok"
    assert {each["level"] for name, each in found.items() if name in ("python", "disk")} == {"ok"}


def test_doctor_passes_on_a_fresh_machine(monkeypatch: pytest.MonkeyPatch, home: Home) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    done = modelmill("doctor")
    assert done.returncode == 0, done.stdout
    assert not home.root.exists()


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, ""), (0.04, "0.0 s"), (9.96, "10 s"), (59.7, "1 min 00 s"), (7264, "2 h 01 min")]
)
def test_durations_are_short(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"), [(3.81249, "3.812"), (0.0003, "0.0003"), (12, "12"), (38468.2, "38.47 k"), (1.2e23, "120 Z")]
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert number(value) == text


def test_a_retried_step_starts_over_in_the_view(tmp_path: Path) -> None:
    events = [
        {"time": 1.0, "step": "a", "event": "started"},
        {"time": 2.0, "step": "a", "event": "failed", "kind": "crash", "message": "no"},
        {"time": 3.0, "step": "a", "event": "started"},
        {"time": 5.0, "step": "a", "event": "finished", "metrics": {"loss": 1.0}},
    ]
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    view = RunView(tmp_path, ["a", "b"])
    view.refresh()
    assert (view.steps["a"].state, view.steps["a"].seconds) == ("finished", 2.0)
    assert view.steps["b"] == StepView("b")
    assert not view.complete


def test_the_headline_puts_baselines_beside_what_they_judge(tmp_path: Path) -> None:
    metrics = {"loss": 3.0, "bigram_loss": 4.0, "seconds": 2.0, "validation_loss": 3.1}
    view = RunView(tmp_path, ["a"])
    view.steps["a"].metrics = metrics
    assert headline(view, ["a.seconds", "a.bigram_loss", "a.loss"]) == [
        ("a.seconds", "2"),
        ("a.loss", "3  (bigram 4)"),
    ]
    assert headline(view, []) == [("a.loss", "3  (bigram 4, validation 3.1)"), ("a.seconds", "2")]
