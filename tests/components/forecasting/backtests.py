"""Series and forecasters for the tests of the backtest."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from modelmill.components.core.manifest import Manifest
from modelmill.components.forecasting.series_table import FILE, Context, Points, SeriesTable, SeriesWriter

LEVELS = [0.1, 0.25, 0.5, 0.75, 0.9]


def seasonal(count: int, length: int, season: int = 4, seed: int = 0) -> list[np.ndarray]:
    """Series with a trend, a season and noise, of different sizes."""
    random = np.random.default_rng(seed)
    steps = np.arange(length)
    found = []
    for _ in range(count):
        wave = random.uniform(1, 3) * np.sin((steps + random.integers(season)) / season * 2 * np.pi)
        noise = random.normal(0, 0.4, length)
        found.append(random.uniform(1, 50) * (10 + random.normal(0, 0.1) * steps + wave + noise))
    return found


def points(values: Sequence[np.ndarray]) -> Points:
    ends = np.cumsum([0, *(len(one) for one in values)])
    return Points(ends, np.concatenate(values))


def write_series(
    path: Path,
    values: Sequence[np.ndarray],
    *,
    season: int = 4,
    frequency: str = "QS-JAN",
    known: Sequence[np.ndarray] = (),
    past: Sequence[np.ndarray] = (),
) -> None:
    """`series.arrow` of some targets; item 2 is called `item-2`."""
    covariates = {name: points(part) for name, part in (("past:p", past), ("known:k", known)) if part}
    with SeriesWriter(path) as writer:
        writer.append(
            [f"item-{number}" for number in range(len(values))],
            np.full(len(values), np.datetime64("2000-01-01", "ns")),
            [frequency] * len(values),
            np.full(len(values), season),
            points(values),
            covariates,
        )


def series_table(
    folder: Path, values: Sequence[np.ndarray], horizon: int = 3, windows: int = 2, season: int = 4
) -> SeriesTable:
    """A table of some targets in a file of its own."""
    path = folder / f"series-{len(list(folder.iterdir()))}.arrow"
    write_series(path, values, season=season)
    return SeriesTable(path, horizon=horizon, windows=windows)


def series_manifest(
    folder: Path, values: Sequence[np.ndarray], horizon: int = 3, windows: int = 2, season: int = 4
) -> Manifest:
    """The artifact of `prepare_series` for some targets."""
    data = folder / f"series-{len(list(folder.iterdir()))}"
    data.mkdir()
    write_series(data / FILE, values, season=season)
    metadata = {"horizon": horizon, "windows": windows, "dataset_digest": "d" * 64}
    return Manifest.describe(data, kind="series", counts={"series": len(values)}, metadata=metadata)


class Last:
    """Forecasts the last point, and what is known ahead if there is any, 1 apart from level to level."""

    name = "last"

    def __init__(self, fails: Sequence[str] = ()) -> None:
        self.fails, self.seen = fails, list[Context]()

    def predict(self, contexts: Sequence[Context], horizon: int, quantiles: Sequence[float]) -> np.ndarray:
        self.seen += contexts
        middle = np.array([context.target[~np.isnan(context.target)][-1] for context in contexts])
        ahead = np.stack([context.future.get("k", np.zeros(horizon)) for context in contexts])
        found = (middle[:, None] + ahead)[..., None] + 10 * (np.array(quantiles) - 0.5)
        for place, context in enumerate(contexts):
            if context.item_id in self.fails:
                found[place, -1] = np.inf
        return found
