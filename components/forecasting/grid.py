"""Timestamps and frequencies, for all series at once: which grid a series lies on, and where on it each row is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from modelmill.components.forecasting.frequency import DAY, NANOSECONDS, Frequency

_WEEK = 7 * DAY
_UNKNOWN, _MONTHS, _BUSINESS, _WEEKS, _STEPS = range(5)


@dataclass(frozen=True)
class Calendar:
    """Parts of timestamps, int64 [rows]: day since 1970, nanosecond of the day, weekday (0 is Monday), month since
    January 1970, and whether the day is the first or the last of its month."""

    day: np.ndarray
    time: np.ndarray
    weekday: np.ndarray
    month: np.ndarray
    first: np.ndarray
    last: np.ndarray

    @classmethod
    def of(cls, times: np.ndarray) -> Calendar:
        days = times.astype("datetime64[D]")
        day = days.astype(np.int64)
        months = days.astype("datetime64[M]")
        return cls(
            day=day,
            time=times.astype(np.int64) - day * DAY,
            weekday=(day + 3) % 7,
            month=months.astype(np.int64),
            first=months.astype("datetime64[D]") == days,
            last=(months + 1).astype("datetime64[D]") == days + 1,
        )

    @property
    def business_day(self) -> np.ndarray:
        """Number of the day when only Monday to Friday count; a weekend has its Friday's."""
        return (self.day + 3) // 7 * 5 + np.minimum(self.weekday, 4)


def infer_frequencies(times: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, list[Frequency]]:
    """Frequency of each series: the step that most of its rows are apart.

    Months, quarters and years are told by their first or last days, business days by weekends that are left out.

    Args:
        times: datetime64[ns] [rows], series one after the other, rising within each.
        counts: int64 [series], rows of each, at least 1.

    Returns:
        number of each series' frequency in the list, -1 for those with one row.
    """
    firsts = np.cumsum(counts) - counts
    owner = np.repeat(np.arange(len(counts)), counts)
    calendar = Calendar.of(times)
    step = _usual_step(times.astype(np.int64), owner, counts)
    months = _usual_step(calendar.month, owner, counts, where=step >= 28 * DAY)
    same_time = np.logical_and.reduceat(calendar.time == calendar.time[firsts][owner], firsts)
    start = np.logical_and.reduceat(calendar.first, firsts)
    end = np.logical_and.reduceat(calendar.last, firsts)
    by_month = same_time & (start | end) & (months > 0)
    weekdays = np.logical_and.reduceat(calendar.weekday < 5, firsts)
    lasts = firsts + counts - 1
    skipped = calendar.day[lasts] - calendar.day[firsts] > calendar.business_day[lasts] - calendar.business_day[firsts]
    business = same_time & weekdays & skipped & (step == DAY)
    # One row of numbers a series, so that equal frequencies are found once.
    weekly = step % _WEEK == 0
    kind = np.select([counts < 2, by_month, business, weekly], [_UNKNOWN, _MONTHS, _BUSINESS, _WEEKS], _STEPS)
    size = np.select([kind == _MONTHS, kind >= _WEEKS], [months, step], 0)
    point = np.select([kind == _MONTHS, kind == _WEEKS], [calendar.month[firsts] % 12, calendar.weekday[firsts]], 0)
    rows = np.stack([kind, size, by_month & end, point], axis=1)
    keys, numbers = np.unique(rows, axis=0, return_inverse=True)
    return _renumber(numbers.reshape(-1), [_frequency(*(int(part) for part in key)) for key in keys])


def _renumber(numbers: np.ndarray, known: list[Frequency | None]) -> tuple[np.ndarray, list[Frequency]]:
    distinct: list[Frequency] = []
    target = []
    for frequency in known:
        if frequency is not None and frequency not in distinct:
            distinct.append(frequency)
        target.append(-1 if frequency is None else distinct.index(frequency))
    return np.array(target, np.int64)[numbers], distinct


def _frequency(kind: int, size: int, end: int, point: int) -> Frequency | None:
    """Frequency of months or nanoseconds (`size`) that hits a month (0 is January) or weekday (`point`)."""
    if kind == _UNKNOWN:
        return None
    if kind == _BUSINESS:
        return Frequency("B", 1)
    if kind == _WEEKS:
        return Frequency("W", size // _WEEK, point=point)
    if kind == _STEPS:
        unit = next(name for name, length in reversed(NANOSECONDS.items()) if size % length == 0)
        return Frequency(unit, size // NANOSECONDS[unit])
    anchor: Literal["S", "E"] = "E" if end else "S"
    if size % 12 == 0:
        return Frequency("Y", size // 12, anchor, point + 1)
    if size % 3 == 0:  # four months name one grid of quarters: the first or the last of them does here
        return Frequency("Q", size // 3, anchor, point % 3 + (10 if end else 1))
    return Frequency("M", size, anchor)


def _usual_step(
    values: np.ndarray, owner: np.ndarray, counts: np.ndarray, where: np.ndarray | None = None
) -> np.ndarray:
    """Lower median of the differences within each series; 0 for those with one row, or that `where` leaves out."""
    inner = owner[1:] == owner[:-1]
    if where is not None:
        inner &= where[owner[1:]]
    steps, owners = np.diff(values)[inner], owner[1:][inner]
    found = np.zeros(len(counts), np.int64)
    if not len(steps):
        return found
    series, firsts, sizes = np.unique(owners, return_index=True, return_counts=True)
    lowest, highest = np.minimum.reduceat(steps, firsts), np.maximum.reduceat(steps, firsts)
    found[series] = lowest
    mixed = lowest != highest
    if mixed.any():  # only these need sorting
        chosen = np.repeat(mixed, sizes)
        steps, owners, sizes = steps[chosen], owners[chosen], sizes[mixed]
        ordered = steps[np.lexsort((steps, owners))]
        found[series[mixed]] = ordered[np.cumsum(sizes) - sizes + (sizes - 1) // 2]
    return found


def positions(frequency: Frequency, times: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Steps from a start to each timestamp, and whether it lies on the grid.

    Args:
        frequency: of the grid.
        times: datetime64[ns] [rows].
        starts: datetime64[ns] [rows], where the grid of each row's series begins; not after the time.
    """
    size = frequency.nanoseconds
    if size:
        delta = times.astype(np.int64) - starts.astype(np.int64)
        good = delta % size == 0
        if frequency.unit == "W":
            good &= Calendar.of(starts).weekday == frequency.point
        return delta // size, good
    row, first = Calendar.of(times), Calendar.of(starts)
    good = row.time == first.time
    if frequency.unit == "B":
        return row.business_day - first.business_day, good & (row.weekday < 5)
    good &= (row.last & first.last) if frequency.anchor == "E" else (row.first & first.first)
    delta = row.month - first.month
    if frequency.unit != "M":
        good &= (first.month - (frequency.point - 1)) % (3 if frequency.unit == "Q" else 12) == 0
    return delta // frequency.months, good & (delta % frequency.months == 0)


def to_grid(frequency: Frequency, times: np.ndarray) -> np.ndarray:
    """Timestamps moved to that of their period: its first moment, or its last day for W, ME, QE and YE.

    Args:
        frequency: of the grid.
        times: datetime64[ns] [rows].
    """
    calendar = Calendar.of(times)
    if frequency.unit == "W":
        # Weeks are counted from one that ends on the weekday; several weeks end with the last of them.
        ahead = calendar.day + (frequency.point - calendar.weekday) % 7
        origin = (frequency.point - 3) % 7
        size = 7 * frequency.multiple
        return _of_days(origin - (origin - ahead) // size * size)
    if frequency.nanoseconds:
        size = frequency.nanoseconds
        return (times.astype(np.int64) // size * size).view("datetime64[ns]")
    if frequency.unit == "B":
        return _of_days(calendar.day - np.maximum(calendar.weekday - 4, 0))
    size = frequency.months
    if frequency.anchor == "S":
        point = frequency.point - 1 if frequency.point else 0
        return (point + (calendar.month - point) // size * size).astype("datetime64[M]").astype("datetime64[ns]")
    point = frequency.point - 1 if frequency.point else size - 1
    month = point - (point - calendar.month) // size * size
    return ((month + 1).astype("datetime64[M]").astype("datetime64[D]") - 1).astype("datetime64[ns]")


def _of_days(days: np.ndarray) -> np.ndarray:
    return days.astype("datetime64[D]").astype("datetime64[ns]")


def advance(frequency: Frequency, starts: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Timestamps some steps after others on the grid, datetime64[ns]; the inverse of `positions`."""
    size = frequency.nanoseconds
    if size:
        return (starts.astype(np.int64) + steps * size).view("datetime64[ns]")
    calendar = Calendar.of(starts)
    time = calendar.time.astype("timedelta64[ns]")
    if frequency.unit == "B":
        number = calendar.business_day + steps
        return _of_days(number // 5 * 7 + number % 5 - 3) + time
    months = (calendar.month + steps * frequency.months).astype("datetime64[M]")
    if frequency.anchor == "S":
        return months.astype("datetime64[ns]") + time
    return ((months + 1).astype("datetime64[D]") - 1).astype("datetime64[ns]") + time
