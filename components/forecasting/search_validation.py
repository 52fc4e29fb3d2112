"""Where a search trains and where it validates: no trial sees a validation window, and neither a backtest window."""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from modelmill.components.core.errors import UserError
from modelmill.components.core.manifest import Manifest
from modelmill.components.forecasting.evaluate import evaluate
from modelmill.components.forecasting.forecast_model import open_forecaster
from modelmill.components.forecasting.search_config import SearchConfig
from modelmill.components.forecasting.series_table import SeriesTable, open_series
from modelmill.components.forecasting.windows import WindowPlan, rolling_windows


@dataclass(frozen=True)
class Judgement:
    """What validation found of a model.

    Attributes:
        value: of the search's metric, lower is better; nan where the model cannot be judged.
        problem: why it cannot; empty otherwise.
    """

    value: float
    problem: str = ""


def horizon_of(config: SearchConfig, table: SeriesTable) -> int:
    """Steps of a validation window.

    Raises:
        UserError: neither section nor series name them, or they name different ones.
    """
    held = table.horizon if table.windows else 0
    if held and config.horizon not in (None, held):
        raise UserError(f"search.horizon: {config.horizon} is not the {held} of the series; leave it out")
    if not (held or config.horizon):
        raise UserError("search.horizon: the series name none; set one, such as 24")
    return held or int(config.horizon or 0)


def training_view(config: SearchConfig, series: Manifest) -> Manifest:
    """The same series, holding back the validation windows too: training steps read nothing that is held back."""
    table = open_series(series)
    horizon, tested = horizon_of(config, table), table.windows if table.horizon else 0
    metadata = {**series.metadata, "horizon": horizon, "windows": tested + config.validation_windows}
    return series.model_copy(update={"metadata": metadata})


def judge(config: SearchConfig, series: Manifest, model: Manifest) -> Judgement:
    """Forecast the validation windows, which end where those of the backtest begin.

    Args:
        config: of the search.
        series: as `prepare_series` made them, not a training view.
        model: that is judged.

    Raises:
        UserError: no series has a validation window.
    """
    table = open_series(series)
    horizon, tested = horizon_of(config, table), table.windows if table.horizon else 0
    # Windows lie end to end, the oldest first; the later ones are the backtest's and never made.
    plan = WindowPlan(horizon, tested + config.validation_windows, horizon, min_context=config.min_context)
    windows = islice(rolling_windows(table, plan), config.validation_windows)
    forecaster = open_forecaster(model, config.use)
    with tempfile.TemporaryDirectory() as folder:
        found = evaluate(windows, horizon, [forecaster], config.quantiles, Path(folder))
    if not len(found.items):
        raise UserError(
            f"search.validation_windows: no series has {config.validation_windows} windows of {horizon} steps before"
            f" the {tested} of the backtest, with {config.min_context} or more points before them; lower it, or give"
            " longer series"
        )
    (judged,) = found.judged
    if judged.fallbacks:  # a Seasonal Naive stood in for them, which is not what is judged here
        return Judgement(math.nan, f"{judged.fallbacks} of {len(found.items)} forecasts are not finite")
    value = judged.metrics().get(config.metric, math.nan)
    return Judgement(value, "" if math.isfinite(value) else f"no validation window defines {config.metric}")
