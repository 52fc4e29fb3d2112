"""Rolling origins: where they lie, what is seen before each, and that it equals what `fev` gives a model."""

from __future__ import annotations

from pathlib import Path

import datasets
import fev
import numpy as np
import pandas as pd
import pytest

from modelmill.components.core.errors import UserError
from modelmill.components.forecasting.series_table import SeriesTable
from modelmill.components.forecasting.windows import WindowPlan, rolling_windows, stamps

from .backtests import series_table, write_series


def test_windows_end_with_the_series(tmp_path: Path) -> None:
    table = series_table(tmp_path, [np.arange(20.0), np.arange(9.0)], horizon=5, windows=2)
    windows = list(rolling_windows(table, WindowPlan(horizon=3, windows=3, step=2)))
    assert [window.origins.tolist() for window in windows] == [[13, 2], [15, 4], [17, 6]]
    assert windows[0].actual.tolist() == [[13, 14, 15], [2, 3, 4]]
    assert windows[2].actual.tolist() == [[17, 18, 19], [6, 7, 8]]
    for window in windows:
        for item, origin, context in zip(window.items, window.origins, window.contexts, strict=True):
            assert context.target.tolist() == list(range(origin)), "all before the origin, nothing after"
            assert context.item_id == f"item-{item}"
    times = stamps(table, windows[0].items, windows[0].origins)
    assert np.datetime_as_string(times, unit="D").tolist() == ["2003-04-01", "2000-07-01"]


def test_only_known_covariates_reach_beyond_the_origin(tmp_path: Path) -> None:
    path = tmp_path / "series.arrow"
    write_series(path, [np.arange(10.0)], known=[np.arange(100.0, 112.0)], past=[np.arange(200.0, 210.0)])
    table = SeriesTable(path, horizon=3, windows=1)
    (window,) = rolling_windows(table, WindowPlan(horizon=3, windows=1, step=3, context_length=4))
    (context,) = window.contexts
    assert context.target.tolist() == [3, 4, 5, 6]
    assert context.past["p"].tolist() == [203, 204, 205, 206]
    assert context.past["k"].tolist() == [103, 104, 105, 106]
    assert {name: values.tolist() for name, values in context.future.items()} == {"k": [107, 108, 109]}


def test_series_that_cannot_be_judged_are_left_out_and_counted(tmp_path: Path) -> None:
    nothing = np.full(10, np.nan)
    blind, unseen = np.arange(10.0), np.arange(10.0)
    blind[:7], unseen[7:] = np.nan, np.nan
    table = series_table(
        tmp_path, [np.arange(10.0), nothing, blind, unseen, np.arange(3.0), np.arange(4.0)], windows=1
    )
    (window,) = rolling_windows(table, WindowPlan(horizon=3, windows=1, step=3))
    assert (window.items.tolist(), window.skipped) == ([0, 5], 4)
    (window,) = rolling_windows(table, WindowPlan(horizon=3, windows=1, step=3, min_context=2))
    assert window.items.tolist() == [0]
    (window,) = rolling_windows(table, WindowPlan(horizon=50, windows=1, step=1))
    assert (window.contexts, window.actual.shape, window.skipped) == ([], (0, 50), 6)


def test_windows_over_points_that_were_trained_on_are_refused(tmp_path: Path) -> None:
    table = series_table(tmp_path, [np.arange(20.0)], horizon=3, windows=2)
    WindowPlan(horizon=2, windows=3, step=2).check_held_back(table)
    WindowPlan(horizon=4, windows=3, step=1).check_held_back(table)
    with pytest.raises(UserError, match=r"backtest.windows: 3 windows of 3 steps, 3 apart, cover the last 9 points"):
        WindowPlan(horizon=3, windows=3, step=3).check_held_back(table)


@pytest.mark.parametrize("step", [2, 5])
@pytest.mark.parametrize("length", [None, 7])
def test_windows_equal_those_of_fev(tmp_path: Path, step: int, length: int | None) -> None:
    random = np.random.default_rng(0)
    values = [random.integers(0, 100, size).astype(float) for size in (30, 17, 40, 8, 11)]  # fev reads them as float32
    table = series_table(tmp_path, values, horizon=5, windows=4)
    rows = [
        {"id": f"item-{place}", "timestamp": pd.date_range("2000", periods=len(one), freq="QS"), "target": one}
        for place, one in enumerate(values)
    ]
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "data.parquet"))
    task = fev.Task(
        dataset_path=str(tmp_path / "data.parquet"),
        horizon=5,
        num_windows=3,
        window_step_size=step,
        min_context_length=2,
        max_context_length=length,
    )
    plan = WindowPlan(horizon=5, windows=3, step=step, context_length=length, min_context=2)
    pairs = list(zip(rolling_windows(table, plan), task.iter_windows(), strict=True))
    assert len(pairs) == 3
    for ours, theirs in pairs:
        past, _ = theirs.get_input_data()
        truth = theirs.get_ground_truth()
        assert [context.item_id for context in ours.contexts] == list(past["id"])
        for context, actual, before, after in zip(ours.contexts, ours.actual, past, truth, strict=True):
            np.testing.assert_array_equal(context.target, before["target"])
            np.testing.assert_array_equal(actual, after["target"])
