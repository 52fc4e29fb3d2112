"""Frequencies of many series at once, checked against pandas."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from modelmill.components.forecasting.frequency import parse_frequency
from modelmill.components.forecasting.grid import advance, infer_frequencies, positions, to_grid

ALIASES = [
    "250ms",
    "s",
    "90s",
    "min",
    "15min",
    "h",
    "6h",
    "D",
    "2D",
    "10D",
    "B",
    "W-SUN",
    "W-WED",
    "2W-SAT",
    "MS",
    "ME",
    "2MS",
    "QS-JAN",
    "QS-FEB",
    "QE-DEC",
    "QE-NOV",
    "YS-JAN",
    "YS-APR",
    "YE-DEC",
    "YE-JUN",
    "5YS-JAN",
]


def dates(alias: str, periods: int = 25, start: str = "2019-12-03") -> np.ndarray:
    return pd.date_range(start, periods=periods, freq=alias).to_numpy("datetime64[ns]")


def test_every_frequency_is_told_from_its_timestamps() -> None:
    times = np.concatenate([dates(alias) for alias in ALIASES])
    numbers, found = infer_frequencies(times, np.full(len(ALIASES), 25))
    assert [found[number].alias for number in numbers] == ALIASES


@pytest.mark.parametrize("alias", ALIASES)
def test_gaps_and_a_time_of_day_do_not_hide_a_frequency(alias: str) -> None:
    whole = dates(alias, 45) + (np.timedelta64(7, "h") if alias[-1] not in "smhn" else np.timedelta64(0, "h"))
    kept = np.delete(np.arange(45), [3, 4, 20, 41, 42, 43])
    numbers, found = infer_frequencies(whole[kept], np.array([len(kept)]))
    assert found[numbers[0]].alias == alias
    place, good = positions(found[0], whole[kept], np.repeat(whole[:1], len(kept)))
    assert good.all()
    np.testing.assert_array_equal(place, kept)
    np.testing.assert_array_equal(advance(found[0], np.repeat(whole[:1], len(kept)), kept), whole[kept])


def test_one_row_has_no_frequency_and_two_days_in_a_week_are_no_business_days() -> None:
    times = np.concatenate([dates("D", 1), dates("B", 3, "2024-01-01"), dates("B", 6, "2024-01-01")])
    numbers, found = infer_frequencies(times, np.array([1, 3, 6]))
    assert [found[n].alias if n >= 0 else None for n in numbers] == [None, "D", "B"]


@pytest.mark.parametrize(
    ("alias", "start", "time"),
    [
        ("h", "2024-01-01 00:00", "2024-01-01 03:30"),
        ("B", "2024-01-01", "2024-01-06"),
        ("MS", "2024-01-01", "2024-02-02"),
        ("MS", "2024-01-01", "2024-02-01 01:00"),
        ("ME", "2024-01-31", "2024-02-28"),
        ("QS-JAN", "2024-02-01", "2024-05-01"),
        ("YE-DEC", "2023-12-31", "2024-06-30"),
        ("W-SUN", "2024-01-01", "2024-01-08"),
        ("2MS", "2024-01-01", "2024-02-01"),
    ],
)
def test_what_lies_off_the_grid(alias: str, start: str, time: str) -> None:
    _, good = positions(parse_frequency(alias), np.array([time], "M8[ns]"), np.array([start], "M8[ns]"))
    assert not good.any()


@pytest.mark.parametrize("alias", [alias for alias in ALIASES if alias not in ("B", "10D", "2D", "250ms", "90s")])
def test_rounding_goes_to_the_label_of_the_period(alias: str) -> None:
    """As pandas labels periods: with their start, or for weeks and ends of months with their last day."""
    random = np.random.default_rng(1).integers(0, 2 * 10**18, 200).view("datetime64[ns]")
    frequency = parse_frequency(alias)
    moved = to_grid(frequency, random)
    late = frequency.unit == "W" or frequency.anchor == "E"
    day = np.timedelta64(1, "D").astype("timedelta64[ns]")
    assert ((moved >= random - day) if late else (moved <= random)).all()
    # Every label lies on one grid, and a label stays where it is.
    ordered = np.sort(moved)
    _, good = positions(frequency, ordered, np.repeat(ordered[:1], 200))
    assert good.all()
    np.testing.assert_array_equal(to_grid(frequency, moved), moved)
    offset = pd.tseries.frequencies.to_offset(alias)
    step = (pd.Series(moved) + offset - pd.Series(moved)).max().to_timedelta64()
    assert (np.abs(moved - random) <= step + day).all()


def test_rounding_to_business_days_goes_back_to_friday() -> None:
    times = np.array(["2024-01-05 12:00", "2024-01-06", "2024-01-07 23:00", "2024-01-08"], "M8[ns]")
    expected = ["2024-01-05", "2024-01-05", "2024-01-05", "2024-01-08"]
    np.testing.assert_array_equal(to_grid(parse_frequency("B"), times), np.array(expected, "M8[ns]"))
