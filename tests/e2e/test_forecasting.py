"""The scheduled forecast through the months: from a tuned champion, through drift, to the next champion."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import yaml

from tests.components.forecasting import chronos_models
from tests.e2e.command import last, modelmill, states

pytestmark = pytest.mark.slow
QUARTERS, SEASON = 160, 4
CHAMPION, QUIET, SHIFTED = 100, 124, 160  # points that are known when the champion is made, later, and in the end


def training(steps: int) -> dict[str, Any]:
    return {
        "horizon": 4,
        "training": {
            "steps": steps,
            "global_batch_size": 32,
            "micro_batch_size": 32,
            "parallel": {"processes_per_node": 1},
            "learning_rate": 1e-2,
            "min_learning_rate": 1e-3,
            "warmup_steps": 5,
            "precision": "fp32",
            "accelerator": "cpu",
            "validate_every": None,
            "validation_rows": 0,
            "checkpoint_every": None,
            "seed": 1,
        },
    }


def common(data: Path) -> dict[str, Any]:
    return {
        "tracking": {"experiment": "forecasting"},
        "series": {"source": {"type": "files", "paths": [str(data)]}, "horizon": 4, "windows": 3},
        "backtest": {"baselines": []},
        "registry": {"name": "demand"},
    }


def table() -> pd.DataFrame:
    """Quarters of 16 series; from `QUIET` on their seasons turn around and grow."""
    random, parts = np.random.default_rng(0), []
    times = pd.date_range("1980-01-01", periods=QUARTERS, freq="QS-JAN")
    shift = np.where(np.arange(QUARTERS) < QUIET, 1.0, -3.0)
    for number in range(16):
        season = np.tile(random.permutation([-1.5, -0.5, 0.5, 1.5]), QUARTERS // SEASON)
        values = 20 + number + shift * season + random.normal(0, 0.2, QUARTERS)
        parts.append(pd.DataFrame({"item_id": f"shop-{number}", "timestamp": times, "target": values}))
    return pd.concat(parts, ignore_index=True)


def day(points: int) -> str:
    return str(pd.date_range("1980-01-01", periods=points, freq="QS-JAN")[-1].date())


class Shop:
    """A folder in which the pipelines run one after the other."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.data = folder, folder / "sales.csv"
        chronos_models.bolt(folder / "base")
        base = {"reference": str(folder / "base" / "model")}
        self._write("tune", common(self.data) | {"pipeline": "chronos_tune", "model": base})
        # So small a model does not beat Seasonal Naive; here drift is the reason.
        watch = {"drift": {"min_points": 12}, "degradation": {"max_ratio": 4.0}, "made_by": "laptop/x"}
        self._write("again", common(self.data) | watch | {"pipeline": "reforecast"})

    def _write(self, name: str, recipe: dict[str, Any]) -> None:
        steps = {"tune": 60, "again": 100}[name]
        content = {"name": name, **recipe, "tuning": {"chronos": training(steps)}}
        (self.folder / f"{name}.yaml").write_text(yaml.safe_dump(content))

    def known(self, points: int) -> None:
        """What has come in so far."""
        frame = table()
        frame[frame.timestamp <= day(points)].to_csv(self.data, index=False)

    def run(self, name: str, *changes: str) -> dict[str, str]:
        words = [word for change in changes for word in ("--set", change)]
        done = modelmill(self.folder, "run", f"{name}.yaml", *words)
        assert done.returncode == 0, done.stdout + done.stderr
        return states(done.stdout)

    @property
    def archive(self) -> Path:
        return self.folder / "home" / "forecasts" / "demand"

    def published(self) -> list[str]:
        return sorted(path.name for path in self.archive.iterdir())

    def champions(self) -> int:
        return last(self.folder, "register_model")["metadata"]["version"]


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    made = Shop(tmp_path_factory.mktemp("shop"))
    made.known(CHAMPION)
    return made


def test_without_a_champion_it_says_what_to_run_first(shop: Shop) -> None:
    done = modelmill(shop.folder, "run", "again.yaml")
    assert done.returncode == 2
    assert "models:/demand@champion" in done.stderr
    assert "`modelmill run laptop/x` makes it" in done.stderr


def test_the_first_champion_is_a_tuned_model(shop: Shop) -> None:
    shop.run("tune")
    assert last(shop.folder, "gate")["metadata"]["passed"]
    assert last(shop.folder, "promote")["metadata"]["outcome"] == "promoted"
    assert last(shop.folder, "report_outcome")["metadata"]["outcome"] == "promoted"
    names = {entry["path"] for entry in last(shop.folder, "tune")["files"]}
    assert "model/training_series.json" in names


def test_as_long_as_nothing_changes_it_only_forecasts(shop: Shop) -> None:
    shop.known(QUIET - 4)
    found = shop.run("again")
    later = ("tune", "promote", "forecast_promoted", "publish_promoted")
    assert {found[step] for step in later} == {"skipped"}, "one forecast is enough"
    assert last(shop.folder, "detect_drift")["metadata"]["drifted"] is False
    assert last(shop.folder, "detect_drift")["counts"]["compared"] == 16
    assert last(shop.folder, "judge_forecasts")["counts"]["forecasts"] == 0
    assert last(shop.folder, "report_outcome")["metadata"]["outcome"] == "unchanged"
    assert len(shop.published()) == 1


def test_a_run_of_the_past_makes_the_same_forecasts(shop: Shop) -> None:
    before = {step: last(shop.folder, step)["files"] for step in ("forecast", "judge_forecasts", "detect_drift")}
    shop.known(SHIFTED)
    shop.run("again", f"series.as_of={day(QUIET - 4)}")
    for step, files in before.items():
        assert last(shop.folder, step)["files"] == files, step
    assert len(shop.published()) == 1


def test_a_champion_that_degraded_is_retrained_and_replaced(shop: Shop) -> None:
    found = shop.run("again")
    assert last(shop.folder, "detect_drift")["metadata"]["drifted"] is True
    judged = last(shop.folder, "judge_forecasts")
    assert (judged["counts"]["pairs"], judged["counts"]["points"]) == (16, 64)
    assert found["tune"] == "finished"
    assert last(shop.folder, "gate")["metadata"]["outcome"] == "better"
    assert last(shop.folder, "report_outcome")["metadata"]["outcome"] == "promoted"
    assert shop.champions() == "2"
    assert (found["forecast_promoted"], found["publish_promoted"]) == ("finished", "finished")
    before, after = (last(shop.folder, step)["metadata"] for step in ("publish_forecasts", "publish_promoted"))
    assert {before["name"], after["name"]} < set(shop.published())
    assert before["known_until"] == after["known_until"]
    facts = json.loads(pq.read_schema(shop.archive / after["name"]).metadata[b"modelmill"])
    assert facts["replaces"] == before["name"]
    assert facts["weights_digest"] == last(shop.folder, "tune")["metadata"]["weights_digest"]


def test_once_is_enough(shop: Shop) -> None:
    found = shop.run("again")
    assert found["tune"] == "skipped"
    held = shop.published()
    assert last(shop.folder, "publish_forecasts")["metadata"]["name"] in held
    assert last(shop.folder, "publish_forecasts")["counts"]["published"] == 0, "its first run published it"
    assert len(held) == 3
    checked = last(shop.folder, "check_degradation")
    assert json.loads((Path(checked["uri"]) / "degradation.json").read_text())["new_points"] == 0
    assert last(shop.folder, "report_outcome")["metadata"]["outcome"] == "unchanged"
    assert shop.champions() == "2"


def test_a_failure_is_reported(shop: Shop) -> None:
    with shop.data.open("a") as file:
        file.write("shop-0,1980-01-01,1.0\n")
    done = modelmill(shop.folder, "run", "again.yaml")
    assert done.returncode != 0
    assert "shop-0" in done.stdout + done.stderr
    outcome = last(shop.folder, "report_outcome")
    assert outcome["metadata"]["outcome"] == "failed"
