"""The search that fans out, from the command line: workers share the trials, and one step takes the best."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.command import last, modelmill, states

SMALL = {"pretraining.steps": 5, "pretraining.warmup_steps": 1, "search.max_jobs": 3, "search.pruning": "null"}
SMALL |= {"search.chronos.training.steps": 6}


@pytest.mark.slow
def test_workers_share_the_trials(tmp_path: Path) -> None:
    changes = [word for name, value in SMALL.items() for word in ("--set", f"{name}={value}")]
    done = modelmill(tmp_path, "run", "laptop/chronos-search", *changes)
    assert done.returncode == 0, done.stdout + done.stderr
    workers = [f"search_worker-{number}" for number in range(4)]
    shown = states(done.stdout)
    assert {shown[name] for name in workers} == {"finished"}
    assert "search_worker" not in shown
    trials = [last(tmp_path, name)["counts"]["trials"] for name in workers]
    assert sum(trials) == 3
    assert trials[2:] == [0, 0], "beyond max_parallel_jobs"
    chosen = last(tmp_path, "select_trial")
    assert chosen["counts"]["trials"] == 3
    assert chosen["metrics"]["validation_sql"] <= chosen["metrics"]["zero_shot_validation_sql"]
    assert last(tmp_path, "backtest_tuned")["metadata"]["weights_digest"] == chosen["metadata"]["weights_digest"]
