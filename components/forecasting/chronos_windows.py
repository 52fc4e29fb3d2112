"""Windows of series to train on: a context and what follows it, as a pure function of (seed, step, data)."""

from __future__ import annotations

import numpy as np

from modelmill.components.core.errors import UserError
from modelmill.components.forecasting.series_table import SeriesTable

_FLAT = 1e-9  # deviation of a context over its mean absolute value below which it counts as constant


class Windows:
    """Random windows of random series, without end; `feed.WeightedBatches` with a target a window.

    A window is a row of `context_length + horizon` numbers, the context at its end aligned with the origin and padded
    on the left with nan, as are points that are missing or beyond the series' end. Its context has mean 0 and
    deviation 1, which the models' own scaling leaves as they are and float32 can hold; the target is scaled alike, and
    is nan after a constant context, whose scale means nothing. What an artifact holds back for the backtest is never
    read.
    """

    def __init__(
        self,
        table: SeriesTable,
        *,
        context_length: int,
        horizon: int,
        min_context: int,
        short_contexts: float,
        hold_out: bool,
        seed: int,
        global_batch_size: int,
    ) -> None:
        """
        Args:
            table: series.
            context_length: points of a context at most.
            horizon: points of a target.
            min_context: points before an origin at least.
            short_contexts: share of windows whose context is cut to a random length.
            hold_out: whether the last `horizon` points are for validation only.
            seed: decides which windows.
            global_batch_size: windows of a step.

        Raises:
            UserError: no series is long enough.
        """
        self._table, self.context_length, self.horizon = table, context_length, horizon
        self._min_context, self._short = min_context, short_contexts
        self._seed, self._size = seed, global_batch_size
        train = table.lengths - table.horizon * table.windows
        self._held = train - horizon if hold_out else train  # where the training part of each series ends
        self.usable = np.flatnonzero(self._held > min_context)
        if not len(self.usable):
            held = f" beside the {horizon} for validation" if hold_out else ""
            raise UserError(
                f"chronos.min_context: {min_context}, but no series has {min_context + 1} points before its backtest"
                f" windows{held}; the longest has {max(0, int(train.max(initial=0)))}; lower it, chronos.horizon or"
                " chronos.training.validation_rows, or give longer series"
            )

    def batch(self, step: int, rank: int = 0, world: int = 1) -> np.ndarray:
        """A rank's windows of a step's batch, float64 [global_batch_size / world, context_length + horizon]."""
        share = self._size // world
        draws = np.random.default_rng((self._seed, step)).random((self._size, 4))[rank * share : (rank + 1) * share]
        rows = np.empty((share, self.context_length + self.horizon))
        for row, (which, where, cut, length) in zip(rows, draws, strict=True):
            number = int(self.usable[int(which * len(self.usable))])
            end = int(self._held[number])
            first = self._min_context
            last = max(first, end - self.horizon)
            origin = min(first + int(where * (last - first + 1)), end - 1)
            keep = min(origin, self.context_length)
            if cut < self._short:
                keep = round(min(first, keep) * (keep / min(first, keep)) ** length)
            self._fill(row, number, origin, end, keep)
        return rows

    def targets(self, step: int) -> int:
        """Windows of the global batch of a step."""
        return self._size

    def validation(self, count: int) -> np.ndarray:
        """The held-back ends of at most `count` series spread evenly over all, as rows like those of a batch."""
        chosen = self.usable[np.unique(np.linspace(0, len(self.usable) - 1, min(count, len(self.usable))).astype(int))]
        rows = np.empty((len(chosen) if count else 0, self.context_length + self.horizon))
        for row, number in zip(rows, chosen, strict=False):
            origin = int(self._held[number])
            self._fill(row, int(number), origin, origin + self.horizon, min(origin, self.context_length))
        return rows

    def _fill(self, row: np.ndarray, number: int, origin: int, end: int, keep: int) -> None:
        values = self._table.target(number)
        row[:] = np.nan
        row[self.context_length - keep : self.context_length] = values[origin - keep : origin]
        target = values[origin : min(origin + self.horizon, end)]
        row[self.context_length : self.context_length + len(target)] = target
        standardise(row, self.context_length)


def standardise(row: np.ndarray, context_length: int) -> None:
    """Give the context of a row mean 0 and deviation 1, in place, and scale what follows alike."""
    context = row[:context_length]
    present = context[~np.isnan(context)]
    if not len(present):
        row[context_length:] = np.nan
        return
    loc, scale = present.mean(), present.std()
    flat = not scale > _FLAT * np.abs(present).mean()
    row -= loc
    if flat:
        row[context_length:] = np.nan
    else:
        row /= scale
