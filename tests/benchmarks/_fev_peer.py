"""How far the metrics of the backtest lie from those of `fev`, on the same forecasts."""

from __future__ import annotations

import warnings

import numpy as np
from fev.metrics import get_metric

from modelmill.components.forecasting.metrics import METRICS, Errors, seasonal_errors

LEVELS = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]


def fev_metric_difference(series: int = 1000, horizon: int = 24, seed: int = 0) -> float:
    """Largest relative difference of any metric, over seasons of 1, 7 and 24 steps.

    Series are of different sizes and lengths; points are missing before and after the origin, some series are constant
    and some shorter than a season.
    """
    random = np.random.default_rng(seed)
    sizes = 10.0 ** random.integers(-3, 6, series)
    targets = [size * random.normal(1, 1, random.integers(1, 200)) for size in sizes]
    for place in range(0, series, 10):
        targets[place][:] = sizes[place]
    actual = sizes[:, None] * random.normal(1, 1, (series, horizon))
    for values in [*targets, *actual]:
        values[random.random(len(values)) < 0.05] = np.nan
    spread = np.sort(random.normal(1, 1, (series, horizon, len(LEVELS))), axis=-1)
    forecast = sizes[:, None, None] * spread
    largest = 0.0
    for season in (1, 7, 24):
        ours = Errors(actual, forecast, LEVELS, seasonal_errors(targets, np.full(series, season))).overall()
        for name in METRICS:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                theirs = get_metric(name).compute(
                    y_true=actual[..., None],
                    y_pred=forecast[..., [LEVELS.index(0.5)]],
                    y_past=np.concatenate(targets)[:, None],
                    y_past_lengths=np.array([len(target) for target in targets]),
                    q_pred=forecast[:, :, None, :],
                    seasonality=season,
                    quantile_levels=LEVELS,
                )
            largest = max(largest, abs(ours[name] - theirs) / abs(theirs))
    return largest
