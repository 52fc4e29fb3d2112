"""Resuming: only what did not finish runs again, and nothing lies about the code that made it."""

from __future__ import annotations

from pathlib import Path

import pytest

from modelmill.components.core.errors import UserError
from modelmill.components.core.home import Home
from modelmill.pipelines.launch.runs import Run
from tests.pipelines.conftest import resume, run, states


def test_resume_runs_from_the_failed_step_and_repeats_no_side_effect(tmp_path: Path) -> None:
    flag, ledger = tmp_path / "flag", tmp_path / "ledger"
    flag.touch()
    failed = run(announce__ledger=ledger, archive__fail_while=flag)
    assert failed.exit_code == 1
    assert ledger.read_text() == "19\n"
    still = resume(failed.run)
    assert still.exit_code == 1
    flag.unlink()
    done = resume(still.run)
    assert (done.state, done.exit_code) == ("succeeded", 0)
    assert states(done) == {
        "write_words": "reused",
        "count_words": "reused",
        "announce": "reused",
        "archive": "finished",
    }
    assert ledger.read_text() == "19\n"
    assert done.run.record.resumed_from == still.run.id
    assert done.run.sections() == failed.run.sections()


def test_a_run_that_succeeded_is_refused() -> None:
    done = run()
    with pytest.raises(UserError, match="succeeded; there is nothing to resume"):
        resume(done.run)


def test_a_finished_step_whose_output_is_gone_runs_again(home: Home, tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    flag.touch()
    failed = run(archive__fail_while=flag)
    for path in (home.store / "count_words").glob("*/data/*"):
        path.unlink()
    flag.unlink()
    done = resume(failed.run)
    assert done.exit_code == 0
    assert states(done)["count_words"] == "finished"


def test_only_unfinished_steps_take_on_new_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A user mends the step that failed and resumes: its result must carry the new code, the others stay."""
    from modelmill.components.core import step as core_step

    flag = tmp_path / "flag"
    flag.touch()
    failed = run(archive__fail_while=flag)
    flag.unlink()
    monkeypatch.setattr(core_step, "code_digest", lambda module: "0123456789abcdef")
    done = resume(failed.run)
    assert done.exit_code == 0
    assert states(done) == {
        "write_words": "reused",
        "count_words": "reused",
        "announce": "reused",
        "archive": "finished",
    }
    old, new = failed.run.sections(), done.run.sections()
    assert old["count_words"] == new["count_words"]
    assert "0123456789abcdef" in new["archive"]


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    folder.mkdir()
    (folder / "run.json").write_text('{"run_id": 1}')
    with pytest.raises(UserError, match=r"no readable run\.json"):
        Run.open(folder)
