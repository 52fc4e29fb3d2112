"""Forecast every window with every forecaster, and keep what is needed to judge them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from modelmill.components.core import events
from modelmill.components.forecasting.forecaster import Forecaster
from modelmill.components.forecasting.metrics import METRICS, Errors, intervals, mean_of_present, seasonal_errors
from modelmill.components.forecasting.seasonal_naive import SeasonalNaive
from modelmill.components.forecasting.windows import Window

_LARGEST = 1e300  # errors of larger forecasts would overflow


@dataclass
class Judged:
    """What was found of one forecaster over all windows.

    Attributes:
        name: of the forecaster.
        fallbacks: forecasts that it could not make, and Seasonal Naive made instead.
        seconds: that it took to forecast.
        overall: metrics of each window, as `fev` computes them.
        by_item: metrics of each row, one array a window.
        losses: scaled quantile losses by step, sums and numbers of them, [2, horizon].
        below: actuals at or below each quantile, [quantiles].
        covered: actuals inside each central interval, [intervals].
        files: where its forecasts of a window are, float64 [items, horizon, quantiles], by the window's number.
    """

    name: str
    fallbacks: int = 0
    seconds: float = 0.0
    overall: list[dict[str, float]] = field(default_factory=list)
    by_item: list[dict[str, np.ndarray]] = field(default_factory=list)
    losses: np.ndarray = field(default_factory=lambda: np.zeros(0))
    below: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    covered: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    files: dict[int, Path] = field(default_factory=dict)

    def metrics(self) -> dict[str, float]:
        """Metrics over all windows, their mean as in `fev`; without those that no window defines."""
        means = {name: float(mean_of_present(np.array([one[name] for one in self.overall]))) for name in METRICS}
        return {name: value for name, value in means.items() if np.isfinite(value)}

    def rows(self, metric: str) -> np.ndarray:
        """A metric of every row, in the order of `Evaluation.items`."""
        return np.concatenate([one[metric] for one in self.by_item]) if self.by_item else np.empty(0)

    def by_step(self) -> np.ndarray:
        """Scaled quantile loss of each step ahead, [horizon]."""
        return np.where(self.losses[1] > 0, self.losses[0] / np.maximum(self.losses[1], 1), np.nan)


@dataclass(frozen=True)
class Evaluation:
    """Forecasters on the same windows.

    Attributes:
        judged: each forecaster, in the order given.
        levels: of the quantiles.
        items: series of each row, int64 [rows]; a row is a window of a series.
        windows: window of each row, int64 [rows].
        origins: position of its first forecast point, int64 [rows].
        actual: what came, one array [items, horizon] a window.
        skipped: windows of series that could not be judged.
        observed: actuals that were not missing.
    """

    judged: list[Judged]
    levels: Sequence[float]
    items: np.ndarray
    windows: np.ndarray
    origins: np.ndarray
    actual: list[np.ndarray]
    skipped: int
    observed: int

    def row_of(self, item: int, window: int) -> int | None:
        """Place of an item among those of a window, None if it was skipped there."""
        found = np.flatnonzero(self.items[self.windows == window] == item)
        return int(found[0]) if len(found) else None


def forecast_window(
    forecaster: Forecaster, window: Window, horizon: int, levels: Sequence[float]
) -> tuple[np.ndarray, int]:
    """Forecasts of a window, Seasonal Naive's where the forecaster has none or not a finite one.

    A series without a point before its origin, which only some benchmarks have, is forecast as 0.

    Returns:
        float64 [items, horizon, quantiles], and how many series Seasonal Naive stood in for.

    Raises:
        ValueError: the forecaster returned another shape.
    """
    found = np.array(forecaster.predict(window.contexts, horizon, levels), np.float64)
    wanted = (len(window.contexts), horizon, len(levels))
    if found.shape != wanted:
        raise ValueError(f"{forecaster.name} returned forecasts of shape {found.shape}, not {wanted}")
    failed = np.flatnonzero(~(np.abs(found) < _LARGEST).all((1, 2)))
    if len(failed):
        naive = SeasonalNaive().predict([window.contexts[place] for place in failed], horizon, levels)
        found[failed] = np.nan_to_num(naive)
    return found, len(failed)


def evaluate(
    windows: Iterable[Window], horizon: int, forecasters: Sequence[Forecaster], levels: Sequence[float], folder: Path
) -> Evaluation:
    """Forecast and score windows.

    Args:
        windows: such as `rolling_windows` gives, at least one.
        horizon: their steps.
        forecasters: at least one.
        levels: of the quantiles, rising, 0.5 among them.
        folder: existing; takes the forecasts, one file a forecaster and window.
    """
    pairs = len(intervals(levels))
    judged = [
        Judged(
            forecaster.name,
            losses=np.zeros((2, horizon)),
            below=np.zeros(len(levels), np.int64),
            covered=np.zeros(pairs, np.int64),
        )
        for forecaster in forecasters
    ]
    items, numbers, origins, actual, skipped, observed = [], [], [], [], 0, 0
    for window in windows:
        items.append(window.items)
        numbers.append(np.full(len(window.items), window.number))
        origins.append(window.origins)
        actual.append(window.actual)
        skipped += window.skipped
        observed += int((~np.isnan(window.actual)).sum())
        if not len(window.items):
            continue
        scale = seasonal_errors([context.target for context in window.contexts], window.scale_seasons)
        for forecaster, found in zip(forecasters, judged, strict=True):
            events.progress(f"window {window.number + 1}: {forecaster.name}")
            began = time.monotonic()
            forecast, failures = forecast_window(forecaster, window, horizon, levels)
            found.seconds += time.monotonic() - began
            found.fallbacks += failures
            _add(found, Errors(window.actual, forecast, levels, scale))
            found.files[window.number] = folder / f"{len(found.files)}-{forecaster.name}.npy"
            np.save(found.files[window.number], forecast)
    return Evaluation(
        judged=judged,
        levels=levels,
        items=np.concatenate(items),
        windows=np.concatenate(numbers),
        origins=np.concatenate(origins),
        actual=actual,
        skipped=skipped,
        observed=observed,
    )


def _add(found: Judged, errors: Errors) -> None:
    found.overall.append(errors.overall())
    found.by_item.append(errors.by_item())
    finite = np.isfinite(errors.scaled_loss)
    found.losses += np.stack([np.where(finite, errors.scaled_loss, 0.0).sum(0), finite.sum(0)])
    found.below += errors.below
    found.covered += errors.covered
