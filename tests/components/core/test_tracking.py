"""Tracking calls of a step become spool lines, and nothing outside a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modelmill.components.core import tracking
from modelmill.components.core.events import read_lines
from modelmill.components.core.home import Home
from tests.components.conftest import RunFolder


def test_every_call_is_one_record(home: Home, make_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run: RunFolder = make_run(home)
    run.enter("train")
    monkeypatch.chdir(tmp_path)
    tracking.log_params({"a": {"b": 1}})
    tracking.log_metrics({"loss": np.float32(1.5)}, step=3)
    tracking.set_tags({"x": "y"})
    tracking.log_artifact("report.html", "evaluation")
    tracking.log_dataset(name="n", digest="d", source="s3://b/k", context="test", profile={"rows": 1})
    records = [record for _, record in read_lines(run.path / "spool" / "train.jsonl")]
    assert [record["type"] for record in records] == ["params", "metrics", "tags", "artifact", "dataset"]
    assert records[1]["values"] == {"loss": 1.5}
    assert records[1]["step"] == 3
    assert records[3]["path"] == str(tmp_path / "report.html"), "delivered from another folder"
    assert all(isinstance(record["time"], int) for record in records)
    tracking.record("end", spool="_run", status="FINISHED")
    assert (run.path / "spool" / "_run.jsonl").exists()


def test_outside_a_run_nothing_happens(home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tracking.log_metrics({"loss": 1.0})
    assert tracking.spool_path() is None
    assert list(tmp_path.iterdir()) == []


def test_points_before_an_offset(home: Home, make_run: Any) -> None:
    run: RunFolder = make_run(home)
    for step in range(3):
        run.record("train", "metrics", values={"loss": float(step), "rate": 0.5}, step=step)
    path = run.path / "spool" / "train.jsonl"
    offsets = [offset for offset, _ in read_lines(path)]
    assert tracking.points_before(path, 0) == set()
    expected = {("loss", 0, 0.0), ("rate", 0, 0.5), ("loss", 1, 1.0), ("rate", 1, 0.5)}
    assert tracking.points_before(path, offsets[1]) == expected
    assert tracking.points_before(path, offsets[2] - 1) == expected
