"""Tasks of a loop: each has a state, a log and tracking points of its own."""

from __future__ import annotations

from pathlib import Path

from modelmill.components.core.events import read_lines
from modelmill.components.core.home import Home
from modelmill.pipelines import catalog
from modelmill.pipelines.launch.local import RunResult, resume_local, run_local
from tests.pipelines.conftest import states

TASKS = ["draw_number-0", "draw_number-1", "draw_number-2"]


def run(*overrides: str) -> RunResult:
    return run_local(catalog.load("fanned", overrides), grace=1.0, deliver=False)


def test_every_task_of_a_loop_has_a_name_of_its_own(home: Home) -> None:
    result = run()
    assert result.state == "succeeded"
    assert states(result) == dict.fromkeys([*TASKS, "add_numbers"], "finished")
    assert result.run.record.steps == [*TASKS, "add_numbers"]
    assert result.view.complete
    assert [result.view.steps[name].metrics["number"] for name in TASKS] == [0, 1, 2]
    assert result.view.steps["add_numbers"].counts == {"sum": 3}
    for number, name in enumerate(TASKS):
        assert result.run.log_path(name).read_text() == f"task {number}\n"
        for spool, values in ((name, {"number": number}), (f"{name}.part", {"drawn": number})):
            records = [record for _, record in read_lines(result.run.folder / "spool" / f"{spool}.jsonl")]
            assert [record["values"] for record in records if record["type"] == "metrics"] == [values]
            assert records[-1]["type"] == "end"
    assert sorted(path.name for path in home.store.glob("[a-z]*")) == ["add_numbers", "draw_number"], "one step"


def test_the_task_that_failed_is_named_and_the_others_are_not_repeated(tmp_path: Path) -> None:
    flag, ledger = tmp_path / "flag", tmp_path / "ledger"
    flag.touch()
    failed = run(f"draw.fail_while={flag}", f"draw.ledger={ledger}")
    assert (failed.state, failed.exit_code) == ("failed", 2)
    assert states(failed) == dict.fromkeys(TASKS, "finished") | {"draw_number-1": "failed", "add_numbers": "waiting"}
    assert failed.message == "draw_number-1: draw.fail_while: it exists; remove it"
    flag.unlink()
    done = resume_local(failed.run, grace=1.0, deliver=False)
    assert done.state == "succeeded"
    assert states(done) == dict.fromkeys(TASKS, "reused") | {"draw_number-1": "finished", "add_numbers": "finished"}
    assert sorted(ledger.read_text().split()) == ["0", "1", "2"], "a side effect happens once"


def test_a_task_that_never_began_is_blamed() -> None:
    name = "draw_number-2"
    result = run("pipeline=fanned_unimportable")
    assert result.exit_code == 1
    assert states(result) == dict.fromkeys(TASKS, "finished") | {name: "failed", "add_numbers": "waiting"}
    assert "No module named 'tests.pipelines.sample.nowhere'" in result.view.steps[name].message
