"""Rolling origins: where the windows of a backtest lie, and what may be seen before each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from modelmill.components.core.errors import UserError
from modelmill.components.forecasting.frequency import parse_frequency
from modelmill.components.forecasting.grid import advance
from modelmill.components.forecasting.series_table import Context, SeriesTable


@dataclass(frozen=True)
class WindowPlan:
    """Where windows lie; the last one ends with the series.

    Attributes:
        horizon: steps of a forecast.
        windows: origins per series.
        step: steps from one origin to the next.
        context_length: points before an origin that are seen at most; None for all.
        min_context: points before an origin that a series must have.
    """

    horizon: int
    windows: int
    step: int
    context_length: int | None = None
    min_context: int = 1

    @property
    def reach(self) -> int:
        """Points at the end of a series that lie in a window."""
        return self.horizon + (self.windows - 1) * self.step

    def origins(self, lengths: np.ndarray, window: int) -> np.ndarray:
        """Position of the first forecast point of each series, int64 [series]; below 1 where it is too short."""
        return lengths - self.reach + window * self.step

    def check_held_back(self, table: SeriesTable) -> None:
        """Refuse windows over points that a model may have been trained on.

        Raises:
            UserError: they reach further back than the artifact holds back.
        """
        held = table.horizon * table.windows
        if self.reach > held:
            kept = f"series.horizon * series.windows = {table.horizon} * {table.windows} = {held} are held back"
            raise UserError(
                f"backtest.windows: {self.windows} windows of {self.horizon} steps, {self.step} apart, cover the last"
                f" {self.reach} points, but {kept} from training; prepare the series with more, or test fewer"
            )


@dataclass(frozen=True)
class Window:
    """One origin of every series that is long enough.

    Attributes:
        number: from the oldest, 0, on.
        items: numbers of the series, int64 [n].
        origins: positions of the first forecast points, int64 [n].
        contexts: what may be seen of each before its origin.
        actual: what came, float64 [n, horizon], nan where missing.
        skipped: series left out: too short, nothing before the origin or nothing in the window.
        scale_seasons: seasons over which the changes are taken that errors are scaled by, int64 [n].
    """

    number: int
    items: np.ndarray
    origins: np.ndarray
    contexts: list[Context]
    actual: np.ndarray
    skipped: int
    scale_seasons: np.ndarray


def rolling_windows(table: SeriesTable, plan: WindowPlan) -> Iterator[Window]:
    """Windows of all series, the oldest first. Targets and past covariates from an origin on are in no context."""
    for number in range(plan.windows):
        origins = plan.origins(table.lengths, number)
        items, contexts, actual = [], [], []
        for item in np.flatnonzero(origins >= plan.min_context).tolist():
            origin = int(origins[item])
            begin = 0 if plan.context_length is None else max(0, origin - plan.context_length)
            came = table.actual(item, origin, plan.horizon)
            if np.isnan(table.target(item)[begin:origin]).all() or np.isnan(came).all():
                continue
            items.append(item)
            contexts.append(table.context(item, origin, horizon=plan.horizon, max_length=plan.context_length))
            actual.append(came)
        numbers = np.array(items, np.int64)
        shaped = np.stack(actual) if actual else np.empty((0, plan.horizon))
        skipped, seasons = len(table) - len(items), table.season_lengths[numbers]
        yield Window(number, numbers, origins[numbers], contexts, shaped, skipped, seasons)


def stamps(table: SeriesTable, items: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Timestamps of positions of series, datetime64[ns] [n]; positions may lie beyond the last point."""
    found = table.starts[items]
    names = np.array(table.frequencies)[items]
    for name in np.unique(names):
        chosen = names == name
        found[chosen] = advance(parse_frequency(str(name)), found[chosen], positions[chosen])
    return found
