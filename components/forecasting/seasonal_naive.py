"""Seasonal Naive: what was a season ago comes again. The measure of all other forecasts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.special import ndtri

from modelmill.components.forecasting.backtest_config import SEASONAL_NAIVE
from modelmill.components.forecasting.series_table import Context

_BLOCK = 1 << 22  # points and season cells that are worked on together


class SeasonalNaive:
    """Repeats each series' last season, with the normal intervals of a seasonal random walk.

    In the `k`-th season ahead (from 0 on) the standard deviation is that of the changes over a season, times
    `sqrt(k + 1)` (Hyndman and Athanasopoulos, Forecasting: Principles and Practice, 5.5), which is what
    `statsforecast` and fev-bench do. A missing point of the last season is taken from the last season that has it, or
    else is the last point there is. Series shorter than two seasons take the changes from point to point instead.
    """

    name = SEASONAL_NAIVE

    def predict(self, contexts: Sequence[Context], horizon: int, quantiles: Sequence[float]) -> np.ndarray:
        """See `Forecaster`; only a series without any point is nan."""
        found = np.full((len(contexts), horizon, len(quantiles)), np.nan)
        sizes = np.cumsum([len(context.target) + context.season_length for context in contexts], dtype=np.int64)
        for block in np.split(np.arange(len(contexts)), np.flatnonzero(np.diff(sizes // _BLOCK)) + 1):
            if len(block):
                found[block] = _forecast([contexts[place] for place in block], horizon, quantiles)
        return found


def _forecast(contexts: Sequence[Context], horizon: int, quantiles: Sequence[float]) -> np.ndarray:
    lengths = np.array([len(context.target) for context in contexts])
    seasons = np.array([context.season_length for context in contexts])
    values = np.concatenate([context.target for context in contexts])
    owner = np.repeat(np.arange(len(lengths)), lengths)
    left = np.repeat(np.cumsum(lengths), lengths) - np.arange(len(values))  # 1 for the last point of a series
    present = np.flatnonzero(~np.isnan(values))
    last = np.full(len(lengths), np.nan)
    last[owner[present]] = values[present]  # of equal places the last assignment stays
    cells = np.cumsum(seasons) - seasons
    season = np.repeat(last, seasons)  # of each phase the last value; phase 0 is that of the first forecast
    season[cells[owner[present]] + (-left[present]) % seasons[owner[present]]] = values[present]
    steps = np.arange(horizon)
    median = season[cells[:, None] + steps % seasons[:, None]]
    deviation = _deviations(values, owner, lengths, seasons)[:, None] * np.sqrt(steps // seasons[:, None] + 1)
    return median[..., None] + deviation[..., None] * ndtri(np.array(quantiles))


def _deviations(values: np.ndarray, owner: np.ndarray, lengths: np.ndarray, seasons: np.ndarray) -> np.ndarray:
    """Root mean square of the changes over a season, or from point to point where there is none of them; [series]."""
    at = np.arange(len(values)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    size = np.zeros(len(lengths))
    np.fmax.at(size, owner, np.abs(values))  # squares of very large or small numbers would be infinite or 0
    size[size == 0] = 1.0
    found = np.full(len(lengths), np.nan)
    for lags in (seasons, np.ones_like(seasons)):
        rows = np.flatnonzero((at >= lags[owner]) & np.isnan(found)[owner])
        squares = ((values[rows] - values[rows - lags[owner[rows]]]) / size[owner[rows]]) ** 2
        present = ~np.isnan(squares)
        owners = owner[rows][present]
        counts = np.bincount(owners, minlength=len(lengths))
        sums = np.bincount(owners, squares[present], minlength=len(lengths))
        found = np.where(counts > 0, np.sqrt(sums / np.maximum(counts, 1)), found)
    return np.nan_to_num(found) * size
