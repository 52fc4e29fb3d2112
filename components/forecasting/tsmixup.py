"""TSMixup: weighted means of pieces of given series (Ansari et al. 2024, arXiv:2403.07815, algorithm 1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from modelmill.components.core.errors import UserError
from modelmill.components.forecasting.series_config import TsMixup
from modelmill.components.forecasting.series_table import SeriesTable


@dataclass(frozen=True)
class Mixture:
    """A mixture.

    Attributes:
        values: float64 [length]; nan where a piece is missing.
        parts: series it is made of, by number.
        weights: theirs, with a sum of 1.
    """

    values: np.ndarray
    parts: Sequence[int]
    weights: np.ndarray


class Mixer:
    """Draws mixtures. Of a series with a backtest only what precedes its windows is used."""

    def __init__(self, table: SeriesTable, config: TsMixup) -> None:
        """Find the series that are long enough.

        Raises:
            UserError: no series has `min_length` points before its windows.
        """
        self._table, self._config = table, config
        lengths = table.lengths - table.horizon * table.windows
        self._lengths = lengths
        self._long = np.flatnonzero(lengths >= config.min_length)
        if not len(self._long):
            most = f"the longest of {len(table)} series has {max(0, int(lengths.max(initial=0)))} points"
            raise UserError(
                f"synthesis.mixup.min_length: {config.min_length}, but {most} before its windows; lower it"
            )

    def draw(self, random: np.random.Generator) -> Mixture:
        """A mixture of 1 to `max_series` series.

        The length is drawn evenly between the limits and cut to the shortest of the series drawn; each piece lies
        anywhere in its series, is divided by its mean absolute value (unless that is 0 or all of it is missing), and
        gets a weight from a symmetric Dirichlet distribution.
        """
        config = self._config
        count = int(random.integers(1, config.max_series + 1))
        parts = [int(number) for number in random.choice(self._long, count)]
        longest = min(int(self._lengths[part]) for part in parts)
        length = min(int(random.integers(config.min_length, config.max_length + 1)), longest)
        weights = random.dirichlet(np.full(count, config.alpha))
        values = np.zeros(length)
        for part, weight in zip(parts, weights, strict=True):
            begin = int(random.integers(0, int(self._lengths[part]) - length + 1))
            piece = self._table.train(part)[begin : begin + length]
            present = np.abs(piece[~np.isnan(piece)])
            scale = float(present.mean()) if len(present) else 0.0
            values += weight * piece / (scale or 1.0)
        return Mixture(values, parts, weights)
