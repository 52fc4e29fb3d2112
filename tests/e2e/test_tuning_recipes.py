"""The laptop recipes that tune, one after the other, on the demo's model; and the one that forecasts."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.command import last, modelmill, states

pytestmark = pytest.mark.slow


def test_the_tuned_demo_wins_its_gate_and_is_the_champion(demo_home: Path) -> None:
    done = modelmill(demo_home, "run", "laptop/lora-docs-qa")
    assert done.returncode == 0, done.stdout + done.stderr
    gate = last(demo_home, "gate")
    assert gate["metadata"]["outcome"] == "better"
    assert gate["metrics"]["gain_lower"] > 0
    assert gate["metrics"]["guard_other_text_bits_per_byte_gain"] > -0.3
    assert last(demo_home, "promote")["metadata"]["outcome"] == "promoted"


def test_nothing_new_is_no_reason_to_train(demo_home: Path) -> None:
    done = modelmill(demo_home, "run", "laptop/retrain-docs-qa")
    assert done.returncode == 0, done.stdout + done.stderr
    assert states(done.stdout)["finetune"] == "skipped"
    assert last(demo_home, "find_new_data")["counts"]["new"] == 0


def test_preferences_are_learnt(demo_home: Path) -> None:
    done = modelmill(demo_home, "run", "laptop/dpo-docs-qa")
    assert done.returncode == 0, done.stdout + done.stderr
    assert last(demo_home, "gate")["metadata"]["outcome"] == "better"


def test_pretraining_goes_on_where_there_is_new_text(demo_home: Path) -> None:
    done = modelmill(demo_home, "run", "laptop/llama-continue")
    assert done.returncode == 0, done.stdout + done.stderr
    assert last(demo_home, "gate")["metadata"]["outcome"] == "better"
    assert last(demo_home, "report_outcome")["metadata"]["outcome"] == "promoted"


def test_the_tuned_chronos_beats_the_untuned_one_and_is_watched(tmp_path: Path) -> None:
    done = modelmill(tmp_path, "run", "laptop/chronos-demo")
    assert done.returncode == 0, done.stdout + done.stderr
    tuned, base = (last(tmp_path, f"backtest_{side}") for side in ("tuned", "base"))
    assert tuned["metrics"]["sql"] < base["metrics"]["sql"]
    # Five series that its model never saw are a reason to retrain it, whatever the gate then says.
    again = modelmill(tmp_path, "run", "laptop/reforecast-demo")
    assert again.returncode == 0, again.stdout + again.stderr
    assert states(again.stdout)["tune"] == "finished"
    assert last(tmp_path, "detect_drift")["counts"]["new"] == 5
    assert last(tmp_path, "report_outcome")["metadata"]["outcome"] in ("promoted", "challenger", "kept")
