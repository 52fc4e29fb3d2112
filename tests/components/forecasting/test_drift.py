"""Whether drift is found where there is some, not where there is none, and what happens to odd series."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from modelmill.components.core.errors import UserError
from modelmill.components.core.manifest import Manifest
from modelmill.components.forecasting.drift import detect_drift, stability_index
from modelmill.components.forecasting.drift_config import DriftConfig
from modelmill.components.forecasting.series_profile import (
    PROFILE,
    profile_of,
    read_profile,
    seasonal_strength,
    write_profile,
)
from tests.components.forecasting.backtests import seasonal, series_manifest, series_table
from tests.components.forecasting.tables import Produce

THEN = 200  # points of each series when the champion was tuned
CONFIG = DriftConfig(min_points=20)


def champion(folder: Path, values: list[np.ndarray]) -> Manifest:
    """A model's folder that tells what it was tuned on."""
    model = folder / "champion" / "model"
    model.mkdir(parents=True)
    write_profile(series_table(folder, values), model)
    return Manifest.describe(folder / "champion", kind="model")


@pytest.fixture
def world() -> list[np.ndarray]:
    return seasonal(12, THEN + 60)


def found(manifest: Manifest) -> dict[str, dict[str, Any]]:
    rows = pq.read_table(manifest.path("drift.parquet")).to_pylist()
    return {row["item_id"]: row for row in rows}


class TestDrift:
    def test_more_of_the_same_is_none(self, world: list[np.ndarray], tmp_path: Path, produce: Produce) -> None:
        model = champion(tmp_path, [values[:THEN] for values in world])
        drift = produce(detect_drift, CONFIG, series=series_manifest(tmp_path, world), champion=model)
        assert drift.metadata["drifted"] is False
        assert drift.counts["compared"] == 12
        assert drift.metadata["new_points"] == 12 * 60
        assert drift.metadata["last_seen"].startswith("2049-10-01")

    @pytest.mark.parametrize("kind", ["scale", "season", "distribution"])
    def test_what_changed_is_named(self, kind: str, world: list[np.ndarray], tmp_path: Path, produce: Produce) -> None:
        model = champion(tmp_path, [values[:THEN] for values in world])
        random = np.random.default_rng(1)
        changed = []
        for values in world:
            new = values[THEN:].copy()
            if kind == "scale":
                new = new.mean() + 4 * (new - new.mean())
            elif kind == "season":
                new = new.mean() + random.permutation(new - new.mean())
            else:
                new = new + 0.8 * np.std(np.diff(values[:THEN])) * np.arange(len(new))
            changed.append(np.concatenate([values[:THEN], new]))
        drift = produce(detect_drift, CONFIG, series=series_manifest(tmp_path, changed), champion=model)
        assert drift.metadata["drifted"] is True
        reasons = " ".join(row["reason"] for row in found(drift).values())
        assert {"scale": "times as large", "season": "strength", "distribution": "PSI"}[kind] in reasons
        assert "drifted" in drift.path("report.md").read_text()

    def test_level_and_trend_are_free(self, world: list[np.ndarray], tmp_path: Path, produce: Produce) -> None:
        """Another level is no drift of changes; the jump itself is one season of them."""
        model = champion(tmp_path, [values[:THEN] for values in world])
        raised = [np.concatenate([values[:THEN], values[THEN:] + 3]) for values in world]
        drift = produce(detect_drift, CONFIG, series=series_manifest(tmp_path, raised), champion=model)
        assert drift.metadata["drifted"] is False

    def test_a_champion_without_a_profile_is_compared_by_what_is_held_back(
        self, world: list[np.ndarray], tmp_path: Path, produce: Produce
    ) -> None:
        (tmp_path / "hub" / "model").mkdir(parents=True)
        model = Manifest.describe(tmp_path / "hub", kind="model")
        series = series_manifest(tmp_path, world, horizon=15, windows=2)
        drift = produce(detect_drift, CONFIG, series=series, champion=model)
        assert drift.counts["compared"] == 12
        assert drift.metadata["new_points"] is None
        assert drift.metadata["last_seen"] == ""


class TestOddSeries:
    def statuses(
        self, then: list[np.ndarray], now: list[np.ndarray], tmp_path: Path, produce: Produce, **config: Any
    ) -> dict[str, dict[str, Any]]:
        model = champion(tmp_path, then)
        section = DriftConfig(**{"min_points": 20, **config})
        return found(produce(detect_drift, section, series=series_manifest(tmp_path, now), champion=model))

    def test_each_has_its_status(self, world: list[np.ndarray], tmp_path: Path, produce: Produce) -> None:
        then = [values[:THEN] for values in world[:5]]
        missing = np.concatenate([world[2][:THEN], np.full(30, np.nan)])
        now = [world[0][:THEN], world[1][: THEN + 5], missing, world[3]]
        rows = self.statuses(then, now, tmp_path, produce)
        assert [rows[f"item-{number}"]["status"] for number in range(5)] == [
            "nothing new",
            "too few points",
            "all missing",
            "compared",
            "vanished",
        ]

    def test_constant_series_drift_when_they_move(
        self, world: list[np.ndarray], tmp_path: Path, produce: Produce
    ) -> None:
        flat, more = np.full(THEN, 5.0), np.full(THEN + 40, 5.0)
        moving = np.concatenate([flat, world[0][:40]])
        stopped = np.concatenate([world[1][:THEN], np.full(40, world[1][THEN])])
        rows = self.statuses([flat, flat, world[1][:THEN]], [more, moving, stopped], tmp_path, produce)
        assert [rows[f"item-{number}"]["drifted"] for number in range(3)] == [False, True, True]
        assert rows["item-1"]["reason"] == "it was constant"

    def test_new_series_are_drift_where_they_are_many(
        self, world: list[np.ndarray], tmp_path: Path, produce: Produce
    ) -> None:
        model = champion(tmp_path, [values[:THEN] for values in world[:3]])
        drift = produce(detect_drift, CONFIG, series=series_manifest(tmp_path, world), champion=model)
        assert drift.counts["new"] == 9
        assert drift.metadata["drifted"] is True
        assert "9 of 12 series are new" in drift.metadata["reason"]

    def test_a_changed_frequency_is_drift_and_not_compared(
        self, world: list[np.ndarray], tmp_path: Path, produce: Produce
    ) -> None:
        model = champion(tmp_path, [values[:THEN] for values in world[:2]])
        path = model.path(f"model/{PROFILE}")
        record = json.loads(path.read_text())
        record["frequency"] = ["MS", "QS-JAN"]
        path.write_text(json.dumps(record))
        model = Manifest.describe(path.parent.parent, kind="model")
        drift = produce(detect_drift, CONFIG, series=series_manifest(tmp_path, world[:2]), champion=model)
        row = found(drift)["item-0"]
        assert (row["status"], row["drifted"], row["reason"]) == ("frequency changed", True, "MS became QS-JAN")

    def test_history_that_was_cut_off_is_all_new(
        self, world: list[np.ndarray], tmp_path: Path, produce: Produce
    ) -> None:
        """The table starts after what the champion was tuned on."""
        model = champion(tmp_path, [world[0][:40]])
        record = json.loads(model.path(f"model/{PROFILE}").read_text())
        record["end"] = ["1990-01-01T00:00:00"]
        model.path(f"model/{PROFILE}").write_text(json.dumps(record))
        model = Manifest.describe(Path(model.uri), kind="model")
        drift = produce(detect_drift, CONFIG, series=series_manifest(tmp_path, [world[0]]), champion=model)
        assert found(drift)["item-0"]["points"] == len(world[0])

    def test_a_broken_profile_is_refused(self, world: list[np.ndarray], tmp_path: Path, produce: Produce) -> None:
        model = champion(tmp_path, [world[0]])
        model.path(f"model/{PROFILE}").write_text("{}")
        model = Manifest.describe(Path(model.uri), kind="model")
        with pytest.raises(UserError, match=r"champion: .* is no profile of series"):
            produce(detect_drift, CONFIG, series=series_manifest(tmp_path, world), champion=model)


class TestMeasures:
    def test_stability_index_is_small_for_draws_of_the_same_and_large_for_others(self) -> None:
        random = np.random.default_rng(0)
        edges = np.quantile(random.normal(size=5000), np.arange(1, 10) / 10)
        same = [stability_index(random.normal(size=500), edges) for _ in range(20)]
        assert np.mean(same) == pytest.approx(9 * (1 / 500 + 1 / 5000), rel=0.5)
        assert stability_index(random.normal(1.0, 1, 500), edges) > 0.5

    def test_stability_index_by_hand(self) -> None:
        """Two bins of one half each; all 10 points, and one for smoothing, in the upper one."""
        shares, expected = np.array([0.5, 10.5]) / 11, 0.5
        assert stability_index(np.ones(10), np.array([0.0])) == pytest.approx(
            ((shares - expected) * np.log(shares / expected)).sum()
        )

    def test_equal_edges_are_one(self) -> None:
        """Half of the values are 0: five deciles are the same number."""
        edges = np.array([0.0, 0, 0, 0, 0, 1, 2, 3, 4])
        values = np.concatenate([np.zeros(500), np.repeat([0.5, 1.5, 2.5, 3.5, 9.0], 100)])
        assert stability_index(values, edges) == pytest.approx(0, abs=1e-3)

    @pytest.mark.parametrize(("season", "expected"), [(12, 1.0), (7, 1.0)])
    def test_strength_of_a_pure_season_under_a_trend(self, season: int, expected: float) -> None:
        steps = np.arange(20 * season)
        wave = np.sin(2 * np.pi * steps / season) + 0.5 * steps
        assert seasonal_strength(wave, season) == pytest.approx(expected, abs=1e-6)

    def test_noise_has_none_however_short(self) -> None:
        random = np.random.default_rng(0)
        strengths = [seasonal_strength(random.normal(size=48), 12) for _ in range(200)]
        assert np.mean(strengths) == pytest.approx(0, abs=0.08)

    def test_what_cannot_be_told_is_nan(self) -> None:
        assert np.isnan(seasonal_strength(np.ones(100), 4))
        assert np.isnan(seasonal_strength(np.arange(11.0), 4))
        assert np.isnan(seasonal_strength(np.arange(50.0), 1))
        assert np.isnan(seasonal_strength(np.full(50, np.nan), 4))

    def test_a_profile_comes_back_as_it_was(self, world: list[np.ndarray], tmp_path: Path) -> None:
        values = [world[0], np.full(50, 2.0), np.full(50, np.nan)]
        model = champion(tmp_path, values)
        assert read_profile(model) == profile_of(series_table(tmp_path, values))
