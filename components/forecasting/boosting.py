"""Gradient boosting on lags: LightGBM through `mlforecast`, one model for all series of a frequency."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from modelmill.components.forecasting.baselines import filled
from modelmill.components.forecasting.metrics import seasonal_errors
from modelmill.components.forecasting.series_table import Context

if TYPE_CHECKING:
    import pandas as pd

_RECENT = 12  # lags from 1 on
_CALIBRATIONS = 4  # earlier origins that the errors are taken from, at most
_ENOUGH = 20  # errors a step ahead before each step gets quantiles of its own
_ROWS = 2_000_000  # points the model is fitted to at most
_FEW = 20_000  # points below which trees are small, and one thread is faster than several
_TREES: dict[str, Any] = {
    "n_estimators": 100,
    "min_child_samples": 5,
    "deterministic": True,
    "force_row_wise": True,
    "verbosity": -1,
}


@dataclass(frozen=True)
class GradientBoosting:
    """LightGBM on the last points, those one and two seasons ago and a season's mean, fed with its own forecasts.

    Targets are changes over a season by their size, so that series of all sizes learn from each other and trends go
    on; the forecast of a series therefore depends on the other series of the call. Quantiles are split-conformal:
    the model is fitted without the last few horizons, its errors there, by each series' size, are pooled over
    series, and their quantiles are added to the forecast of a model that is fitted to everything.

    Attributes:
        fitted_points: most recent points of a series that are used.
    """

    fitted_points: int = 1000

    @property
    def name(self) -> str:
        return "lightgbm"

    def predict(self, contexts: Sequence[Context], horizon: int, quantiles: Sequence[float]) -> np.ndarray:
        """See `Forecaster`; nan for series that are too short to hold back two horizons after two seasons."""
        found = np.full((len(contexts), horizon, len(quantiles)), np.nan)
        targets = [filled(context.target[-self.fitted_points :]) for context in contexts]
        groups: dict[int, list[int]] = defaultdict(list)
        for place, (context, target) in enumerate(zip(contexts, targets, strict=True)):
            if len(target) >= 2 * context.season_length + 2 * horizon + 3 and np.ptp(target) > 0:
                groups[context.season_length].append(place)
        for season, places in groups.items():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of features that a short series does not have yet
                found[places] = _forecast([targets[place] for place in places], season, horizon, quantiles)
        return found


def _forecast(targets: list[np.ndarray], season: int, horizon: int, quantiles: Sequence[float]) -> np.ndarray:
    """Quantiles of series with one season length, [series, horizon, quantiles]."""
    seasons = np.full(len(targets), season)
    held = [min(_CALIBRATIONS, (len(target) - 2 * season - 3) // horizon - 1) for target in targets]
    origins = min(held)
    sizes = seasonal_errors(targets, seasons)
    sizes = np.where(sizes > 0, sizes, [np.abs(np.diff(target)).mean() for target in targets])
    scaled = [target / size for target, size in zip(targets, sizes, strict=True)]
    model = _fitted([target[: -origins * horizon] for target in scaled], season)
    errors = []
    for left in range(origins, 0, -1):
        known = [target[: -left * horizon] for target in scaled]
        came = np.stack([target[len(target) - left * horizon :][:horizon] for target in scaled])
        errors.append(came - _points(model, known, horizon))
    point = _points(_fitted(scaled, season), scaled, horizon)
    spread = _spread(np.concatenate(errors), quantiles)
    return np.sort(point[..., None] + spread, axis=-1) * sizes[:, None, None]


def _spread(errors: np.ndarray, quantiles: Sequence[float]) -> np.ndarray:
    """Quantiles of the errors of each step ahead, [horizon, quantiles]; of all steps together where they are few."""
    if len(errors) < _ENOUGH:
        return np.broadcast_to(np.quantile(errors, quantiles), (errors.shape[1], len(quantiles)))
    return np.quantile(errors, quantiles, axis=0).T


def _fitted(targets: list[np.ndarray], season: int) -> Any:
    """A model that is fitted to some series, evenly chosen where there are too many points."""
    from lightgbm import LGBMRegressor
    from mlforecast import MLForecast
    from mlforecast.lag_transforms import RollingMean
    from mlforecast.target_transforms import Differences

    points = sum(len(target) for target in targets)
    stride = -(-points // _ROWS)
    shape: dict[str, Any] = {"num_leaves": 8, "n_jobs": 1} if points < _FEW else {"num_leaves": 31}
    lags = sorted({*range(1, _RECENT + 1), season, 2 * season})
    model = MLForecast(
        models={"point": LGBMRegressor(**_TREES, **shape)},
        freq=1,
        lags=lags,
        lag_transforms={1: [RollingMean(window_size=max(season, 4), min_samples=1)]},
        target_transforms=[Differences([season])],
    )
    return model.fit(_frame(targets[::stride]), static_features=[], dropna=False)


def _points(model: Any, targets: list[np.ndarray], horizon: int) -> np.ndarray:
    """Forecasts after some series, [series, horizon]."""
    return model.predict(horizon, new_df=_frame(targets))["point"].to_numpy().reshape(len(targets), horizon)


def _frame(targets: list[np.ndarray]) -> pd.DataFrame:
    import pandas as pd

    lengths = [len(target) for target in targets]
    times = np.concatenate([np.arange(length) for length in lengths])
    return pd.DataFrame(
        {"unique_id": np.repeat(np.arange(len(targets)), lengths), "ds": times, "y": np.concatenate(targets)}
    )
