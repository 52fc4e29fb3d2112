"""What a retraining reports, however it ended."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from modelmill.components.core.errors import UserError
from modelmill.components.registry import outcome
from modelmill.components.registry.outcome import report_outcome
from modelmill.components.registry.retrain_config import OutcomeConfig

SUCCEEDED, BROKEN = (
    {"state": "SUCCEEDED", "error": ""},
    {"state": "FAILED", "error": "finetune: out of | memory\nagain"},
)


def reported(folder: Path, status: dict[str, str]) -> dict[str, str]:
    folder.mkdir()
    result = report_outcome(OutcomeConfig(name="docs"), folder, status=status)
    record = json.loads((folder / "outcome.json").read_text())
    assert record["outcome"] == result.metadata["outcome"]
    return record


@pytest.mark.parametrize(
    ("found", "status", "expected"),
    [
        ({"champion": "2"}, SUCCEEDED, "unchanged"),
        ({"champion": ""}, SUCCEEDED, "unchanged"),
        ({"champion": "3", "version": "3", "outcome": "promoted", "reason": "better"}, SUCCEEDED, "promoted"),
        ({"champion": "2", "version": "3", "outcome": "kept", "reason": "worse"}, SUCCEEDED, "kept"),
        ({"champion": "2", "version": "3", "outcome": "kept", "reason": "worse"}, BROKEN, "failed"),
    ],
)
def test_the_outcome_follows_registry_and_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found: dict[str, str], status: dict[str, str], expected: str
) -> None:
    monkeypatch.setattr(outcome, "_found", lambda name: found)
    record = reported(tmp_path / "out", status)
    assert record["outcome"] == expected
    assert record["champion"] == found["champion"]
    table = (tmp_path / "out" / "report.md").read_text()
    assert f"**{expected}**" in table
    assert status["error"].split("\n")[0].replace("|", "\\|") in table


def test_a_dead_registry_is_said_and_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def dead(name: str) -> dict[str, str]:
        raise UserError("MLFLOW_TRACKING_URI: the registry cannot be used")

    monkeypatch.setattr(outcome, "_found", dead)
    assert reported(tmp_path / "one", SUCCEEDED)["outcome"] == "unknown"
    record = reported(tmp_path / "two", BROKEN)
    assert record["outcome"] == "failed"
    assert "cannot be used" in record["registry"]


def test_a_model_that_is_not_registered_has_no_champion(tmp_path: Path, store_home: object) -> None:
    record = reported(tmp_path / "out", SUCCEEDED)
    assert record["outcome"] == "unchanged"
    assert record["champion"] == ""
