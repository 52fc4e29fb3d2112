"""Frequencies of series: their names, their season lengths, and positions of timestamps on their grids.

A frequency is a pandas alias: a multiple of `s`, `min`, `h`, `D`, `W-SUN` (weeks by the day they are stamped with),
`B` (Monday to Friday), `MS`/`ME`, `QS-JAN`/`QE-DEC`, `YS-JAN`/`YE-DEC` (first or last day of a month, quarter, year).
The season length of a frequency is that of GluonTS (`gluonts.time_feature.seasonality`), which GIFT-Eval uses too,
except that a day's season is a week as in fev-bench:

| frequency | s | min | h | D | B | W | M | Q | Y |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
| season length | 3600 | 1440 | 24 | 7 | 5 | 1 | 12 | 4 | 1 |

A multiple such as `15min` divides it (96); where it does not divide it the series counts as not seasonal (1).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from modelmill.components.core.errors import UserError

SEASON_LENGTHS = {"s": 3600, "min": 1440, "h": 24, "D": 7, "B": 5, "W": 1, "M": 12, "Q": 4, "Y": 1}
MONTHS = ("JAN", "FEB", "MAR", "APR", "MAY", "JUN", "JUL", "AUG", "SEP", "OCT", "NOV", "DEC")
WEEKDAYS = ("MON", "TUE", "WED", "THU", "FRI", "SAT", "SUN")
DAY = 86_400 * 10**9  # nanoseconds
NANOSECONDS = {"ns": 1, "us": 10**3, "ms": 10**6, "s": 10**9, "min": 60 * 10**9, "h": 3600 * 10**9, "D": DAY}
_FORMER = {"S": "s", "T": "min", "H": "h", "M": "ME", "Q": "QE", "Y": "YE", "A": "YE", "L": "ms", "U": "us", "N": "ns"}
_ALIAS = re.compile(r"^(\d*)([A-Za-z]+?)(?:-([A-Z]{3}))?$")
_MONTHS_OF = {"M": 1, "Q": 3, "Y": 12}


@dataclass(frozen=True)
class Frequency:
    """A grid of timestamps.

    Attributes:
        unit: one of `ns us ms s min h D W B M Q Y`.
        multiple: units between two timestamps.
        anchor: `S` or `E` for months, quarters and years that are stamped with their first or last day.
        point: weekday of weeks (0 is Monday), or month of quarters and years (1 is January); 0 otherwise.
    """

    unit: str
    multiple: int
    anchor: Literal["", "S", "E"] = ""
    point: int = 0

    @property
    def alias(self) -> str:
        """Name for `pandas.date_range`."""
        number = "" if self.multiple == 1 else str(self.multiple)
        if self.unit == "W":
            return f"{number}W-{WEEKDAYS[self.point]}"
        if self.unit in ("Q", "Y"):
            return f"{number}{self.unit}{self.anchor}-{MONTHS[self.point - 1]}"
        return f"{number}{self.unit}{self.anchor}"

    @property
    def season_length(self) -> int:
        """Steps of a season, 1 for none; see the table above."""
        base = SEASON_LENGTHS.get(self.unit, 1)
        return base // self.multiple if base % self.multiple == 0 else 1

    @property
    def months(self) -> int:
        """Months between two timestamps, 0 for what is not counted in months."""
        return self.multiple * _MONTHS_OF.get(self.unit, 0)

    @property
    def nanoseconds(self) -> int:
        """Length of a step, 0 where steps differ in length."""
        return self.multiple * (7 * DAY if self.unit == "W" else NANOSECONDS.get(self.unit, 0))


def parse_frequency(alias: str, *, parameter: str = "series.frequency") -> Frequency:
    """Frequency of a pandas alias (the former ones such as `H` and `M` too).

    Raises:
        UserError: not one of those that the module's text lists.
    """
    match = _ALIAS.match(alias)
    if match is None:
        raise _unknown(alias, parameter)
    number, name, point = match.groups()
    name, multiple = _FORMER.get(name, name), int(number or 1)
    anchor: Literal["", "S", "E"] = ""
    if name[0] in "MQY" and name[1:] in ("S", "E"):
        anchor = "S" if name[1:] == "S" else "E"
        name = name[0]
    points = {"W": (WEEKDAYS, "SUN", 0), "Q": (MONTHS, "JAN" if anchor == "S" else "DEC", 1)}
    points["Y"] = points["Q"]
    if name in points:
        names, default, first = points[name]
        if (point or default) not in names:
            raise _unknown(alias, parameter)
        place = names.index(point or default) + first
    elif point or not (name in NANOSECONDS or name == "B" or anchor):
        raise _unknown(alias, parameter)
    else:
        place = 0
    if multiple < 1 or (name == "B" and multiple > 1):
        raise _unknown(alias, parameter)
    return Frequency(name, multiple, anchor, place)


def _unknown(alias: str, parameter: str) -> UserError:
    known = "15min, h, D, B, W-SUN, MS, ME, QE-DEC or YE-DEC"
    return UserError(f"{parameter}: {alias!r} is not a frequency that is read; write one like {known}")
