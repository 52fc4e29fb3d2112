"""What there is to know about each series: a table of all of them, and a page that shows the first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from modelmill.components.evaluation.page import html_table, markdown_table, page, text
from modelmill.components.forecasting.frequency import parse_frequency
from modelmill.components.forecasting.grid import advance
from modelmill.components.forecasting.raw_series import stamp
from modelmill.components.forecasting.series_table import SeriesTable

TABLE, HTML, MARKDOWN = "series.parquet", "report.html", "report.md"
_SHOWN = 100  # series in the page's table
_DRAWN = 24  # of them with a figure
_BLOCK = 1 << 22  # points that are looked at together
_WIDTH, _HEIGHT, _POINTS = 600, 60, 300
_HEAD = ("series", "frequency", "season", "first", "last", "points", "missing", "mean", "scale", "seasonal error")


def describe(table: SeriesTable) -> dict[str, Any]:
    """Columns with one value a series: names, times, counts, and statistics of the points that are not missing.

    `scale` is the mean absolute value. `seasonal_error` is the mean absolute difference of points a season apart
    before the backtest windows, by which MASE divides; nan where there is no such pair.
    """
    blocks = np.split(np.arange(len(table)), np.flatnonzero(np.diff(np.cumsum(table.lengths) // _BLOCK)) + 1)
    parts = [_statistics(table, block) for block in blocks if len(block)]
    return {
        "item_id": table.item_ids,
        "frequency": table.frequencies,
        "season_length": table.season_lengths,
        "start": table.starts,
        "end": _ends(table),
        "length": table.lengths,
    } | {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _statistics(table: SeriesTable, block: np.ndarray) -> dict[str, np.ndarray]:
    """Statistics of some series that lie side by side, all of them at once."""
    values, lengths = np.concatenate([table.target(number) for number in block]), table.lengths[block]
    begins, owner = np.cumsum(lengths) - lengths, np.repeat(np.arange(len(block)), lengths)
    present = ~np.isnan(values)
    counts = np.add.reduceat(present.astype(np.int64), begins)
    filled = np.where(present, values, 0.0)
    with np.errstate(invalid="ignore"):  # no point at all: the statistics are nan
        mean = np.add.reduceat(filled, begins) / counts
        square = np.add.reduceat(np.where(present, values - mean[owner], 0.0) ** 2, begins)
        deviation, scale = np.sqrt(square / counts), np.add.reduceat(np.abs(filled), begins) / counts
    season, within = table.season_lengths[block][owner], np.arange(len(values)) - begins[owner]
    early = (within >= season) & (within < (lengths - table.horizon * table.windows)[owner])
    return {
        "missing": lengths - counts,
        "minimum": np.minimum.reduceat(np.where(present, values, np.inf), begins),
        "maximum": np.maximum.reduceat(np.where(present, values, -np.inf), begins),
        "mean": mean,
        "deviation": deviation,
        "scale": scale,
        "seasonal_error": _seasonal_error(values, season, np.flatnonzero(early), begins),
    }


def _seasonal_error(values: np.ndarray, season: np.ndarray, rows: np.ndarray, begins: np.ndarray) -> np.ndarray:
    change = np.full(len(values), np.nan)
    change[rows] = np.abs(values[rows] - values[rows - season[rows]])
    pairs = np.add.reduceat((~np.isnan(change)).astype(np.int64), begins)
    with np.errstate(invalid="ignore"):
        return np.add.reduceat(np.nan_to_num(change, nan=0.0), begins) / pairs


def _ends(table: SeriesTable) -> np.ndarray:
    names, ends = np.array(table.frequencies), table.starts.copy()
    for name in np.unique(names):
        chosen = names == name
        ends[chosen] = advance(parse_frequency(str(name)), table.starts[chosen], table.lengths[chosen] - 1)
    return ends


def write_report(
    table: SeriesTable,
    output: Path,
    *,
    title: str,
    facts: Mapping[str, str],
    dropped: Mapping[str, str] | None = None,
    more: Mapping[str, Any] | None = None,
) -> None:
    """Write `series.parquet` (all that `describe` tells), `report.html` and `report.md`.

    Args:
        title: of the page.
        facts: sentences about all series, by what they are about.
        dropped: items that were left out, and why.
        more: further columns of `series.parquet`.
    """
    columns = describe(table)
    pq.write_table(pa.table({**columns, **(more or {})}), output / TABLE)
    rows = [_row(columns, number) for number in range(min(len(table), _SHOWN))]
    left_out = [[item, reason.replace("_", " ")] for item, reason in list((dropped or {}).items())[:_SHOWN]]
    head, note = list(_HEAD), _note(len(table), len(dropped or {}))
    fact_rows = [[name, value] for name, value in facts.items()]
    parts = [f"# {title}\n", markdown_table(["", ""], fact_rows), markdown_table(head, rows), f"{note}\n"]
    page_parts = [html_table(["", ""], fact_rows).replace("<table>", "<table class=facts>"), _figures(table, columns)]
    page_parts += ["<h2>Series</h2>", html_table(head, rows), f"<p class=note>{text(note)}</p>"]
    if left_out:
        parts += ["## Left out\n", markdown_table(["series", "reason"], left_out)]
        page_parts += ["<h2>Left out</h2>", html_table(["series", "reason"], left_out)]
    (output / MARKDOWN).write_text("\n".join(parts), encoding="utf-8")
    (output / HTML).write_text(page(title, page_parts), encoding="utf-8")


def frequency_counts(table: SeriesTable) -> dict[str, int]:
    """Number of series of each frequency, the most frequent first."""
    return dict(sorted(Counter(table.frequencies).items(), key=lambda item: (-item[1], item[0])))


def _note(series: int, dropped: int) -> str:
    shown = f"The first {_SHOWN} of {series:,} series; series.parquet tells of all. " if series > _SHOWN else ""
    left = f"{dropped:,} series were left out. " if dropped else ""
    scale = "Scale is the mean absolute value; seasonal error is the mean absolute change over a season before the"
    return f"{shown}{left}{scale} windows that are held back (the divisor of MASE)."


def _row(columns: Mapping[str, Any], number: int) -> list[str]:
    cell = {name: column[number] for name, column in columns.items()}
    times = [stamp(cell[name]) for name in ("start", "end")]
    sizes = [f"{cell['length']:,}", f"{cell['missing']:,}"]
    numbers = [f"{cell[name]:.4g}" for name in ("mean", "scale", "seasonal_error")]
    return [cell["item_id"], cell["frequency"], str(cell["season_length"]), *times, *sizes, *numbers]


def _figures(table: SeriesTable, columns: Mapping[str, Any]) -> str:
    parts = []
    for number in range(min(len(table), _DRAWN)):
        times = f"{stamp(columns['start'][number])} to {stamp(columns['end'][number])}"
        caption = text(f"{table.item_ids[number]}, {times}")
        parts.append(f"<figure>{_line(table, number)}<figcaption>{caption}</figcaption></figure>")
    return "\n".join(parts)


def _line(table: SeriesTable, number: int) -> str:
    """A series as an `<svg>`, thinned to a few hundred points; what is held back for the backtest is shaded."""
    values = table.target(number)
    rows = np.unique(np.linspace(0, len(values) - 1, min(len(values), _POINTS)).astype(np.int64))
    shown = values[rows]
    rows, shown = rows[~np.isnan(shown)], shown[~np.isnan(shown)]
    span = max(len(values) - 1, 1)
    low, high = (float(shown.min()), float(shown.max())) if len(shown) else (0.0, 0.0)
    scaled = (shown - low) / (high - low) if high > low else np.full(len(shown), 0.5)
    places = zip(rows / span * _WIDTH, (1 - scaled) * (_HEIGHT - 4) + 2, strict=True)
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    held = table.horizon * table.windows / span * _WIDTH
    shade = f'<rect x="{_WIDTH - held:.1f}" width="{held:.1f}" height="{_HEIGHT}" fill="#8882"/>' if held else ""
    line = f'<polyline points="{points}" fill="none" stroke="#4c8bf5" vector-effect="non-scaling-stroke"/>'
    box = f'viewBox="0 0 {_WIDTH} {_HEIGHT}" preserveAspectRatio="none" style="height:{_HEIGHT}px"'
    return f"<svg {box}>{shade}{line}</svg>"
