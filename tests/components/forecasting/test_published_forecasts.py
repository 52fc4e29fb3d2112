"""Forecasts that were published are judged by what has become known, and decide about a retraining."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from moto.server import ThreadedMotoServer

from modelmill.components.core.errors import UserError
from modelmill.components.core.home import Home
from modelmill.components.core.manifest import Manifest
from modelmill.components.evaluation.records import SCORES_FILE
from modelmill.components.forecasting.archive import open_archive
from modelmill.components.forecasting.backtest import backtest
from modelmill.components.forecasting.backtest_config import BacktestConfig
from modelmill.components.forecasting.degradation import check_degradation
from modelmill.components.forecasting.drift_config import DegradationConfig, JudgeConfig, PublishConfig
from modelmill.components.forecasting.judge_forecasts import judge_forecasts
from modelmill.components.forecasting.metrics import seasonal_errors
from modelmill.components.forecasting.publish_forecasts import publish_forecasts
from modelmill.components.forecasting.series_table import open_series
from tests.components.forecasting.backtests import seasonal, series_manifest
from tests.components.forecasting.tables import Produce

LEVELS = [0.1, 0.5, 0.9]
WEIGHTS = "a" * 64
HORIZON = 4


def champion(folder: Path, weights: str = WEIGHTS) -> Manifest:
    place = folder / f"model-{weights[:4]}"
    (place / "model").mkdir(parents=True, exist_ok=True)
    return Manifest.describe(place, kind="model", metadata={"weights_digest": weights})


def forecasts_of(folder: Path, series: Manifest, values: np.ndarray, weights: str = WEIGHTS) -> Manifest:
    """What the step `forecast` would write; values [series, horizon], levels 1 apart."""
    table = open_series(series)
    place = folder / f"forecast-{len(list(folder.iterdir()))}"
    place.mkdir()
    horizon = values.shape[1]
    times = [table.timestamps(n, int(table.lengths[n]), int(table.lengths[n]) + horizon) for n in range(len(table))]
    columns = {"item_id": pa.array([item for item in table.item_ids for _ in range(horizon)])}
    columns["timestamp"] = pa.array(np.concatenate([part.to_numpy() for part in times]), pa.timestamp("ns"))
    for level in LEVELS:
        columns[f"{level:g}"] = pa.array((values + 2.5 * (level - 0.5)).reshape(-1))
    pq.write_table(pa.table(columns), place / "forecasts.parquet")
    metadata = {"weights_digest": weights, "dataset_digest": series.digest, "horizon": horizon, "quantiles": LEVELS}
    return Manifest.describe(place, kind="forecasts", metadata={**metadata, "model": "chronos-bolt"})


class World:
    """Series that grow, and forecasts of them on the way."""

    def __init__(self, produce: Produce, folder: Path, **place: Any) -> None:
        self.produce, self.folder = produce, folder
        self.values = seasonal(8, 80)
        self.publish = PublishConfig(name="demand", **place)
        self.judge = JudgeConfig(name="demand", **place)

    def known(self, length: int) -> Manifest:
        data = series_manifest(self.folder, [one[:length] for one in self.values], horizon=HORIZON, windows=3)
        return Manifest.model_validate(
            {**data.model_dump(), "metadata": {**data.metadata, "dataset_digest": f"{length:064x}"}}
        )

    def forecast(
        self, length: int, error: float = 0.0, weights: str = WEIGHTS, replaced: Manifest | None = None
    ) -> Manifest:
        """Publish a forecast made at some length; what comes, plus an error in units of the seasonal change."""
        series = self.known(length)
        scale = seasonal_errors([one[:length] for one in self.values], np.full(8, 4))
        ahead = np.stack([one[length : length + HORIZON] for one in self.values]) + error * scale[:, None]
        made = forecasts_of(self.folder, series, ahead, weights)
        inputs = {"forecasts": made, "series": series} | ({"replaced": replaced} if replaced else {})
        return self.produce(publish_forecasts, self.publish, **inputs)

    def judged(self, length: int, weights: str = WEIGHTS) -> Manifest:
        return self.produce(
            judge_forecasts, self.judge, series=self.known(length), champion=champion(self.folder, weights)
        )


@pytest.fixture
def world(produce: Produce, tmp_path: Path) -> World:
    return World(produce, tmp_path)


class TestArchive:
    def test_a_forecast_is_published_once(self, world: World, home: Home) -> None:
        first, again = world.forecast(60), world.forecast(60)
        assert (first.counts["published"], again.counts["published"]) == (1, 0)
        assert first.metadata["name"] == again.metadata["name"]
        folder = home.root / "forecasts" / "demand"
        assert [path.name for path in folder.iterdir()] == [first.metadata["name"]]
        assert first.metadata["name"].startswith("20141001T000000-aaaaaaaaaaaaaaaa-")

    def test_a_forecast_takes_the_place_of_another(self, world: World, home: Home) -> None:
        first = world.forecast(60, error=0.5)
        folder = home.root / "forecasts" / "demand"
        before = (folder / first.metadata["name"]).read_bytes()
        second = world.forecast(60, error=0.25, weights="c" * 64, replaced=first)
        assert (folder / first.metadata["name"]).read_bytes() == before, "what was published stays"
        told = [
            json.loads(pq.read_schema(folder / each.metadata["name"]).metadata[b"modelmill"])
            for each in (first, second)
        ]
        assert "replaces" not in told[0]
        assert told[1]["replaces"] == second.metadata["replaces"] == first.metadata["name"]
        found = [world.judged(64, weights).metrics["mase"] for weights in (WEIGHTS, "c" * 64)]
        assert found == pytest.approx([0.5, 0.25]), "each champion is judged by its own"

    def test_a_model_that_came_out_the_same_replaces_nothing(self, world: World) -> None:
        first = world.forecast(60)
        again = world.forecast(60, replaced=first)
        assert (again.counts["published"], again.metadata["replaces"]) == (0, "")

    def test_a_folder_of_ones_own_and_files_of_others(self, produce: Produce, tmp_path: Path) -> None:
        world = World(produce, tmp_path, uri=str(tmp_path / "published"))
        (tmp_path / "published" / "demand").mkdir(parents=True)
        (tmp_path / "published" / "demand" / "README.parquet").write_text("no forecast")
        before = world.judge.fingerprint()
        world.forecast(60)
        assert world.judge.fingerprint() != before
        assert len(open_archive(world.publish).names()) == 1

    def test_a_bucket(self, produce: Produce, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for name, value in {"ACCESS_KEY_ID": "x", "SECRET_ACCESS_KEY": "x", "DEFAULT_REGION": "us-east-1"}.items():
            monkeypatch.setenv(f"AWS_{name}", value)
        server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        try:
            endpoint = "http://{}:{}".format(*server.get_host_and_port())
            client = boto3.client("s3", endpoint_url=endpoint)
            client.create_bucket(Bucket="forecasts")
            world = World(produce, tmp_path, uri="s3://forecasts/shop", endpoint_url=endpoint)
            assert world.judged(60).counts["forecasts"] == 0
            first, again = world.forecast(60, error=0.5), world.forecast(60, error=0.5)
            assert (first.counts["published"], again.counts["published"]) == (1, 0)
            assert world.judged(64).metrics["mase"] == pytest.approx(0.5)
            (held,) = client.list_objects_v2(Bucket="forecasts")["Contents"]
            assert held["Key"] == f"shop/demand/{first.metadata['name']}"
        finally:
            server.stop()

    def test_a_folder_that_cannot_be_written(self, produce: Produce, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(UserError, match=r"archive\.uri: .* cannot be"):
            World(produce, tmp_path, uri=str(tmp_path / "file")).forecast(60)

    def test_a_forecast_of_other_series_is_refused(self, world: World, tmp_path: Path) -> None:
        made = forecasts_of(tmp_path, world.known(50), np.zeros((8, HORIZON)))
        with pytest.raises(UserError, match="forecasts: they are no forecast of these series"):
            world.produce(publish_forecasts, world.publish, forecasts=made, series=world.known(60))


class TestJudging:
    def test_the_first_run_has_none(self, world: World) -> None:
        judged = world.judged(60)
        assert judged.counts["forecasts"] == judged.counts["pairs"] == 0
        assert "No point" in judged.path("report.md").read_text()
        assert pq.read_table(judged.path("scores.parquet")).num_rows == 0

    def test_errors_are_those_of_a_backtest_at_the_same_origin(self, world: World) -> None:
        """A forecast that is off by half a seasonal change has a scaled median error of one half."""
        world.forecast(60, error=0.5)
        judged = world.judged(64)
        assert judged.counts["pairs"] == 8
        assert judged.counts["points"] == 8 * HORIZON
        assert judged.metrics["mase"] == pytest.approx(0.5)
        naive = world.produce(
            backtest, BacktestConfig(windows=1, baselines=[], quantiles=LEVELS), series=world.known(64)
        )
        assert judged.metrics["naive_mase"] == pytest.approx(naive.metrics["mase"])
        assert judged.metrics["naive_sql"] == pytest.approx(naive.metrics["sql"])

    def test_what_is_known_in_part_is_judged_in_part(self, world: World) -> None:
        world.forecast(60, error=0.5)
        judged = world.judged(61)
        assert judged.counts["points"] == 8
        assert judged.metrics["mase"] == pytest.approx(0.5)

    def test_no_point_is_judged_twice(self, world: World) -> None:
        world.forecast(60, error=9)
        world.forecast(62, error=1)
        world.forecast(64, error=2)
        judged = world.judged(70)
        scores = pq.read_table(judged.path("scores.parquet")).to_pandas()
        assert judged.counts["points"] == 2 * 8 * HORIZON  # of 60 to 64 and 64 to 68
        own = scores[scores.forecaster == "champion"].groupby("window").mase.mean()
        assert own.tolist() == pytest.approx([9, 2])

    def test_only_the_champions_own_forecasts_count(self, world: World) -> None:
        world.forecast(60, error=9, weights="b" * 64)
        assert world.judged(66).counts["forecasts"] == 0
        assert world.judged(66, "b" * 64).counts["pairs"] == 8

    def test_a_run_of_the_past_finds_what_it_found(self, world: World) -> None:
        world.forecast(60)
        before = world.judged(64)
        world.forecast(64)
        world.forecast(70)
        again = world.judged(64)
        assert [entry.sha256 for entry in again.files] == [entry.sha256 for entry in before.files]
        assert again.metrics == before.metrics

    def test_series_that_are_gone_or_have_no_forecast(self, world: World, tmp_path: Path) -> None:
        series = world.known(60)
        ahead = np.stack([one[60 : 60 + HORIZON] for one in world.values])
        ahead[1] = np.nan
        made = forecasts_of(tmp_path, series, ahead)
        world.produce(publish_forecasts, world.publish, forecasts=made, series=series)
        world.values = world.values[:3]
        judged = world.judged(66)
        assert (judged.counts["vanished"], judged.counts["pairs"], judged.counts["fallbacks"]) == (5, 3, 1)

    def test_a_changed_grid_is_counted(self, world: World, tmp_path: Path) -> None:
        published = world.forecast(60)
        path = Home.current().root / "forecasts" / "demand" / published.metadata["name"]
        table = pq.read_table(path)
        moved = pa.array(table.column("timestamp").to_numpy() + np.timedelta64(1, "D"))
        pq.write_table(table.set_column(1, "timestamp", moved), path)
        judged = world.judged(66)
        assert (judged.counts["frequency_changed"], judged.counts["pairs"]) == (8, 0)

    def test_a_damaged_file_is_named(self, world: World) -> None:
        name = world.forecast(60).metadata["name"]
        (Home.current().root / "forecasts" / "demand" / name).write_bytes(b"PAR1")
        with pytest.raises(UserError, match=rf"archive\.uri: {name} cannot be read"):
            world.judged(66)


class TestDegradation:
    def drift(self, folder: Path, **metadata: Any) -> Manifest:
        told = {"drifted": False, "reason": "the input did not drift", "new_points": 40, "last_seen": "2015"}
        (folder / "drift").mkdir(exist_ok=True)
        return Manifest.describe(folder / "drift", kind="drift", metadata={**told, **metadata})

    def rolling(self, world: World, length: int, weights: str = WEIGHTS) -> Manifest:
        """A backtest whose candidate is Seasonal Naive itself, under the champion's weights."""
        config = BacktestConfig(baselines=[], quantiles=LEVELS)
        made = world.produce(backtest, config, series=world.known(length))
        return Manifest.model_validate({**made.model_dump(), "metadata": {**made.metadata, "weights_digest": weights}})

    def check(self, world: World, config: DegradationConfig, **drift: Any) -> Manifest:
        return world.produce(
            check_degradation,
            config,
            drift=self.drift(world.folder, **drift),
            judged=world.judged(76),
            backtest=self.rolling(world, 76),
        )

    @pytest.mark.parametrize(("error", "found"), [(0.1, False), (4.0, True)])
    def test_published_forecasts_decide(self, error: float, found: bool, world: World) -> None:
        for length in (60, 64, 68):
            world.forecast(length, error=error)
        checked = self.check(world, DegradationConfig())
        assert checked.metadata["found"] is found
        assert checked.counts["pairs"] == 24
        assert "published forecasts" in checked.path("report.md").read_text()
        assert (checked.metrics["ratio"] > 1) is found

    def test_too_few_of_them_leave_it_to_the_backtest(self, world: World) -> None:
        world.forecast(60, error=9)
        checked = self.check(world, DegradationConfig())
        assert checked.metadata["found"] is False  # equal to Seasonal Naive is not worse
        assert "rolling backtest" in checked.path("report.md").read_text()
        assert checked.metrics["ratio"] == pytest.approx(1)

    def test_the_threshold_is_the_recipes(self, world: World) -> None:
        """A champion as good as Seasonal Naive is not good enough where 0.8 of it is asked for."""
        assert self.check(world, DegradationConfig(max_ratio=0.8)).metadata["found"] is True
        assert self.check(world, DegradationConfig(max_ratio=None)).metadata["found"] is False

    def test_drift_is_a_reason_unless_the_recipe_says_otherwise(self, world: World) -> None:
        assert self.check(world, DegradationConfig(), drifted=True).metadata["found"] is True
        assert self.check(world, DegradationConfig(on_drift=False), drifted=True).metadata["found"] is False

    def test_without_new_points_nothing_would_change(self, world: World) -> None:
        checked = self.check(world, DegradationConfig(), drifted=True, new_points=0)
        assert checked.metadata["found"] is False
        assert "has seen all points there are" in checked.path("report.md").read_text()
        assert self.check(world, DegradationConfig(), drifted=True, new_points=None).metadata["found"] is True

    def test_other_champions_and_other_artifacts_are_refused(self, world: World) -> None:
        drift, judged = self.drift(world.folder), world.judged(76)
        other = self.rolling(world, 76, "c" * 64)
        with pytest.raises(UserError, match="they judge different champions"):
            world.produce(check_degradation, DegradationConfig(), drift=drift, judged=judged, backtest=other)
        rolling = self.rolling(world, 76)
        with pytest.raises(UserError, match="give the outputs of judge_forecasts"):
            world.produce(check_degradation, DegradationConfig(), drift=drift, judged=rolling, backtest=rolling)
        assert any(entry.path == SCORES_FILE for entry in rolling.files)
