"""Errors of quantile forecasts, as `fev` defines them (the metrics of fev-bench), on arrays where nan is missing.

`sql`, the scaled quantile loss, is the mean of `2 |(y - f)(1[y <= f] - level)|` over points and levels after division
by the series' seasonal error: the mean absolute change over a season before the origin. `wql` is the mean quantile
loss by the mean absolute actual, `mase` the mean absolute error by the seasonal error, `mae` and `rmse` are in the
series' unit. Point errors are those of the median. A series whose seasonal error is 0 or undefined has no part in
`sql` and `mase`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

METRICS = ("sql", "wql", "mase", "mae", "rmse")
LOWEST_RATIO, HIGHEST_RATIO = 0.01, 100.0  # what fev clips errors relative to a baseline to


def mean_of_present(values: np.ndarray, axis: int | tuple[int, ...] | None = None) -> np.ndarray:
    """Mean of the finite values, nan where there is none."""
    present = np.isfinite(values)
    counts = present.sum(axis)
    with np.errstate(invalid="ignore"):
        return np.asarray(np.where(present, values, 0.0).sum(axis) / np.where(counts > 0, counts, np.nan))


def seasonal_errors(targets: Sequence[np.ndarray], season_lengths: np.ndarray) -> np.ndarray:
    """Mean absolute change over a season, by which `sql` and `mase` are scaled.

    Args:
        targets: points before the origin of each series, float64 with nan.
        season_lengths: int64 [series].

    Returns:
        float64 [series]; nan where no two points a season apart are present.
    """
    if not len(targets):
        return np.empty(0)
    lengths = np.array([len(target) for target in targets])
    values, owner = np.concatenate(targets), np.repeat(np.arange(len(targets)), lengths)
    season = season_lengths[owner]
    rows = np.flatnonzero(np.arange(len(values)) - np.repeat(np.cumsum(lengths) - lengths, lengths) >= season)
    changes = np.abs(values[rows] - values[rows - season[rows]])
    present = ~np.isnan(changes)
    owners = owner[rows][present]
    counts = np.bincount(owners, minlength=len(targets))
    sums = np.bincount(owners, changes[present], minlength=len(targets))
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


@dataclass(frozen=True)
class Errors:
    """Forecasts of a window beside what came.

    Attributes:
        actual: float64 [items, horizon], nan where missing.
        forecast: float64 [items, horizon, quantiles], finite.
        levels: rising, 0.5 among them.
        scale: seasonal errors, float64 [items].
    """

    actual: np.ndarray
    forecast: np.ndarray
    levels: Sequence[float]
    scale: np.ndarray

    @cached_property
    def quantile_loss(self) -> np.ndarray:
        """[items, horizon, quantiles], twice the pinball loss."""
        actual = self.actual[..., None]
        return 2 * np.abs((actual - self.forecast) * ((actual <= self.forecast) - np.array(self.levels)))

    @cached_property
    def error(self) -> np.ndarray:
        """Actual minus median, [items, horizon]."""
        return self.actual - self.forecast[..., list(self.levels).index(0.5)]

    @cached_property
    def divisor(self) -> np.ndarray:
        """Seasonal errors, nan where nothing can be divided by them; [items]."""
        return np.where(self.scale > 0, self.scale, np.nan)

    @cached_property
    def scaled_loss(self) -> np.ndarray:
        """Quantile loss of each point, mean over levels, by the seasonal error; [items, horizon]."""
        return self.quantile_loss.mean(-1) / self.divisor[:, None]

    def overall(self) -> dict[str, float]:
        """Every metric over all items together, as `fev` computes it for a window; nan where it is undefined."""
        size = mean_of_present(np.abs(self.actual))
        with np.errstate(divide="ignore", invalid="ignore"):
            weighted = mean_of_present(self.quantile_loss) / size
        return {
            "sql": float(mean_of_present(self.scaled_loss)),
            "wql": float(weighted),
            "mase": float(mean_of_present(np.abs(self.error) / self.divisor[:, None])),
            "mae": float(mean_of_present(np.abs(self.error))),
            "rmse": float(np.sqrt(mean_of_present(self.error**2))),
        }

    def by_item(self) -> dict[str, np.ndarray]:
        """Every metric of each item, [items], nan where it is undefined.

        `wql` is the item's mean quantile loss by the mean absolute actual of *all* items: its share of the window's
        `wql`, so that small series weigh little there, and series that are 0 throughout can be judged.
        """
        loss = mean_of_present(self.quantile_loss.mean(-1), 1)
        absolute = mean_of_present(np.abs(self.error), 1)
        size = mean_of_present(np.abs(self.actual))
        return {
            "sql": loss / self.divisor,
            "wql": loss / (size if size > 0 else np.nan),
            "mase": absolute / self.divisor,
            "mae": absolute,
            "rmse": np.sqrt(mean_of_present(self.error**2, 1)),
        }

    @cached_property
    def below(self) -> np.ndarray:
        """Number of actuals at or below each quantile, int64 [quantiles]."""
        return (self.actual[..., None] <= self.forecast).sum((0, 1))

    @cached_property
    def covered(self) -> np.ndarray:
        """Number of actuals between each quantile below the median and its mirror, int64 [intervals]."""
        pairs = intervals(self.levels)
        inside = [
            (self.forecast[..., low] <= self.actual) & (self.actual <= self.forecast[..., high]) for low, high in pairs
        ]
        return np.array([part.sum() for part in inside], np.int64)

    @cached_property
    def observed(self) -> int:
        """Number of actuals."""
        return int((~np.isnan(self.actual)).sum())


def intervals(levels: Sequence[float]) -> list[tuple[int, int]]:
    """Places of the levels that bound a central interval, the widest first."""
    places = {round(level, 9): place for place, level in enumerate(levels)}
    mirrored = ((place, places.get(round(1 - level, 9))) for place, level in enumerate(levels) if level < 0.5)
    return [(low, high) for low, high in mirrored if high is not None]


def relative_errors(errors: np.ndarray, baseline: int) -> np.ndarray:
    """Errors by those of a baseline, clipped to 0.01 ... 100 as in fev-bench, so that no series decides alone.

    Args:
        errors: [tasks, forecasters], at least 0.
        baseline: column of the baseline.

    Returns:
        [tasks, forecasters]; 1 where forecaster and baseline are both without error.
    """
    of_baseline = errors[:, [baseline]]
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.where((errors == 0) & (of_baseline == 0), 1.0, errors / of_baseline)
    return np.clip(ratios, LOWEST_RATIO, HIGHEST_RATIO)


def geometric_means(ratios: np.ndarray) -> np.ndarray:
    """Over tasks, [forecasters]; 1 minus it is fev's skill score."""
    return np.exp(np.log(ratios).mean(0))


def win_rates(ratios: np.ndarray) -> np.ndarray:
    """Share of tasks and opponents that each forecaster beats, a tie counting half; nan without an opponent."""
    count = ratios.shape[1]
    if count < 2:
        return np.full(count, np.nan)
    found = np.empty(count)
    for place in range(count):  # one by one: all pairs at once would need tasks * forecasters^2 cells
        others = np.delete(ratios, place, axis=1)
        own = ratios[:, [place]]
        found[place] = ((own < others) + 0.5 * (own == others)).mean()
    return found
