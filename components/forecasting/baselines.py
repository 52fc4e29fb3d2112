"""Baselines that every backtest can show: Seasonal Naive, and AutoETS, AutoARIMA and theta of `statsforecast`."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from typing import Any

import numpy as np

from modelmill.components.forecasting.backtest_config import BacktestConfig
from modelmill.components.forecasting.forecaster import Forecaster
from modelmill.components.forecasting.seasonal_naive import SeasonalNaive
from modelmill.components.forecasting.series_table import Context

logger = logging.getLogger("modelmill")
_WORTH_A_PROCESS = 200  # series; starting one takes seconds of imports
_CHUNK = 16  # series a process takes at a time
_MODELS = {"auto-ets": "AutoETS", "auto-arima": "AutoARIMA", "theta": "AutoTheta"}


def baselines_of(config: BacktestConfig) -> list[Forecaster]:
    """The baselines of a section, Seasonal Naive first."""
    found: list[Forecaster] = [SeasonalNaive()]
    for name in config.baselines:
        if name == "lightgbm":
            # Imported here, so that a backtest without it does not pay for pandas and LightGBM.
            from modelmill.components.forecasting.boosting import GradientBoosting

            found.append(GradientBoosting(config.fitted_points))
        else:
            found.append(Statistical(name, config.fitted_points, config.workers))
    return found


def filled(target: np.ndarray) -> np.ndarray:
    """A target from its first point on, missing points on a line between their neighbours, the last one held."""
    present = np.flatnonzero(~np.isnan(target))
    if not len(present):
        return np.empty(0)
    return np.interp(np.arange(present[0], len(target)), present, target[present])


@dataclass(frozen=True)
class Statistical:
    """A model of `statsforecast`, fitted to each series on its own.

    Seasons beyond 24 steps are too long for the exponential smoothing of `auto-ets`, which then leaves them out.

    Attributes:
        name: `auto-ets`, `auto-arima` or `theta`.
        fitted_points: most recent points that it is fitted to.
        workers: processes at most; None for one a core. They do not change the forecasts.
    """

    name: str
    fitted_points: int = 1000
    workers: int | None = None

    def predict(self, contexts: Sequence[Context], horizon: int, quantiles: Sequence[float]) -> np.ndarray:
        """See `Forecaster`; nan where the model cannot be fitted, as to a series of a few points."""
        jobs = [(filled(context.target[-self.fitted_points :]), context.season_length) for context in contexts]
        fit = partial(_fit, name=self.name, horizon=horizon, quantiles=tuple(quantiles))
        processes = min(self.workers or os.cpu_count() or 1, len(jobs) // _WORTH_A_PROCESS)
        if processes > 1:
            with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
                results = list(pool.map(fit, jobs, chunksize=_CHUNK))
        else:
            results = [fit(job) for job in jobs]
        reasons = [result for result in results if isinstance(result, str)]
        if reasons:
            logger.info("%s could not forecast %d of %d series: %s", self.name, len(reasons), len(jobs), reasons[0])
        nothing = np.full((horizon, len(quantiles)), np.nan)
        found = [nothing if isinstance(result, str) else result for result in results]
        return np.stack(found) if found else np.empty((0, horizon, len(quantiles)))


def _fit(job: tuple[np.ndarray, int], *, name: str, horizon: int, quantiles: tuple[float, ...]) -> np.ndarray | str:
    """Quantiles of a series [horizon, quantiles], or why there are none."""
    from statsforecast import models

    values, season = job
    if not len(values):
        return "it has no point"
    levels = sorted({_level(quantile) for quantile in quantiles if quantile != 0.5})
    # A scale of about 1 keeps the optimizers from giving up on very large or small numbers.
    size = float(np.abs(values).mean()) or 1.0
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            model = getattr(models, _MODELS[name])(season_length=season)
            found: dict[str, Any] = model.forecast(values / size, horizon, level=levels)
    except Exception as error:  # whatever a library raises about one series, the others go on
        return f"{type(error).__name__}: {str(error)[:100]}"
    columns = []
    for quantile in quantiles:
        side = "lo" if quantile < 0.5 else "hi"
        column = found["mean"] if quantile == 0.5 else found[f"{side}-{_level(quantile)}"]
        columns.append(np.asarray(column, np.float64))
    forecast = np.sort(np.stack(columns, axis=1) * size, axis=1)
    return forecast if np.isfinite(forecast).all() else "its forecast is not finite"


def _level(quantile: float) -> float:
    """Coverage in percent of the central interval that a quantile bounds."""
    return round(abs(2 * quantile - 1) * 100, 9)
