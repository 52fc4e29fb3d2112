"""Errors of forecasts against `fev`, on the same forecasts."""

from __future__ import annotations

import warnings
from typing import Any

import fev
import numpy as np
import pandas as pd
import pytest
from fev.metrics import get_metric

from modelmill.components.forecasting.metrics import (
    Errors,
    geometric_means,
    intervals,
    mean_of_present,
    relative_errors,
    seasonal_errors,
    win_rates,
)

from .backtests import LEVELS


def forecasts(count: int, horizon: int = 5, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Actuals with some points missing, and quantiles around other numbers."""
    random = np.random.default_rng(seed)
    size = 10.0 ** random.integers(-2, 4, (count, 1))
    actual = size * random.normal(1, 1, (count, horizon))
    actual[random.random((count, horizon)) < 0.15] = np.nan
    middle = size * random.normal(1, 1, (count, horizon))
    spread = np.sort(random.normal(0, 1, (count, horizon, len(LEVELS))), axis=-1)
    return actual, middle[..., None] + size[..., None] * spread


def histories(count: int, seed: int = 0) -> list[np.ndarray]:
    """Targets of different lengths: some constant, some shorter than a season, some with missing points, one without
    any point."""
    random = np.random.default_rng(seed)
    found = [random.normal(0, 10.0 ** random.integers(-2, 4), random.integers(1, 40)) for _ in range(count)]
    for place in range(0, count, 4):
        found[place] = np.where(random.random(len(found[place])) < 0.4, np.nan, found[place])
    for place in range(1, count, 9):
        found[place] = np.full(20, 3.0)
    found[2] = np.full(15, np.nan)
    return found


def of_fev(name: str, actual: np.ndarray, forecast: np.ndarray, targets: list[np.ndarray], season: int) -> float:
    past = np.concatenate(targets)[:, None]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_metric(name).compute(
            y_true=actual[..., None],
            y_pred=forecast[..., [LEVELS.index(0.5)]],
            y_past=past,
            y_past_lengths=np.array([len(target) for target in targets]),
            q_pred=forecast[:, :, None, :],
            seasonality=season,
            quantile_levels=LEVELS,
        )


@pytest.mark.parametrize("season", [1, 4, 12])
@pytest.mark.parametrize("seed", [0, 1])
def test_metrics_equal_those_of_fev(season: int, seed: int) -> None:
    actual, forecast = forecasts(60, seed=seed)
    targets = histories(60, seed)
    scale = seasonal_errors(targets, np.full(60, season))
    assert np.isnan(scale).any(), "a series too short for a seasonal error is among them"
    assert (scale == 0).any(), "and one that is constant"
    found = Errors(actual, forecast, LEVELS, scale).overall()
    assert found.keys() == {"sql", "wql", "mase", "mae", "rmse"}
    for name, value in found.items():
        assert value == pytest.approx(of_fev(name, actual, forecast, targets, season), rel=1e-9, abs=0)


@pytest.mark.parametrize("name", ["sql", "mase"])
def test_metrics_of_an_item_are_those_of_a_task_with_it_alone(name: str) -> None:
    actual, forecast = forecasts(60)
    targets = histories(60)
    scale = seasonal_errors(targets, np.full(60, 4))
    found = Errors(actual, forecast, LEVELS, scale).by_item()[name]
    for place in range(60):
        alone = of_fev(name, actual[[place]], forecast[[place]], [targets[place]], 4)
        assert found[place] == pytest.approx(alone, rel=1e-9, abs=0, nan_ok=True)


def test_weighted_losses_of_items_add_up() -> None:
    actual, forecast = forecasts(30)
    actual = np.nan_to_num(actual, nan=0.0)
    errors = Errors(actual, forecast, LEVELS, np.ones(30))
    assert errors.by_item()["wql"].mean() == pytest.approx(errors.overall()["wql"], rel=1e-12)


def test_what_nothing_defines_is_nan_and_says_nothing() -> None:
    actual = np.array([[np.nan, np.nan], [0.0, 0.0]])
    errors = Errors(actual, np.zeros((2, 2, 1)), [0.5], np.array([1.0, 0.0]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        overall, by_item = errors.overall(), errors.by_item()
    assert np.isnan([overall["sql"], overall["wql"], overall["mase"]]).all()
    assert (overall["mae"], overall["rmse"], errors.observed) == (0.0, 0.0, 2)
    assert np.isnan(by_item["sql"]).all()
    assert np.isnan(by_item["mae"]).tolist() == [True, False]
    assert np.isnan(mean_of_present(np.empty(0)))
    assert seasonal_errors([], np.empty(0, np.int64)).shape == (0,)


def test_calibration_and_coverage() -> None:
    actual = np.array([[0.0, 1.0, 2.0, np.nan]])
    forecast = np.broadcast_to(np.array([0.5, 1.0, 2.0]), (1, 4, 3))
    errors = Errors(actual, forecast, [0.1, 0.5, 0.9], np.ones(1))
    assert errors.below.tolist() == [1, 2, 3]
    assert (errors.covered.tolist(), errors.observed) == ([2], 3)
    assert intervals([0.1, 0.3, 0.5, 0.7, 0.8, 0.9]) == [(0, 5), (1, 3)]
    assert intervals([0.5]) == []


def test_a_gaussian_forecast_of_gaussian_actuals_is_calibrated() -> None:
    from scipy.special import ndtri

    random = np.random.default_rng(3)
    actual = random.normal(5, 2, (400, 10))
    forecast = np.broadcast_to(5 + 2 * ndtri(np.array(LEVELS)), (400, 10, len(LEVELS)))
    errors = Errors(actual, forecast, LEVELS, np.ones(400))
    assert errors.below / errors.observed == pytest.approx(LEVELS, abs=0.03)
    assert errors.covered / errors.observed == pytest.approx([0.8, 0.5], abs=0.03)


def summaries(errors: np.ndarray) -> list[dict[str, Any]]:
    names = [f"model-{place}" for place in range(errors.shape[1])]
    task = {"horizon": 1, "quantile_levels": [0.5], "fev_version": fev.__version__}
    return [
        {"dataset_path": f"task-{row}", "model_name": name, "test_error": value, "num_forecasts": 1} | task
        for row, values in enumerate(errors)
        for name, value in zip(names, values, strict=True)
    ]


def test_skill_and_win_rate_equal_those_of_fev() -> None:
    random = np.random.default_rng(0)
    errors = 10.0 ** random.normal(0, 1.5, (40, 5))
    errors[3] = errors[3, 0]  # a tie
    errors[4, 2], errors[5, 3] = errors[4, 0] / 1e4, errors[5, 0] * 1e4  # clipped
    ratios = relative_errors(errors, 0)
    assert (ratios.min(), ratios.max()) == (0.01, 100.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        table: pd.DataFrame = fev.leaderboard(summaries(errors), baseline_model="model-0").sort_index()
    assert 1 - geometric_means(ratios) == pytest.approx(table["skill_score"].to_numpy(), rel=1e-9, abs=1e-12)
    assert win_rates(ratios) == pytest.approx(table["win_rate"].to_numpy(), rel=1e-9)


def test_errors_of_zero_relative_to_zero() -> None:
    ratios = relative_errors(np.array([[0.0, 0.0, 2.0], [1.0, 0.0, 3.0]]), 0)
    assert ratios.tolist() == [[1.0, 1.0, 100.0], [1.0, 0.01, 3.0]]
    assert np.isnan(win_rates(ratios[:, :1])).all()
