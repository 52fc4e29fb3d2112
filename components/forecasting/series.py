"""Step `prepare_series`: real series from tables, checked, regular, and stored for every later step."""

from __future__ import annotations

import logging
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from modelmill.components.core import events, tracking
from modelmill.components.core.step import StepResult
from modelmill.components.data.sources import open_files
from modelmill.components.forecasting.frequency import Frequency
from modelmill.components.forecasting.packaged_series import read_packaged
from modelmill.components.forecasting.raw_series import RawSeries, concatenate, read_table
from modelmill.components.forecasting.regular_series import RegularSeries, make_regular
from modelmill.components.forecasting.series_config import PackagedSeries, SeriesConfig
from modelmill.components.forecasting.series_report import HTML, MARKDOWN, TABLE, frequency_counts, write_report
from modelmill.components.forecasting.series_table import FILE, SeriesTable, SeriesWriter

logger = logging.getLogger("modelmill")


def prepare_series(config: SeriesConfig, output: Path) -> StepResult:
    """Read, check and store series.

    Writes `series.arrow` (see `series_table`), `series.parquet` with one row a series (times, length, missing points,
    season length, scale), `report.html` and `report.md`. Equal inputs give equal bytes.

    Args:
        config: sources, and what is done about faults.
        output: existing empty folder.

    Returns:
        kind `series`; counts `series`, `points`, `missing_points`, `dropped_<reason>`, `constant_series`, and
        `filled_gaps`, `duplicate_rows`, `rounded_rows`, `infinite` where there were any; metadata `horizon`,
        `windows`, `past_covariates`, `known_covariates`, `frequencies` (series of each), `season_lengths` (of each)
        and `dataset_digest`.

    Raises:
        UserError: a source cannot be read, or the series have a fault that the section does not allow.
    """
    with tempfile.TemporaryDirectory(dir=output.parent, prefix="series-") as scratch:
        raw = concatenate(_tables(config, Path(scratch)))
    logger.info("%d rows of %d items", len(raw.codes), len(raw.items))
    events.progress(f"checking {len(raw.codes):,} rows")
    regular = make_regular(raw, config)
    del raw
    with SeriesWriter(output / FILE) as writer:
        writer.append(
            regular.items,
            regular.starts,
            [frequency.alias for frequency in regular.frequencies],
            np.array([_season_length(config, frequency) for frequency in regular.frequencies]),
            regular.target,
            regular.covariates,
        )
    table = SeriesTable(output / FILE, horizon=config.horizon, windows=config.windows)
    counts = _counts(regular)
    frequencies, label = frequency_counts(table), ", ".join(source.label for source in config.source)
    facts = _facts(config, table, counts) | {"source": label, "frequencies": _listed(frequencies)}
    write_report(table, output, title="Series", facts=facts, dropped=regular.dropped)
    digest = table.digest()
    profile = {name: counts[name] for name in ("series", "points", "missing_points")}
    tracking.log_dataset(name="series", digest=digest, source=label, context="training", profile=profile)
    tracking.log_metrics(counts)
    for name in (TABLE, HTML, MARKDOWN):
        tracking.log_artifact(output / name, "series")
    logger.info("%s", ", ".join(f"{count} {name}" for name, count in counts.items()))
    return StepResult(
        kind="series",
        counts=counts,
        metadata={
            "horizon": config.horizon,
            "windows": config.windows,
            "past_covariates": list(table.past_names),
            "known_covariates": list(table.known_names),
            "frequencies": frequencies,
            "season_lengths": dict(zip(table.frequencies, table.season_lengths.tolist(), strict=True)),
            "dataset_digest": digest,
        },
    )


def _tables(config: SeriesConfig, scratch: Path) -> Iterator[RawSeries]:
    for source in config.source:
        logger.info("reading %s", source.label)
        if isinstance(source, PackagedSeries):
            for name in source.names:
                yield read_packaged(name)
            continue
        for path, place, kind in open_files(source, scratch):
            yield read_table(path, place, kind, source, config.timezone)


def _season_length(config: SeriesConfig, frequency: Frequency) -> int:
    return config.season_lengths.get(frequency.alias, frequency.season_length)


def _counts(regular: RegularSeries) -> dict[str, int]:
    values = regular.target.values
    counts = {"series": len(regular.items), "points": len(values), "missing_points": int(np.isnan(values).sum())}
    mended = {name: count for name, count in sorted(regular.counts.items()) if count or name == "constant_series"}
    dropped = sorted(Counter(regular.dropped.values()).items())
    return counts | mended | {f"dropped_{reason}": count for reason, count in dropped}


def _facts(config: SeriesConfig, table: SeriesTable, counts: dict[str, int]) -> dict[str, str]:
    held = config.horizon * config.windows
    windows = f"the last {held:,} points of each series: {config.windows} windows of {config.horizon} steps"
    facts = {"held back": windows if held else "nothing", "covariates": _covariates(table)}
    facts |= {"as of": config.as_of} if config.as_of else {}
    return facts | {name.replace("_", " "): f"{count:,}" for name, count in counts.items()}


def _covariates(table: SeriesTable) -> str:
    told = [f"{name} (past)" for name in table.past_names] + [f"{name} (known ahead)" for name in table.known_names]
    return ", ".join(told) or "none"


def _listed(frequencies: dict[str, int]) -> str:
    return ", ".join(f"{name}: {count:,}" for name, count in frequencies.items())
