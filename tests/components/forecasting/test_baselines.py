"""Baselines: Seasonal Naive and boosting against their definitions, and all of them on series of every kind."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
from scipy.special import ndtri
from statsforecast import models

from modelmill.components.forecasting.backtest_config import BacktestConfig
from modelmill.components.forecasting.baselines import Statistical, baselines_of, filled
from modelmill.components.forecasting.boosting import GradientBoosting
from modelmill.components.forecasting.forecaster import Forecaster
from modelmill.components.forecasting.metrics import Errors, seasonal_errors
from modelmill.components.forecasting.seasonal_naive import SeasonalNaive
from modelmill.components.forecasting.series_table import Context
from modelmill.components.forecasting.windows import WindowPlan, rolling_windows

from .backtests import LEVELS, seasonal, series_table

QUICK = ["seasonal-naive", "auto-ets", "theta", "lightgbm"]
NAMES = [*QUICK, pytest.param("auto-arima", marks=pytest.mark.slow)]


def made(name: str) -> Forecaster:
    config = BacktestConfig.model_validate({"baselines": [name] if name != "seasonal-naive" else [], "workers": 1})
    return baselines_of(config)[-1]


def contexts(values: list[np.ndarray], season: int = 4) -> list[Context]:
    return [Context(f"item-{place}", one, season_length=season) for place, one in enumerate(values)]


@pytest.mark.parametrize(("length", "season"), [(40, 4), (9, 4), (30, 1)])
def test_seasonal_naive_equals_statsforecast(length: int, season: int) -> None:
    (values,) = seasonal(1, length)
    found = SeasonalNaive().predict(contexts([values], season), 10, LEVELS)[0]
    wanted = models.SeasonalNaive(season_length=season).forecast(values, 10, level=[50, 80])
    columns = [wanted[name] for name in ("lo-80", "lo-50", "mean", "hi-50", "hi-80")]
    np.testing.assert_allclose(found, np.stack(columns, axis=1), rtol=1e-12)


def test_seasonal_naive_fills_a_season_from_what_there_is() -> None:
    values = np.array([1.0, 2, 3, 4, 5, np.nan, 7, np.nan])
    short = np.array([4.0, 6.0, np.nan])
    found = SeasonalNaive().predict(contexts([values, short, np.full(9, np.nan)]), 6, [0.5, ndtri_level(1.0)])
    assert found[0, :, 0].tolist() == [5, 2, 7, 4, 5, 2]
    deviation = np.sqrt((4**2 + 4**2) / 2)
    spread = deviation * np.sqrt([1, 1, 1, 1, 2, 2])
    assert found[0, :, 1] - found[0, :, 0] == pytest.approx(spread)
    assert found[1, :, 0].tolist() == [6, 4, 6, 6, 6, 4], "of the two phases without a point the last one is taken"
    assert found[1, 0, 1] - found[1, 0, 0] == pytest.approx(2.0), "the change from point to point"
    assert np.isnan(found[2]).all()


def ndtri_level(deviations: float) -> float:
    """Level of the quantile that lies some standard deviations above the median."""
    levels = np.linspace(0.5, 0.999, 100_001)
    return float(np.interp(deviations, ndtri(levels), levels))


def test_missing_points_lie_between_their_neighbours() -> None:
    assert filled(np.array([np.nan, 1.0, np.nan, 3.0, np.nan])).tolist() == [1, 2, 3, 3]
    assert len(filled(np.full(3, np.nan))) == 0


@pytest.mark.parametrize("name", NAMES)
def test_forecasts_are_quantiles_or_missing_on_every_kind_of_series(name: str) -> None:
    gaps, (usual, long) = np.where(np.arange(24) % 5 == 2, np.nan, np.arange(24.0)), seasonal(2, 30)
    kinds = {
        "usual": usual,
        "gaps": gaps,
        "constant": np.full(24, 3.0),
        "zero": np.zeros(24),
        "one point": np.array([2.0]),
        "three points": np.array([1.0, 5.0, 2.0]),
        "missing": np.full(24, np.nan),
        "huge": long * 1e200,
        "tiny": long * 1e-200,
        "negative": -usual,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        found = made(name).predict(contexts(list(kinds.values())), 5, LEVELS)
    assert (found.shape, found.dtype) == ((len(kinds), 5, len(LEVELS)), np.float64)
    absent = [kind for kind, one in zip(kinds, found, strict=True) if np.isnan(one).all()]
    given = found[[kind not in absent for kind in kinds]]
    assert np.isfinite(given).all()
    assert (np.diff(given, axis=-1) >= 0).all()
    wanted = {
        "seasonal-naive": ["missing"],
        "auto-ets": ["one point", "three points", "missing"],
        "auto-arima": ["missing"],
        "theta": ["one point", "three points", "missing"],
        "lightgbm": ["constant", "zero", "one point", "three points", "missing"],
    }
    assert absent == wanted[name]
    assert made(name).predict([], 5, LEVELS).shape == (0, 5, len(LEVELS))


@pytest.mark.parametrize("name", ["seasonal-naive", "auto-ets", "theta"])
def test_a_forecast_depends_on_its_own_series_alone(name: str) -> None:
    values = seasonal(4, 24)
    together = made(name).predict(contexts(values), 3, LEVELS)
    backwards = made(name).predict(contexts(values)[::-1], 3, LEVELS)[::-1]
    alone = made(name).predict(contexts(values)[2:3], 3, LEVELS)
    np.testing.assert_array_equal(together, backwards)
    np.testing.assert_array_equal(together[2:3], alone)


@pytest.mark.parametrize("name", NAMES)
def test_no_baseline_sees_what_comes(tmp_path: Path, name: str) -> None:
    values = seasonal(3, 30)
    spiked = [one.copy() for one in values]
    plan = WindowPlan(horizon=3, windows=2, step=3)
    for one in spiked:
        one[-6:] += 1e6
    usual = next(rolling_windows(series_table(tmp_path, values), plan))
    other = next(rolling_windows(series_table(tmp_path, spiked), plan))
    assert (other.actual - usual.actual).min() > 1e5
    found = made(name).predict(usual.contexts, 3, LEVELS)
    np.testing.assert_array_equal(found, made(name).predict(other.contexts, 3, LEVELS))
    assert np.abs(found).max() < 1e4


@pytest.mark.parametrize("name", ["auto-ets", "theta", "lightgbm"])
def test_baselines_beat_seasonal_naive_on_series_with_trend_and_season(name: str) -> None:
    values = seasonal(12, 70)
    known, came = [one[:-6] for one in values], np.stack([one[-6:] for one in values])
    scale = seasonal_errors(known, np.full(12, 4))
    losses = {
        made(one).name: Errors(came, made(one).predict(contexts(known), 6, LEVELS), LEVELS, scale).overall()["sql"]
        for one in ("seasonal-naive", name)
    }
    assert losses[name] < losses["seasonal-naive"]


def test_statistical_models_are_fitted_to_the_latest_points() -> None:
    (values,) = seasonal(1, 60)
    recent = Statistical("theta", 24).predict(contexts([values]), 3, LEVELS)
    np.testing.assert_array_equal(recent, Statistical("theta").predict(contexts([values[-24:]]), 3, LEVELS))


@pytest.mark.slow
def test_processes_do_not_change_forecasts() -> None:
    series = contexts(seasonal(420, 20))
    one = Statistical("theta", workers=1).predict(series, 3, LEVELS)
    np.testing.assert_array_equal(one, Statistical("theta", workers=2).predict(series, 3, LEVELS))


def test_boosting_learns_across_series_and_seasons_apart() -> None:
    values = seasonal(6, 60)
    mixed = contexts(values[:3]) + contexts(values[3:], season=12)
    found = GradientBoosting().predict(mixed, 4, LEVELS)
    np.testing.assert_array_equal(found[:3], GradientBoosting().predict(contexts(values[:3]), 4, LEVELS))
    np.testing.assert_array_equal(found, GradientBoosting().predict(mixed, 4, LEVELS))
    alone = GradientBoosting().predict(contexts(values[:1]), 4, LEVELS)
    assert np.abs(alone - found[:1]).max() > 0


def test_boosted_forecasts_grow_with_the_series() -> None:
    values = seasonal(5, 60)
    grown = [one * 1000 for one in values]
    found = GradientBoosting().predict(contexts(values), 4, LEVELS)
    np.testing.assert_allclose(GradientBoosting().predict(contexts(grown), 4, LEVELS), 1000 * found, rtol=1e-3)
