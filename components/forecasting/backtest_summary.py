"""What a backtest comes to: forecasters against Seasonal Naive, and the series that are worth a look."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from modelmill.components.forecasting.evaluate import Evaluation, Judged
from modelmill.components.forecasting.metrics import geometric_means, intervals, relative_errors, win_rates
from modelmill.components.forecasting.series_table import SeriesTable
from modelmill.components.forecasting.windows import WindowPlan, stamps

RELATIVE = ("sql", "wql", "mase")
_HISTORY = 4  # horizons that are drawn before the first origin
_LEAST_HISTORY, _MOST_HISTORY = 24, 400  # points
_DRAWN_WINDOWS = 3  # the last ones
_LISTED = 20  # series


@dataclass(frozen=True)
class Row:
    """A forecaster in the table.

    Attributes:
        name: of the forecaster.
        metrics: over all series and windows, as `fev` computes them.
        relative: geometric means over series of the errors by Seasonal Naive's, by metric.
        skill: 1 minus the relative error in the metric that ranks, None if that is undefined.
        win_rate: share of series and opponents that it beats in that metric, None without an opponent.
        coverage: share of actuals inside each central interval, by its name in percent.
        fallbacks: forecasts that Seasonal Naive stood in for.
    """

    name: str
    metrics: dict[str, float]
    relative: dict[str, float]
    skill: float | None
    win_rate: float | None
    coverage: dict[str, float]
    fallbacks: int

    def line(self) -> str:
        """The row for the log."""
        numbers = [f"{name} {value:.4g}" for name, value in self.metrics.items()]
        numbers += [f"{name} against seasonal-naive {value:.3f}" for name, value in self.relative.items()]
        return f"{self.name}: {', '.join(numbers)}"


@dataclass(frozen=True)
class Summary:
    """What a backtest comes to.

    Attributes:
        rows: of the table, the best first.
        candidate: whose scores count.
        calibration: share of actuals at or below each level, by forecaster.
        by_step: scaled quantile loss by step ahead, by forecaster; None where it is undefined.
        levels: of the quantiles.
        compared: series that have a scaled error, over which geometric means are taken.
        metric: that ranks.
        errors: mean of that metric over each series' windows, the candidate's and Seasonal Naive's, [series, 2].
    """

    rows: list[Row]
    candidate: Judged
    calibration: dict[str, list[float]]
    by_step: dict[str, list[float | None]]
    levels: list[float]
    compared: int
    metric: str
    errors: np.ndarray

    @property
    def row(self) -> Row:
        """The candidate's row."""
        return next(row for row in self.rows if row.name == self.candidate.name)

    @property
    def order(self) -> list[int]:
        """Numbers of the series that have an error, the candidate's best first."""
        own = self.errors[:, 0]
        return [int(item) for item in np.argsort(own, kind="stable") if np.isfinite(own[item])]

    def metrics(self) -> dict[str, float]:
        """What the manifest and the tracking say of the candidate."""
        row = self.row
        found = dict(row.metrics)
        found |= {f"relative_{name}": value for name, value in row.relative.items()}
        found |= {f"coverage_{name}": value for name, value in row.coverage.items()}
        optional = {"skill": row.skill, "win_rate": row.win_rate}
        return found | {name: value for name, value in optional.items() if value is not None}

    def record(self, item_ids: Sequence[str]) -> dict[str, Any]:
        """For `backtest.json`; of the series the worst only."""
        worst = self.order[: -_LISTED - 1 : -1]
        return {
            "candidate": self.candidate.name,
            "rows": [asdict(row) for row in self.rows],
            "calibration": {"levels": self.levels, "below": self.calibration},
            "by_step": self.by_step,
            "compared_series": self.compared,
            "worst_series": [
                {"item_id": item_ids[item], "error": float(self.errors[item, 0]), "naive": float(self.errors[item, 1])}
                for item in worst
            ],
        }


def summarise(found: Evaluation, series: int, metric: str, candidate: str | None) -> Summary:
    """Compare the forecasters.

    Args:
        found: with Seasonal Naive first, and a series that has a scaled error.
        series: how many there are.
        metric: that ranks.
        candidate: name of a forecaster; None for the one with the lowest error relative to Seasonal Naive.
    """
    relative: dict[str, np.ndarray] = {}
    errors = {name: _by_series(found, name, series) for name in RELATIVE}
    for name, columns in errors.items():
        tasks = columns[np.isfinite(columns).all(1)]
        if len(tasks):
            relative[name] = relative_errors(tasks, 0)
    means = {name: geometric_means(ratios) for name, ratios in relative.items()}
    wins = win_rates(relative[metric]) if metric in relative else np.full(len(found.judged), np.nan)
    pairs = intervals(found.levels)
    rows = []
    for place, judged in enumerate(found.judged):
        shares = judged.covered / found.observed
        rows.append(
            Row(
                name=judged.name,
                metrics=judged.metrics(),
                relative={name: float(values[place]) for name, values in means.items()},
                skill=1 - float(means[metric][place]) if metric in means else None,
                win_rate=float(wins[place]) if np.isfinite(wins[place]) else None,
                coverage={
                    f"{(found.levels[high] - found.levels[low]) * 100:g}": float(share)
                    for (low, high), share in zip(pairs, shares, strict=True)
                },
                fallbacks=judged.fallbacks,
            )
        )
    rows.sort(key=lambda row: row.relative.get(metric, np.inf))
    chosen = next(judged for judged in found.judged if judged.name == (candidate or rows[0].name))
    own = found.judged.index(chosen)
    return Summary(
        rows=rows,
        candidate=chosen,
        calibration={judged.name: (judged.below / found.observed).tolist() for judged in found.judged},
        by_step={
            judged.name: [float(value) if np.isfinite(value) else None for value in judged.by_step()]
            for judged in found.judged
        },
        levels=list(found.levels),
        compared=int(np.isfinite(errors[metric][:, own]).sum()),
        metric=metric,
        errors=errors[metric][:, [own, 0]],
    )


def _by_series(found: Evaluation, metric: str, count: int) -> np.ndarray:
    """Mean of a metric over each series' windows, [series, forecasters]; nan where no window defines it."""
    columns = []
    for judged in found.judged:
        values = judged.rows(metric)
        kept = np.isfinite(values)
        numbers = np.bincount(found.items[kept], minlength=count)
        sums = np.bincount(found.items[kept], values[kept], minlength=count)
        columns.append(np.where(numbers > 0, sums / np.maximum(numbers, 1), np.nan))
    return np.stack(columns, axis=1)


def drawn_series(found: Evaluation, table: SeriesTable, plan: WindowPlan, summary: Summary) -> list[dict[str, Any]]:
    """The candidate's best, median and worst series with history, forecasts and actuals, as JSON can hold them."""
    order = summary.order
    places = {"best": 0, "median": (len(order) - 1) // 2, "worst": len(order) - 1}
    items: dict[int, str] = {}
    for role, place in places.items():
        if order:
            items[order[place]] = f"{items[order[place]]} and {role}" if order[place] in items else role
    return [_drawn(found, table, plan, summary, item, role) for item, role in items.items()]


def _drawn(
    found: Evaluation, table: SeriesTable, plan: WindowPlan, summary: Summary, item: int, role: str
) -> dict[str, Any]:
    windows = [window for window in range(plan.windows) if found.row_of(item, window) is not None][-_DRAWN_WINDOWS:]
    forecasts = []
    for window in windows:
        row = found.row_of(item, window)
        own = np.load(summary.candidate.files[window], mmap_mode="r")[row]
        naive = np.load(found.judged[0].files[window], mmap_mode="r")[row, :, list(found.levels).index(0.5)]
        origin = int(plan.origins(table.lengths[[item]], window)[0])
        forecasts.append({"origin": origin, "quantiles": own.tolist(), "naive": naive.tolist()})
    first = min(forecast["origin"] for forecast in forecasts)
    wanted = max(_LEAST_HISTORY, _HISTORY * plan.horizon, 2 * int(table.season_lengths[item]))
    begin = max(0, first - min(_MOST_HISTORY, wanted))
    end = int(table.lengths[item])
    values = table.target(item)[begin:end]
    times = stamps(table, np.full(end - begin, item), np.arange(begin, end))
    return {
        "item_id": table.item_ids[item],
        "role": role,
        "error": float(summary.errors[item, 0]),
        "begin": begin,
        "times": np.datetime_as_string(times, unit="s").tolist(),
        "values": [float(value) if np.isfinite(value) else None for value in values],
        "forecasts": forecasts,
    }
