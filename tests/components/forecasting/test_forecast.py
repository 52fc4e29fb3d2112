"""The step: its table, its report, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from modelmill.components.core.errors import UserError
from modelmill.components.core.manifest import Manifest
from modelmill.components.core.recipe import validate
from modelmill.components.core.step import section
from modelmill.components.forecasting import component
from modelmill.components.forecasting.fan_chart import Fan, fan_chart
from modelmill.components.forecasting.forecast import forecast
from modelmill.components.forecasting.forecast_config import ChronosUseConfig, ForecastConfig
from modelmill.components.forecasting.forecast_model import open_forecaster
from modelmill.components.forecasting.series import prepare_series
from modelmill.components.forecasting.series_config import SeriesConfig
from modelmill.components.forecasting.series_table import open_series
from tests.components.forecasting import chronos_models as models
from tests.components.forecasting.conftest import Produce

LEVELS = [0.1, 0.5, 0.9]


@pytest.fixture(scope="module")
def bolt(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return models.bolt(tmp_path_factory.mktemp("bolt"))


@pytest.fixture(scope="module")
def chronos2(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return models.chronos2(tmp_path_factory.mktemp("chronos2"))


def config(**changes: Any) -> ForecastConfig:
    return ForecastConfig.model_validate({"horizon": 9, "quantiles": LEVELS, "use": {"device": "cpu"}, **changes})


def prepared(produce: Produce, folder: Path, text: str, **settings: Any) -> Manifest:
    path = folder / "series.csv"
    path.write_text(text)
    source = {"type": "files", "paths": [str(path)], **settings.pop("source", {})}
    return produce(prepare_series, SeriesConfig.model_validate({"source": source, "horizon": 2, **settings}))


def test_every_series_is_continued_on_its_own_grid(produce: Produce, bolt: Manifest, tmp_path: Path) -> None:
    rows = [f"a,2024-01-{day:02},{day}" for day in range(1, 29)]
    rows += [f"b,{year}-{month:02}-01,{month}" for year in (2022, 2023) for month in range(1, 13)]
    series = prepared(produce, tmp_path, "item_id,timestamp,target\n" + "\n".join(rows))
    found = produce(forecast, config(horizon=None), series=series, model=bolt)
    assert found.kind == "forecasts"
    assert found.counts == {"series": 2, "points": 4, "not_forecast": 0}
    assert found.metadata["weights_digest"] == bolt.metadata["weights_digest"]
    assert found.metadata["dataset_digest"] == series.digest
    table = pq.read_table(found.path("forecasts.parquet")).to_pandas()
    assert list(table.columns) == ["item_id", "timestamp", "0.1", "0.5", "0.9"]
    assert list(table["item_id"]) == ["a", "a", "b", "b"]
    assert [str(time.date()) for time in table["timestamp"]] == [
        "2024-01-29",
        "2024-01-30",
        "2024-01-01",
        "2024-02-01",
    ]
    read = open_series(series)
    given = [read.context(number, horizon=2) for number in range(2)]
    expected = open_forecaster(bolt, ChronosUseConfig(device="cpu")).predict(given, 2, LEVELS)
    np.testing.assert_allclose(table[["0.1", "0.5", "0.9"]].to_numpy().reshape(2, 2, 3), expected, rtol=1e-6)
    page = found.path("report.html").read_text()
    assert page.count("<svg") == 2
    assert "a: 2024-01-29 to 2024-01-30" in page
    assert "80% of what is expected" in page


def test_equal_inputs_give_equal_bytes(produce: Produce, bolt: Manifest, tmp_path: Path) -> None:
    series = models.series_manifest(tmp_path, models.walks(5))
    first, second = (produce(forecast, config(), series=series, model=bolt) for _ in range(2))
    assert first.digest == second.digest
    assert str(tmp_path).encode() not in b"".join(first.path(entry.path).read_bytes() for entry in first.files)


def test_a_series_without_a_value_is_nan_and_told(
    produce: Produce, bolt: Manifest, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    series = models.series_manifest(tmp_path, [np.full(20, np.nan), np.full(20, 3.0), np.arange(3.0)])
    found = produce(forecast, config(), series=series, model=bolt)
    assert found.counts["not_forecast"] == 1
    assert "1 series have no value that the model could read, and no forecast: item-0" in caplog.text
    values = pq.read_table(found.path("forecasts.parquet")).column("0.5").to_numpy().reshape(3, 9)
    assert np.isnan(values[0]).all()
    assert np.isfinite(values[1:]).all()
    assert "item-0" in found.path("report.md").read_text()


def test_known_covariates_are_read_ahead(produce: Produce, chronos2: Manifest, bolt: Manifest, tmp_path: Path) -> None:
    tables = []
    for price in (1, 100):
        rows = [
            f"a,2024-01-{day:02},{day % 5 if day < 24 else ''},{day % 3 * (1 if day < 24 else price)}"
            for day in range(1, 26)
        ]
        series = prepared(
            produce,
            tmp_path,
            "item_id,timestamp,target,price\n" + "\n".join(rows),
            source={"known_covariates": ["price"]},
        )
        found = produce(forecast, config(horizon=None), series=series, model=chronos2)
        tables.append(pq.read_table(found.path("forecasts.parquet")).column("0.5").to_numpy())
    assert not np.allclose(*tables)
    with pytest.raises(UserError, match=r"forecast\.use\.covariates: there is no covariate 'prize'.*have price"):
        produce(forecast, config(use={"covariates": ["prize"]}), series=series, model=chronos2)
    with pytest.raises(UserError, match="a has 2 of 9 future values of 'price'"):
        produce(forecast, config(), series=series, model=chronos2)
    for model, use in ((bolt, {}), (chronos2, {"covariates": []})):  # which read none
        assert produce(forecast, config(use=use), series=series, model=model).counts["points"] == 9


def test_horizons_that_make_no_sense(produce: Produce, bolt: Manifest, tmp_path: Path) -> None:
    series = models.series_manifest(tmp_path, models.walks(2))
    with pytest.raises(UserError, match=r"forecast\.horizon: the series name none; set one"):
        produce(forecast, config(horizon=None), series=series, model=bolt)
    with pytest.raises(UserError, match="horizon: Input should be greater than 0"):
        validate(ForecastConfig, {"horizon": 0})
    with pytest.raises(UserError, match="horizon: 40 is more than the 32 points that the model reads"):
        produce(forecast, config(horizon=40), series=series, model=bolt)
    for levels in ([0.5, 0.1], [0.1, 0.9], [0.5, 1.0], []):
        with pytest.raises(UserError, match="must rise, lie between 0 and 1 and hold"):
            validate(ForecastConfig, {"quantiles": levels})


def test_the_shell_writes_manifest_and_reports(bolt: Manifest, tmp_path: Path) -> None:
    series = models.series_manifest(tmp_path / "series", models.walks(2))
    for name, manifest in (("series", series), ("bolt", bolt)):
        manifest.write(tmp_path / f"{name}.json")
    names = ("series.json", "bolt.json", "manifest", "report", "table")
    paths = [SimpleNamespace(path=str(tmp_path / name)) for name in names]
    text = section("forecast", config(), forecast)
    component.forecast.python_func(text, *paths)
    assert Manifest.read(tmp_path / "manifest").counts["points"] == 18
    assert "item-0" in (tmp_path / "report").read_text()


def test_charts_of_odd_forecasts() -> None:
    levels, times = [0.1, 0.5, 0.9], np.arange(8).astype("datetime64[D]")
    flat = fan_chart(times[:5], np.full(5, 2.0), [Fan(times[5:], np.full((3, 3), 2.0))], levels, title="flat")
    assert "nan" not in flat
    assert 'aria-label="flat"' in flat
    empty = fan_chart(times[:5], np.full(5, np.nan), [Fan(times[5:], np.full((3, 3), np.nan))], levels, title="x")
    assert "nan" not in empty
    beside = Fan(times[5:], np.ones((3, 3)), baseline=np.arange(3.0))
    assert "naive" in fan_chart(times[:5], np.arange(5.0), [beside], levels, title="x", baseline="naive")
