"""Step `detect_drift`: do the series still look like those that the champion was tuned on?

Compared are the changes over a season since the tuning with those before it, in units of the mean absolute change
then: levels and trends, which series are free to have, cancel out. Three measures a series:

- the population stability index over the deciles of then (Siddiqi, Credit Risk Scorecards, 2006, whose usual bound
  for a major shift is 0.25), which must also exceed what chance gives: under no drift it is about chi-squared with
  `bins - 1` degrees of freedom times `1/n + 1/m` (Yurdakul, Statistical properties of population stability index,
  2018);
- the mean absolute change by what it was;
- the strength of the season (Hyndman and Athanasopoulos, Forecasting: Principles and Practice, 3rd ed., 4.3).

Changes of one series depend on each other, so a single series says little; the share of series that drifted decides.
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from scipy.stats import chi2

from modelmill.components.core import events, tracking
from modelmill.components.core.manifest import Manifest
from modelmill.components.core.step import StepResult
from modelmill.components.evaluation.page import html_table, markdown_table, page, text
from modelmill.components.forecasting.drift_config import DriftConfig
from modelmill.components.forecasting.frequency import parse_frequency
from modelmill.components.forecasting.grid import positions
from modelmill.components.forecasting.raw_series import stamp
from modelmill.components.forecasting.series_profile import (
    SeriesProfile,
    changes_of,
    profile_of,
    read_profile,
)
from modelmill.components.forecasting.series_table import SeriesTable, open_series

TABLE, HTML, MARKDOWN = "drift.parquet", "report.html", "report.md"
_LISTED = 20
_SMOOTHING = 0.5  # points added to every bin, so that an empty one has a logarithm
logger = logging.getLogger("modelmill")

Status = Literal["compared", "nothing new", "too few points", "all missing", "frequency changed", "new", "vanished"]


@dataclass(frozen=True)
class SeriesDrift:
    """What was found of a series.

    Attributes:
        item_id: of it.
        status: whether it could be compared, and why not.
        points: since the tuning that are not missing.
        psi: population stability index, nan where it is undefined.
        scale_ratio: mean absolute change by what it was; infinite after a constant series.
        strength_change: of the season.
        drifted: whether a measure is beyond its bound; also where the frequency changed.
        reason: in words.
    """

    item_id: str
    status: Status
    points: int = 0
    psi: float = float("nan")
    scale_ratio: float = float("nan")
    strength_change: float = float("nan")
    drifted: bool = False
    reason: str = ""


def detect_drift(config: DriftConfig, output: Path, *, series: Manifest, champion: Manifest) -> StepResult:
    """Compare what is new since the champion was tuned with what it was tuned on.

    A champion whose folder does not tell what it was tuned on, such as one from the Hub, is compared by the points
    before those that are held back for the backtest. Writes `drift.parquet` with one row a series, `report.html` and
    `report.md`.

    Args:
        config: bounds.
        output: an empty folder.
        series: manifest of `prepare_series`.
        champion: manifest of the model.

    Returns:
        kind `drift`; counts `series`, `compared`, `drifted` and of each status; metadata `drifted` (whether the input
        drifted), `reason`, `new_points` (since the tuning, of all series; None where the champion does not tell) and
        `last_seen` (latest timestamp the champion was tuned on, empty where it does not tell).

    Raises:
        UserError: the champion's profile cannot be read.
    """
    table, profile = open_series(series), read_profile(champion)
    told = profile is not None
    if profile is None:
        logger.info("the champion does not tell what it was tuned on; compared by what the series hold back")
        profile = profile_of(table, np.maximum(table.lengths - table.horizon * table.windows, 0))
    found = [_of_item(config, table, number, profile) for number in range(len(table))]
    held = set(table.item_ids)
    found += [SeriesDrift(item, "vanished") for item in profile.item_id if item not in held]
    statuses = Counter(one.status for one in found)
    drifted, reason = _decide(config, found, len(table))
    columns = {name: pa.array([getattr(one, name) for one in found]) for name in asdict(SeriesDrift("", "new"))}
    pq.write_table(pa.table(columns), output / TABLE)
    _report(output, config, found, reason, drifted)
    counts = {"series": len(table), "drifted": sum(one.drifted for one in found)}
    counts |= {status.replace(" ", "_"): count for status, count in sorted(statuses.items())}
    counts.setdefault("compared", 0)
    new_points = sum(one.points for one in found) if told else None
    logger.log(logging.WARNING if drifted else logging.INFO, "%s", reason)
    tracking.log_metrics(counts)
    tracking.set_tags({"modelmill.drift": "yes" if drifted else "no"})
    for name in (TABLE, HTML, MARKDOWN):
        tracking.log_artifact(output / name, "drift")
    last_seen = stamp(np.datetime64(max(profile.end))) if told and profile.end else ""
    metadata = {"drifted": drifted, "reason": reason, "new_points": new_points, "last_seen": last_seen}
    return StepResult("drift", counts, {}, metadata)


def _of_item(config: DriftConfig, table: SeriesTable, number: int, profile: SeriesProfile) -> SeriesDrift:
    item = table.item_ids[number]
    if number % 1000 == 0:
        events.progress("series", number, len(table))
    then = profile.index.get(item)
    if then is None:
        return SeriesDrift(item, "new", _present(table.target(number)))
    frequency, before = table.frequencies[number], profile.frequency[then]
    if frequency != before:
        points = _present(table.target(number))
        return SeriesDrift(item, "frequency changed", points, drifted=True, reason=f"{before} became {frequency}")
    begin = _position_after(table, number, profile.end[then])
    recent = table.target(number)[begin:]
    if not len(recent):
        return SeriesDrift(item, "nothing new")
    if np.isnan(recent).all():
        return SeriesDrift(item, "all missing")
    # A season of then: its changes are what the edges are of.
    changes = changes_of(table.target(number), profile.season_length[then], begin)
    scale, points = profile.scale[then], profile.points[then]
    if len(changes.values) < config.min_points or scale is None:
        return SeriesDrift(item, "too few points", _present(recent))
    return _compared(config, item, _present(recent), changes.values, changes.strength, profile, then, scale, points)


def _present(values: np.ndarray) -> int:
    return int((~np.isnan(values)).sum())


def _position_after(table: SeriesTable, number: int, end: str) -> int:
    """First position after a timestamp; 0 where the series begins later."""
    last, start = np.array([end], "datetime64[ns]"), table.starts[[number]]
    if last[0] < start[0]:
        return 0
    frequency = parse_frequency(table.frequencies[number])
    return min(int(positions(frequency, last, start)[0][0]) + 1, int(table.lengths[number]))


def _compared(
    config: DriftConfig,
    item: str,
    points: int,
    changes: np.ndarray,
    strength: float,
    profile: SeriesProfile,
    then: int,
    scale: float,
    reference_points: int,
) -> SeriesDrift:
    reasons = []
    size = float(np.abs(changes).mean())
    ratio = size / scale if scale > 0 else (1.0 if size == 0 else float("inf"))
    if config.max_scale_ratio is not None and not 1 / config.max_scale_ratio <= ratio <= config.max_scale_ratio:
        reasons.append(f"changes are {ratio:.3g} times as large" if np.isfinite(ratio) else "it was constant")
    index, edges = float("nan"), profile.edges[then]
    if edges is not None:
        index = stability_index(changes / scale, np.array(edges))
        bins = len(np.unique(edges)) + 1
        chance = float(chi2.ppf(config.confidence, bins - 1)) * (1 / len(changes) + 1 / reference_points)
        if config.max_psi is not None and index > max(config.max_psi, chance):
            reasons.append(f"PSI {index:.3g}")
    before = profile.strength[then]
    change = float("nan") if before is None else strength - before
    if config.max_strength_change is not None and abs(change) > config.max_strength_change:
        reasons.append(f"strength of the season {before:.2f} became {strength:.2f}")
    return SeriesDrift(item, "compared", points, index, ratio, change, bool(reasons), ", ".join(reasons))


def stability_index(values: np.ndarray, edges: np.ndarray) -> float:
    """Population stability index of values against a distribution that its quantiles describe.

    Args:
        values: float64 [points], at least one.
        edges: quantiles at even levels, such as deciles; equal ones are one edge with the share of all of them.
    """
    inner, firsts = np.unique(edges, return_index=True)
    lasts = np.append(firsts[1:], len(edges))
    cumulative = np.concatenate([[0.0], lasts / (len(edges) + 1), [1.0]])
    expected = np.diff(cumulative)
    counts = np.bincount(np.searchsorted(inner, values, side="left"), minlength=len(inner) + 1)
    actual = (counts + _SMOOTHING * len(expected) * expected) / (len(values) + _SMOOTHING * len(expected))
    return float(((actual - expected) * np.log(actual / expected)).sum())


def _decide(config: DriftConfig, found: list[SeriesDrift], held: int) -> tuple[bool, str]:
    """Whether the input drifted, and why."""
    comparable = [one for one in found if one.status in ("compared", "frequency changed")]
    drifted = sum(one.drifted for one in comparable)
    new = sum(one.status == "new" for one in found)
    if held and new / held > config.max_new:
        return True, f"the input drifted: {new} of {held} series are new to the champion, above {config.max_new:.0%}"
    if not comparable:
        return False, "no drift was found: no series has enough new points to be compared"
    what = f"{drifted} of {len(comparable)} series drifted"
    if drifted / len(comparable) > config.max_drifted:
        return True, f"the input drifted: {what}, above {config.max_drifted:.0%}"
    return False, f"the input did not drift: {what}, at most {config.max_drifted:.0%}"


def _report(output: Path, config: DriftConfig, found: list[SeriesDrift], reason: str, drifted: bool) -> None:
    statuses = Counter(one.status for one in found)
    totals = [[status, f"{count:,}"] for status, count in sorted(statuses.items())]
    shown = sorted((one for one in found if one.drifted), key=lambda one: (-np.nan_to_num(one.psi), one.item_id))
    others = [one for one in found if one.status in ("new", "vanished", "all missing")]
    rows = [_row(one) for one in (*shown[:_LISTED], *others[:_LISTED])]
    head = ["series", "points since", "PSI", "changes", "season", "finding"]
    note = (
        f"Changes over a season since the tuning beside those before. Bounds: PSI {config.max_psi}, changes"
        f" {config.max_scale_ratio} times as large or small, strength of the season by {config.max_strength_change}."
    )
    parts = [f"# Drift\n\n{reason}\n", markdown_table(["status", "series"], totals)]
    parts += [markdown_table(head, rows)] if rows else []
    (output / MARKDOWN).write_text("\n".join([*parts, f"{note}\n"]), encoding="utf-8")
    body = [f'<p class="verdict {"worse" if drifted else "better"}">{text(reason)}</p>']
    body += [html_table(["status", "series"], totals), *([html_table(head, rows)] if rows else [])]
    (output / HTML).write_text(page("Drift", [*body, f"<p class=note>{text(note)}</p>"]), encoding="utf-8")


def _row(one: SeriesDrift) -> list[str]:
    numbers = [f"{value:.3g}" if np.isfinite(value) else "" for value in (one.psi, one.scale_ratio)]
    change = f"{one.strength_change:+.2f}" if np.isfinite(one.strength_change) else ""
    return [one.item_id, f"{one.points:,}", *numbers, change, one.reason or one.status]
