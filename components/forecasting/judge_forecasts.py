"""Step `judge_forecasts`: what the champion really forecast, beside what has become known since.

A backtest says how a model would have done. This step reads the forecasts that were published, each made before what
it is judged by existed, and compares them with Seasonal Naive on the same points.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from modelmill.components.core import events, tracking
from modelmill.components.core.errors import UserError
from modelmill.components.core.manifest import Manifest
from modelmill.components.core.model_folder import digest_of
from modelmill.components.core.step import StepResult
from modelmill.components.evaluation.page import html_table, markdown_table, page, text
from modelmill.components.forecasting.archive import KEY, ForecastName, open_archive
from modelmill.components.forecasting.backtest_config import SEASONAL_NAIVE
from modelmill.components.forecasting.drift_config import JudgeConfig
from modelmill.components.forecasting.frequency import parse_frequency
from modelmill.components.forecasting.grid import positions
from modelmill.components.forecasting.metrics import METRICS, Errors, mean_of_present, seasonal_errors
from modelmill.components.forecasting.publish_forecasts import last_stamp
from modelmill.components.forecasting.seasonal_naive import SeasonalNaive
from modelmill.components.forecasting.series_table import SeriesTable, open_series

TABLE, HTML, MARKDOWN = "scores.parquet", "report.html", "report.md"
CHAMPION = "champion"
logger = logging.getLogger("modelmill")


@dataclass(frozen=True)
class Published:
    """A forecast from the archive.

    Attributes:
        name: in the archive.
        items: of the series, [n].
        first: their first timestamps, datetime64[ns] [n].
        values: float64 [n, horizon, levels].
        levels: rising, 0.5 among them.
    """

    name: ForecastName
    items: list[str]
    first: np.ndarray
    values: np.ndarray
    levels: list[float]


def judge_forecasts(config: JudgeConfig, output: Path, *, series: Manifest, champion: Manifest) -> StepResult:
    """Score the champion's published forecasts on points that have become known, beside Seasonal Naive.

    Of forecasts of one series that overlap, the later one counts, so that no point is judged twice. Forecasts that
    reach beyond what is known are judged on the part that is. Writes `scores.parquet` with every metric of both
    forecasters for each series and forecast (columns as of `backtest`), `report.html` and `report.md`.

    Args:
        config: the archive.
        output: an empty folder.
        series: manifest of `prepare_series`.
        champion: manifest of the model whose forecasts are judged.

    Returns:
        kind `judged_forecasts`; counts `forecasts` (files), `pairs`, `points`, `vanished` (their series are gone),
        `frequency_changed`, `fallbacks` (not forecast: Seasonal Naive stood in); metrics of both forecasters;
        metadata `weights_digest`.

    Raises:
        UserError: the archive cannot be read.
    """
    table, weights = open_series(series), digest_of(champion)
    archive, now = open_archive(config), last_stamp(table)
    # A run of the past does not look at what was published later, and finds the same again.
    names = [name for name in archive.names() if name.made_by(weights) and name.stamp < now]
    counts = Counter({"forecasts": len(names[-config.max_forecasts :])})
    judged = _Judged(table, counts)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix="published-") as scratch:
        for name in reversed(names[-config.max_forecasts :]):  # the latest first: it takes precedence
            events.progress(f"forecast of {name.stamp}")
            judged.add(_read(archive.fetch(name, Path(scratch)), name))
    pq.write_table(judged.scores(), output / TABLE)
    metrics = judged.metrics()
    _report(output, judged, metrics)
    named = {
        key: counts[key] for key in ("forecasts", "pairs", "points", "vanished", "frequency_changed", "fallbacks")
    }
    logger.info("%s", ", ".join(f"{count} {key.replace('_', ' ')}" for key, count in named.items()))
    tracking.log_metrics({**metrics, **named})
    for file in (TABLE, HTML, MARKDOWN):
        tracking.log_artifact(output / file, "judged")
    return StepResult("judged_forecasts", named, metrics, {"weights_digest": weights})


def _read(path: Path, name: ForecastName) -> Published:
    try:
        table = pq.read_table(path)
        facts = json.loads((table.schema.metadata or {})[KEY])
        horizon, levels = int(facts["horizon"]), [float(level) for level in facts["quantiles"]]
        columns = [table.column(f"{level:g}").to_numpy() for level in levels]
        rows = len(table) // horizon
        return Published(
            name=name,
            items=table.column("item_id").to_pylist()[::horizon],
            first=table.column("timestamp").to_numpy().astype("datetime64[ns]")[::horizon],
            values=np.stack(columns, axis=-1).reshape(rows, horizon, len(levels)),
            levels=levels,
        )
    except (OSError, pa.ArrowException, KeyError, ValueError, TypeError) as error:
        raise UserError(f"archive.uri: {name.file} cannot be read ({error}); remove it from the archive") from None


class _Judged:
    """Scores of forecasts, the latest first."""

    def __init__(self, table: SeriesTable, counts: Counter[str]) -> None:
        self.table, self.counts = table, counts
        self._index = {item: number for number, item in enumerate(table.item_ids)}
        self._taken = table.lengths.copy()  # of each series, the first position that is judged or unknown
        self._parts: list[tuple[Published, np.ndarray, np.ndarray, list[dict[str, np.ndarray]]]] = []

    def add(self, published: Published) -> None:
        """Judge one."""
        rows, numbers, origins = self._place(published)
        if not len(rows):
            return
        horizon = published.values.shape[1]
        actual = np.full((len(rows), horizon), np.nan)
        for place, (number, origin) in enumerate(zip(numbers, origins, strict=True)):
            came = self.table.target(number)[origin : min(origin + horizon, self._taken[number])]
            actual[place, : len(came)] = came
        kept = ~np.isnan(actual).all(1)
        rows, numbers, origins, actual = rows[kept], numbers[kept], origins[kept], actual[kept]
        if not len(rows):
            return
        self._taken[numbers] = origins
        contexts = [
            self.table.context(int(number), int(origin)) for number, origin in zip(numbers, origins, strict=True)
        ]
        naive = np.nan_to_num(SeasonalNaive().predict(contexts, horizon, published.levels))
        values = published.values[rows].copy()
        failed = ~np.isfinite(values).all((1, 2))
        values[failed] = naive[failed]
        scale = seasonal_errors([context.target for context in contexts], self.table.season_lengths[numbers])
        found = [Errors(actual, forecast, published.levels, scale).by_item() for forecast in (naive, values)]
        self._parts.append((published, numbers, origins, found))
        self.counts.update(pairs=len(rows), points=int((~np.isnan(actual)).sum()), fallbacks=int(failed.sum()))

    def _place(self, published: Published) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows of a forecast whose points are known and not yet judged, their series, and their origins there."""
        table, horizon = self.table, published.values.shape[1]
        numbers = np.array([self._index.get(item, -1) for item in published.items], np.int64)
        self.counts["vanished"] += int((numbers < 0).sum())
        rows = np.flatnonzero(numbers >= 0)
        # Where the table begins later it no longer holds what came before.
        rows = rows[published.first[rows] > table.starts[numbers[rows]]]
        origins, fits = np.zeros(len(rows), np.int64), np.zeros(len(rows), bool)
        names = np.array(table.frequencies, object)[numbers[rows]]
        for name in sorted(set(names)):
            chosen = names == name
            of = rows[chosen]
            starts = table.starts[numbers[of]]
            origins[chosen], fits[chosen] = positions(parse_frequency(name), published.first[of], starts)
        self.counts["frequency_changed"] += int((~fits).sum())
        lengths, taken = table.lengths[numbers[rows]], self._taken[numbers[rows]]
        # A later forecast that was judged already leaves room for this one only if they do not overlap.
        free = (taken == lengths) | (origins + horizon <= taken)
        kept = fits & free & (origins < lengths)
        return rows[kept], numbers[rows[kept]], origins[kept]

    def scores(self) -> pa.Table:
        """A row for each forecaster, series and forecast, the oldest forecast first."""
        columns: dict[str, list[np.ndarray]] = {
            name: [np.empty(0)] for name in ("forecaster", "item_id", "window", "origin", *METRICS)
        }
        ids = np.array(self.table.item_ids, object)
        for window, (published, numbers, _, found) in enumerate(reversed(self._parts)):
            first = dict(zip(published.items, published.first, strict=True))
            for name, errors in zip((SEASONAL_NAIVE, CHAMPION), found, strict=True):
                items = ids[numbers]
                columns["forecaster"].append(np.full(len(items), name, object))
                columns["item_id"].append(items)
                columns["window"].append(np.full(len(items), window))
                columns["origin"].append(np.array([first[item] for item in items]).astype(np.int64))
                for metric in METRICS:
                    columns[metric].append(errors[metric])
        kinds = {"forecaster": pa.string(), "item_id": pa.string(), "window": pa.int64(), "origin": pa.timestamp("ns")}
        arrays = {
            name: pa.array(
                np.concatenate([part.astype(object) for part in parts]) if name in kinds else np.concatenate(parts),
                kinds.get(name, pa.float64()),
                from_pandas=False,
            )
            for name, parts in columns.items()
        }
        return pa.table(arrays)

    def metrics(self) -> dict[str, float]:
        """Mean of each metric over all pairs, of both forecasters, where any pair defines it."""
        means = {}
        for place, prefix in enumerate(("naive_", "")):
            for metric in METRICS:
                values = [errors[place][metric] for *_, errors in self._parts]
                mean = float(mean_of_present(np.concatenate(values))) if values else float("nan")
                if np.isfinite(mean):
                    means[f"{prefix}{metric}"] = mean
        return means

    def rows(self) -> list[list[str]]:
        """One for each forecast with known points, the oldest first: when, how much of it, and the errors."""
        rows = []
        for published, numbers, _, (naive, own) in reversed(self._parts):
            cells = [published.name.stamp, f"{len(numbers):,}"]
            for metric in ("sql", "mase"):
                cells += [f"{float(mean_of_present(errors[metric])):.4g}" for errors in (own, naive)]
            rows.append(cells)
        return rows


def _report(output: Path, judged: _Judged, metrics: dict[str, float]) -> None:
    head = ["series known until", "series", "SQL", "SQL of seasonal-naive", "MASE", "MASE of seasonal-naive"]
    rows: Sequence[Sequence[str]] = judged.rows()
    if rows:
        verdict = f"{judged.counts['points']:,} points of {len(rows)} published forecasts have become known."
        if "sql" in metrics:
            verdict += f" SQL {metrics['sql']:.4g}, of seasonal-naive {metrics['naive_sql']:.4g}."
    else:
        verdict = "No point that the champion published a forecast of has become known yet."
    (output / MARKDOWN).write_text(f"# Published forecasts\n\n{verdict}\n\n{markdown_table(head, rows)}", "utf-8")
    body = [f'<p class="verdict unclear">{text(verdict)}</p>', html_table(head, rows)]
    (output / HTML).write_text(page("Published forecasts", body), "utf-8")
