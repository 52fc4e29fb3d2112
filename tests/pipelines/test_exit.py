"""A branch that is not taken, and a last step that runs however the others ended."""

from __future__ import annotations

import json
from pathlib import Path

from modelmill.components.core.home import Home
from modelmill.pipelines import catalog
from modelmill.pipelines.launch.local import RunResult, resume_local, run_local
from tests.pipelines.conftest import modelmill, states


def run(**settings: object) -> RunResult:
    overrides = [f"{key.replace('__', '.')}={value}" for key, value in settings.items()]
    return run_local(catalog.load("guarded", overrides), reference="guarded", grace=1.0, deliver=False)


def reported(home: Home) -> list[str]:
    """States that the last step was told, in the order of the runs."""
    paths = sorted(home.store.glob("report/*/data/status.json"), key=lambda path: path.stat().st_mtime)
    return [json.loads(path.read_text())["state"] for path in paths]


def test_the_branch_is_taken(home: Home) -> None:
    result = run()
    assert result.state == "succeeded"
    assert set(states(result).values()) == {"finished"}
    assert reported(home) == ["SUCCEEDED"]


def test_a_branch_that_is_not_taken_is_no_failure(home: Home) -> None:
    done = modelmill("run", "guarded", "--set", "many.at_least=100")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "count_words  skipped" in done.stdout
    assert reported(home) == ["SUCCEEDED"]


def test_a_failure_is_reported_and_stays_one(home: Home, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.touch()
    result = run(count__fail_while=broken)
    assert result.state == "failed"
    assert "count_words" in result.message
    assert states(result) == {
        "write_words": "finished",
        "is_long": "finished",
        "count_words": "failed",
        "report": "finished",
    }
    assert reported(home) == ["FAILED"]
    broken.unlink()
    again = resume_local(result.run, grace=1.0, deliver=False)
    assert again.state == "succeeded"
    assert reported(home) == ["FAILED", "SUCCEEDED"]
