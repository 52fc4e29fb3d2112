"""From rows to regular series: faults are refused by name or mended as the section says, all series at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa

from modelmill.components.core.errors import UserError
from modelmill.components.forecasting.frequency import Frequency, parse_frequency
from modelmill.components.forecasting.grid import infer_frequencies, positions, to_grid
from modelmill.components.forecasting.raw_series import NAMED, RawSeries, refuse, stamp
from modelmill.components.forecasting.series_config import SeriesConfig
from modelmill.components.forecasting.series_table import KNOWN, PAST, Points

_SPARSE = 50  # times more points than rows: the frequency is wrong, or the series is not one
_ROWS = "mend or remove the rows"


@dataclass
class RegularSeries:
    """Series without a fault.

    Attributes:
        items: names.
        starts: datetime64[ns] [series], timestamps of the first points.
        frequencies: of each series.
        target: values, nan where missing.
        covariates: values by name; those of known ones may go on beyond the target.
        counts: what was mended, by what it was.
        dropped: items that were left out, and why.
    """

    items: list[str]
    starts: np.ndarray
    frequencies: list[Frequency]
    target: Points
    covariates: dict[str, Points] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    dropped: dict[str, str] = field(default_factory=dict)


class _Rows:
    """Rows of a table with one row for each item and timestamp, the items one after the other, each in its order.

    Text covariates are kept as their category's number, nan where missing, so that every column is float64.
    """

    def __init__(self, raw: RawSeries, config: SeriesConfig) -> None:
        self.raw, self.config, self.counts = raw, config, Counter[str]()
        self.codes, self.times = raw.codes, raw.times
        self.numbers = np.arange(len(raw.codes))  # of the rows as they were read
        self.columns = {"": raw.target} | {name: _as_numbers(column) for name, column in raw.covariates.items()}

    @property
    def target(self) -> np.ndarray:
        return self.columns[""]

    def take(self, chosen: np.ndarray) -> None:
        """Keep some rows, in this order."""
        self.codes, self.times, self.numbers = self.codes[chosen], self.times[chosen], self.numbers[chosen]
        self.columns = {name: column[chosen] for name, column in self.columns.items()}

    def refuse(self, what: str, chosen: np.ndarray, remedy: str, parameter: str) -> NoReturn:
        """Refuse some rows, named by where they were read."""
        rows = np.flatnonzero(chosen)
        named = sorted(self.numbers[rows[:NAMED]].tolist())
        refuse(what, [self.raw.place(row) for row in named], len(rows), remedy, parameter=parameter)

    def forget_future(self) -> None:
        """Take away what was not known at `as_of`: all later rows, or all of them but the known covariates.

        Raises:
            UserError: nothing is left.
        """
        until = self.config.known_until()
        if until is None:
            return
        later = self.times > np.datetime64(until, "ns")
        seen = np.bincount(self.codes[~later], minlength=len(self.raw.items)) > 0
        if not seen.any():
            first = f", the first row is of {stamp(self.times.min())}" if len(self.times) else ""
            raise UserError(f"series.as_of: {self.config.as_of} lies before all rows{first}; give a later date")
        # An item whose rows are all later does not exist yet.
        codes = np.where(seen, np.cumsum(seen) - 1, -1)[self.raw.codes]
        items = [item for item, kept in zip(self.raw.items, seen, strict=True) if kept]
        self.raw, self.codes = replace(self.raw, items=items, codes=codes), codes
        known = getattr(self.config.source[0], "known_covariates", [])
        for name in self.columns.keys() - set(known):
            self.columns[name] = np.where(later, np.nan, self.columns[name])
        ahead = later & ~np.all([np.isnan(self.columns[name]) for name in known], axis=0) if known else False
        self.take(np.flatnonzero((codes >= 0) & (~later | ahead)))

    def check_finite(self) -> None:
        for name, column in self.columns.items():
            infinite = np.isinf(column)
            if infinite.any():
                if self.config.infinite == "refuse":
                    what = f"covariate {name!r} is infinite" if name else "the target is infinite"
                    self.refuse(what, infinite, f"{_ROWS}, or set series.infinite to missing", "series.infinite")
                self.counts["infinite"] += int(infinite.sum())
                self.columns[name] = np.where(infinite, np.nan, column)

    def sort(self) -> None:
        """Bring each item's rows together and in order; rows of one time stay in the order they were read."""
        step, time = np.diff(self.codes), np.diff(self.times.astype(np.int64))
        if not ((step > 0) | ((step == 0) & (time >= 0))).all():
            self.take(np.lexsort((self.times, self.codes)))

    def merge_duplicates(self) -> None:
        """One row for each item and timestamp."""
        again = np.zeros(len(self.codes), bool)
        again[1:] = (np.diff(self.codes) == 0) & (self.times[1:] == self.times[:-1])
        if not again.any():
            return
        if self.config.duplicates == "refuse":
            both = again.copy()
            both[:-1] |= again[1:]
            remedy = "remove all but one, or set series.duplicates to first, last, mean or sum"
            self.refuse("two rows for one item and timestamp", both, remedy, "series.duplicates")
        self.counts["duplicate_rows"] = int(again.sum())
        firsts = np.flatnonzero(~again)
        lasts = np.append(firsts[1:], len(again)) - 1
        if self.config.duplicates in ("mean", "sum"):
            merged = {
                name: column[lasts] if self._is_text(name) else self._merge(column, firsts, total=not name)
                for name, column in self.columns.items()
            }
            self.take(firsts)
            self.columns = merged
        else:
            self.take(firsts if self.config.duplicates == "first" else lasts)

    def _is_text(self, name: str) -> bool:
        return bool(name) and not isinstance(self.raw.covariates[name], np.ndarray)

    def _merge(self, column: np.ndarray, firsts: np.ndarray, *, total: bool) -> np.ndarray:
        """Mean of each group without the missing, or (of the target, when asked for) sum; nan if all are missing."""
        present = ~np.isnan(column)
        sums = np.add.reduceat(np.where(present, column, 0.0), firsts)
        sizes = np.add.reduceat(present.astype(np.int64), firsts)
        value = sums if total and self.config.duplicates == "sum" else sums / np.maximum(sizes, 1)
        return np.where(sizes > 0, value, np.nan)

    def sizes(self) -> np.ndarray:
        """Rows of each item, int64 [items]."""
        return np.bincount(self.codes, minlength=len(self.raw.items))

    def beyond(self) -> np.ndarray:
        """Rows after the last target of an item that hold a known covariate: they say what is known ahead."""
        known = getattr(self.config.source[0], "known_covariates", [])
        if not known:
            return np.zeros(len(self.codes), bool)
        ahead = np.isnan(self.target) & ~np.all([np.isnan(self.columns[name]) for name in known], axis=0)
        sizes = self.sizes()
        last = np.maximum.reduceat(np.where(ahead, -1, np.arange(len(ahead))), np.cumsum(sizes) - sizes)
        # An item without a single target has no future either, but nothing that could be forecast.
        return ahead & (np.arange(len(ahead)) > last[self.codes]) & (last >= 0)[self.codes]


def _as_numbers(column: Any) -> np.ndarray:
    if isinstance(column, np.ndarray):
        return column
    return column.indices.cast(pa.float64()).fill_null(float("nan")).to_numpy(zero_copy_only=False)


def make_regular(raw: RawSeries, config: SeriesConfig) -> RegularSeries:
    """Check rows, and put each series on its grid.

    Raises:
        UserError: the first kind of fault that the section does not allow; it names items, files and rows, at most
            five of them, and the way to mend it.
    """
    rows = _Rows(raw, config)
    rows.forget_future()
    rows.check_finite()
    if config.irregular == "round" and config.frequency is not None:
        moved = to_grid(parse_frequency(config.frequency), rows.times)
        rows.counts["rounded_rows"] = int((moved != rows.times).sum())
        rows.times = moved
    rows.sort()
    rows.merge_duplicates()
    numbers, frequencies = _frequencies(rows)
    place = _places(rows, numbers, frequencies)
    return _Layout(rows, place, numbers, frequencies).series()


def _frequencies(rows: _Rows) -> tuple[np.ndarray, list[Frequency]]:
    """Number of each item's frequency, and the frequencies."""
    config, sizes = rows.config, rows.sizes()
    if config.frequency is not None:
        return np.zeros(len(sizes), np.int64), [parse_frequency(config.frequency)]
    numbers, found = infer_frequencies(rows.times, sizes)
    single = numbers < 0
    if single.any() and len(found) == 1:
        numbers[single] = 0
    elif single.any():
        if config.too_short == "refuse":
            items = [repr(rows.raw.items[code]) for code in np.flatnonzero(single)[:NAMED]]
            remedy = "set series.frequency, remove them, or set series.too_short to drop"
            what = "items with one row, whose frequency cannot be told"
            refuse(what, items, int(single.sum()), remedy, parameter="series.frequency")
        found = found or [Frequency("D", 1)]  # they are dropped: any one will do
        numbers[single] = 0
    return numbers, found


def _places(rows: _Rows, numbers: np.ndarray, frequencies: list[Frequency]) -> np.ndarray:
    """Position of each row on its item's grid."""
    sizes = rows.sizes()
    starts = np.repeat(rows.times[np.cumsum(sizes) - sizes], sizes)
    place, good = np.empty(len(starts), np.int64), np.empty(len(starts), bool)
    for number, frequency in enumerate(frequencies):
        chosen = slice(None) if len(frequencies) == 1 else np.flatnonzero(numbers[rows.codes] == number)
        place[chosen], good[chosen] = positions(frequency, rows.times[chosen], starts[chosen])
    if not good.all():
        first = int(np.flatnonzero(~good)[0])
        grid = f"{frequencies[numbers[rows.codes[first]]].alias} from {stamp(starts[first])}"
        remedy = f"{_ROWS}, or set series.irregular to round with a series.frequency"
        rows.refuse(f"irregular timestamps, off the grid of {grid}", ~good, remedy, "series.irregular")
    step = np.diff(place, prepend=-1)
    gap = (step > 1) & (np.diff(rows.codes, prepend=-1) == 0)
    if gap.any() and rows.config.gaps == "refuse":
        rows.refuse("rows are missing before", gap, "add them, or set series.gaps to missing", "series.gaps")
    last = np.cumsum(sizes) - 1
    sparse = place[last] + 1 > _SPARSE * (sizes + 10)
    if sparse.any():
        named = [
            f"{rows.raw.items[code]!r} ({sizes[code]} rows over {place[last[code]] + 1} steps of "
            f"{frequencies[numbers[code]].alias})"
            for code in np.flatnonzero(sparse)[:NAMED].tolist()
        ]
        remedy = "set series.frequency to a longer step with series.irregular: round, or remove the items"
        refuse("series that are nearly all gaps", named, int(sparse.sum()), remedy, parameter="series.gaps")
    rows.counts["filled_gaps"] = int((step - 1)[gap].sum())
    return place


class _Layout:
    """Where each series' points lie once its gaps are filled; finds the series that are left out."""

    def __init__(self, rows: _Rows, place: np.ndarray, numbers: np.ndarray, frequencies: list[Frequency]) -> None:
        self.rows, self.config, self.items = rows, rows.config, rows.raw.items
        sizes = rows.sizes()
        self.firsts, lasts = np.cumsum(sizes) - sizes, np.cumsum(sizes) - 1
        self.frequencies = [frequencies[number] for number in numbers]
        self.totals = place[lasts] + 1
        seen = np.where(rows.beyond(), -1, place)
        self.lengths = np.maximum.reduceat(seen, self.firsts) + 1
        self.begins = np.cumsum(self.totals) - self.totals
        self.cells = self.begins[rows.codes] + place
        self.owner = np.repeat(np.arange(len(sizes)), self.totals)
        self.within = np.arange(len(self.owner)) - self.begins[self.owner]

    def _spread(self, column: np.ndarray) -> np.ndarray:
        values = np.full(len(self.owner), np.nan)
        values[self.cells] = column
        return values

    def series(self) -> RegularSeries:
        target = self._spread(self.rows.target)
        kept, dropped = self._check(target)
        if not kept.any():
            raise UserError(f"series.source: none of {len(kept)} series is left ({_reasons(dropped)}); give others")
        chosen = np.flatnonzero(kept)
        inside = self.within < self.lengths[self.owner]
        covariates = {}
        known = getattr(self.config.source[0], "known_covariates", [])  # of all sources
        for name in self.rows.raw.covariates:
            ahead = name in known
            mask, sizes = (kept[self.owner], self.totals) if ahead else (kept[self.owner] & inside, self.lengths)
            values = self._restore(name, self._spread(self.rows.columns[name])[mask])
            covariates[(KNOWN if ahead else PAST) + name] = Points(_offsets(sizes[chosen]), values)
        return RegularSeries(
            items=[self.items[code] for code in chosen],
            starts=self.rows.times[self.firsts][chosen],
            frequencies=[self.frequencies[code] for code in chosen],
            target=Points(_offsets(self.lengths[chosen]), target[kept[self.owner] & inside]),
            covariates=covariates,
            counts=self.rows.counts,
            dropped=dropped,
        )

    def _restore(self, name: str, values: np.ndarray) -> Any:
        """Category numbers as text again."""
        column = self.rows.raw.covariates[name]
        if isinstance(column, np.ndarray):
            return values
        missing = np.isnan(values)
        indices = pa.array(np.where(missing, 0, values).astype(np.int32), mask=missing)
        return pa.DictionaryArray.from_arrays(indices, column.dictionary)

    def _check(self, target: np.ndarray) -> tuple[np.ndarray, dict[str, str]]:
        """Which items are kept, and why the others are not."""
        present = ~np.isnan(target)
        values = np.add.reduceat(present.astype(np.int64), self.begins)
        held_back = self.config.horizon * self.config.windows
        early = present & (self.within < (self.lengths - held_back)[self.owner])
        context = np.add.reduceat(early.astype(np.int64), self.begins)
        lowest = np.minimum.reduceat(np.where(present, target, np.inf), self.begins)
        highest = np.maximum.reduceat(np.where(present, target, -np.inf), self.begins)
        needed = f"{self.config.min_context} points before the last {held_back}"
        kept, dropped = np.ones(len(values), bool), dict[str, str]()

        def sift(bad: np.ndarray, policy: str, option: str, what: str, tell: Callable[[int], str]) -> None:
            bad = bad & kept
            if not bad.any() or policy == "keep":
                return
            if policy == "refuse":
                named = [f"{self.items[code]!r}{tell(code)}" for code in np.flatnonzero(bad)[:NAMED].tolist()]
                remedy = f"remove them, or set series.{option} to drop"
                refuse(what, named, int(bad.sum()), remedy, parameter=f"series.{option}")
            dropped.update(dict.fromkeys((self.items[code] for code in np.flatnonzero(bad).tolist()), option))
            kept[bad] = False

        sift(values == 0, self.config.all_missing, "all_missing", "items without a single value", lambda _: "")
        short = f"items without {needed} (horizon {self.config.horizon}, windows {self.config.windows})"
        told = lambda code: f" ({context[code]} of {self.lengths[code]} points)"  # noqa: E731
        sift(context < self.config.min_context, self.config.too_short, "too_short", short, told)
        flat = (lowest == highest) & (values > 0)
        self.rows.counts["constant_series"] = int(flat.sum())
        sift(flat, self.config.constant, "constant", "items that never change", lambda code: f" ({lowest[code]:g})")
        return kept, dropped


def _offsets(sizes: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)


def _reasons(dropped: dict[str, str]) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in sorted(Counter(dropped.values()).items()))
