"""What a model's series looked like when it was tuned: kept in its folder, so that drift is measured from there.

`training_series.json` lies beside the weights, travels with them through the registry, and holds columns with one
entry a series: `item_id`, `frequency`, `season_length`, `end` (last timestamp), and of the changes over a season
`points`, `scale` (mean absolute change) and `edges` (its deciles in units of the scale), and `strength` of the season;
nulls where a series has too few points for them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from modelmill.components.core.errors import UserError
from modelmill.components.core.manifest import Manifest
from modelmill.components.forecasting.series_table import SeriesTable
from modelmill.components.forecasting.windows import stamps

PROFILE = "training_series.json"
BINS = 10
_VERSION = 1
_DIGITS = 9  # significant ones that are kept of a number
_LEAST_SEASONS, _MOST_SEASONS = 2, 20  # for the strength of a season; of more the latest


@dataclass(frozen=True)
class Changes:
    """Changes over a season within some points of a series, and the strength of its season.

    Attributes:
        values: float64 [changes], without missing ones.
        strength: 1 is nothing but season, 0 (or a little below) none of it; nan where it cannot be told.
    """

    values: np.ndarray
    strength: float

    @property
    def scale(self) -> float:
        """Mean absolute change, nan without any."""
        return float(np.abs(self.values).mean()) if len(self.values) else float("nan")


def changes_of(target: np.ndarray, season_length: int, begin: int = 0) -> Changes:
    """Changes over a season that end at position `begin` or later.

    Args:
        target: float64 [points] with nan.
        season_length: steps of a season, 1 for none.
        begin: first position that counts; what precedes it is only subtracted.
    """
    first = max(begin, season_length)
    changes = target[first:] - target[first - season_length : len(target) - season_length]
    return Changes(changes[~np.isnan(changes)], seasonal_strength(target[begin:], season_length))


def seasonal_strength(target: np.ndarray, season_length: int) -> float:
    """Share of the detrended variance that the season explains, as an adjusted R squared.

    The strength of Hyndman and Athanasopoulos (Forecasting: Principles and Practice, 3rd ed., 4.3) on a classical
    decomposition: trend by a centred moving average over a season, season by the means of its phases. The adjustment
    for the number of phases lets short series be compared with long ones.

    Returns:
        At most 1; nan without a season, with fewer than two of them, or where nothing varies.
    """
    target = target[-_MOST_SEASONS * season_length :]
    if season_length < 2 or len(target) < (_LEAST_SEASONS + 1) * season_length:
        return float("nan")
    window = np.full(season_length + (season_length + 1) % 2, 1.0 / season_length)
    if season_length % 2 == 0:
        window[[0, -1]] /= 2
    half = len(window) // 2
    rest = target[half : len(target) - half] - np.convolve(target, window, "valid")
    phases = np.arange(len(rest)) % season_length
    present = np.isfinite(rest)
    rest, phases = rest[present], phases[present]
    counts = np.bincount(phases, minlength=season_length)
    if len(rest) <= season_length or not counts.all():
        return float("nan")
    rest = rest - rest.mean()
    total = float(rest @ rest)
    if not total > 1e-18 * max(1.0, float(np.nanmax(np.abs(target)))) ** 2:
        return float("nan")
    left = rest - (np.bincount(phases, rest, minlength=season_length) / counts)[phases]
    return 1 - (float(left @ left) / (len(rest) - season_length)) / (total / (len(rest) - 1))


@dataclass(frozen=True)
class SeriesProfile:
    """Series as they were; see the module's text for the columns."""

    item_id: Sequence[str]
    frequency: Sequence[str]
    season_length: Sequence[int]
    end: Sequence[str]
    points: Sequence[int]
    scale: Sequence[float | None]
    edges: Sequence[Sequence[float] | None]
    strength: Sequence[float | None]
    index: dict[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "index", {item: number for number, item in enumerate(self.item_id)})


_COLUMNS = ("item_id", "frequency", "season_length", "end", "points", "scale", "edges", "strength")


def profile_of(table: SeriesTable, ends: np.ndarray | None = None) -> SeriesProfile:
    """Profile of series.

    Args:
        table: series.
        ends: points of each that count, int64 [series]; default all.
    """
    ends = table.lengths if ends is None else ends
    lasts = np.datetime_as_string(stamps(table, np.arange(len(table)), np.maximum(ends - 1, 0)))
    columns: dict[str, list[Any]] = {name: [] for name in _COLUMNS}
    for number, item in enumerate(table.item_ids):
        season, end = int(table.season_lengths[number]), int(ends[number])
        found = changes_of(table.target(number)[:end], season)
        edges = None
        if len(found.values) >= BINS and found.scale > 0:
            edges = [_rounded(edge) for edge in np.quantile(found.values / found.scale, np.arange(1, BINS) / BINS)]
        row = (item, table.frequencies[number], season, str(lasts[number]), len(found.values))
        for name, value in zip(_COLUMNS, (*row, _or_none(found.scale), edges, _or_none(found.strength)), strict=True):
            columns[name].append(value)
    return SeriesProfile(**columns)


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")


def _or_none(value: float) -> float | None:
    return _rounded(value) if np.isfinite(value) else None


def write_profile(table: SeriesTable, model: Path) -> None:
    """Keep the profile of series, with what they hold back, in the folder of the model that was tuned on them."""
    profile = profile_of(table)
    record = {"version": _VERSION} | {name: list(getattr(profile, name)) for name in _COLUMNS}
    (model / PROFILE).write_text(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def read_profile(model: Manifest) -> SeriesProfile | None:
    """The profile in a model's folder, or None where it has none, as one from the Hub.

    Raises:
        UserError: it cannot be read.
    """
    name = f"model/{PROFILE}"
    if all(entry.path != name for entry in model.files):
        return None
    path = model.path(name)
    try:
        record = json.loads(path.read_bytes())
        columns = {column: record[column] for column in _COLUMNS}
        sizes = {len(column) for column in columns.values()}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"champion: {path} is no profile of series ({error}); tune the model again") from None
    if record.get("version") != _VERSION or len(sizes) != 1:
        raise UserError(
            f"champion: {path} is of version {record.get('version')}, not {_VERSION}; tune the model again"
        )
    return SeriesProfile(**columns)
