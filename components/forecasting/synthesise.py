"""Step `synthesise_series`: series to train on that are drawn at random or mixed from others."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits

from modelmill.components.core import events, tracking
from modelmill.components.core.errors import UserError
from modelmill.components.core.manifest import Manifest
from modelmill.components.core.step import StepResult
from modelmill.components.forecasting.frequency import parse_frequency
from modelmill.components.forecasting.kernel_workers import KernelWorker, Made, map_chunks
from modelmill.components.forecasting.series_config import SynthesisConfig
from modelmill.components.forecasting.series_report import HTML, MARKDOWN, TABLE, frequency_counts, write_report
from modelmill.components.forecasting.series_table import FILE, Points, SeriesTable, SeriesWriter, open_series
from modelmill.components.forecasting.tsmixup import Mixer

logger = logging.getLogger("modelmill")
_CHUNK = 128  # series that are made and written together, whatever the number of processes
_WORTH_A_PROCESS = 2 * _CHUNK  # starting one takes as long as a few hundred series
_START = np.datetime64("2000-01-01", "ns")
_MIXUP = 1  # keeps its random numbers apart from those of KernelSynth


def synthesise_series(config: SynthesisConfig, output: Path, *, series: Manifest | None = None) -> StepResult:
    """Make series by KernelSynth, TSMixup or both, and store them as `prepare_series` stores real ones.

    Every series has its own random numbers, made from the seed, the method and the series' number, so it is the same
    whatever the number of processes, and the first of many are those of few. The column `made_of` of `series.parquet`
    tells each one's kernels, or series and weights.

    Args:
        config: how many of which kind.
        output: existing empty folder.
        series: what TSMixup mixes; only what precedes the backtest windows is read.

    Returns:
        kind `series`; counts `series`, `points`, `missing_points`, `kernel_series`, `mixup_series`; metadata as of
        `prepare_series` with nothing held back, and `method`, `seed`.

    Raises:
        UserError: TSMixup has no series to mix, or none that is long enough.
    """
    if config.mixup is not None and series is None:
        raise UserError("synthesis.mixup: no series to mix were given; give the step a `series` input, or set it null")
    frequency = parse_frequency(config.frequency)
    wanted = {"kernel": config.kernel, "mixup": config.mixup}
    counts = {name: part.count if part is not None else 0 for name, part in wanted.items()}
    made_of: list[str] = []
    with SeriesWriter(output / FILE) as writer, threadpool_limits(1):
        for method, chunks in (("kernel", _kernel_chunks(config)), ("mixup", _mixup_chunks(config, series))):
            done = 0
            for chunk in chunks:
                lengths = [len(values) for values, _ in chunk]
                writer.append(
                    [f"{method}-{number}" for number in range(done, done + len(chunk))],
                    np.full(len(chunk), _first(config.frequency)),
                    [frequency.alias] * len(chunk),
                    np.full(len(chunk), frequency.season_length),
                    Points(np.concatenate([[0], np.cumsum(lengths)]), np.concatenate([values for values, _ in chunk])),
                )
                made_of += [text for _, text in chunk]
                done += len(chunk)
                events.progress(f"{method} series", done, counts[method])
    return _finish(config, output, made_of, {f"{name}_series": count for name, count in counts.items()})


def _first(alias: str) -> np.datetime64:
    """The first timestamp of the grid from the year 2000 on."""
    import pandas as pd

    return pd.date_range(_START, periods=1, freq=alias).to_numpy("datetime64[ns]")[0]


def _finish(config: SynthesisConfig, output: Path, made_of: list[str], counts: dict[str, int]) -> StepResult:
    table = SeriesTable(output / FILE)
    points = int(table.lengths.sum())
    missing = sum(int(np.isnan(table.target(number)).sum()) for number in range(len(table)))
    counts = {"series": len(table), "points": points, "missing_points": missing} | counts
    method = "+".join(name for name, part in (("kernel-synth", config.kernel), ("ts-mixup", config.mixup)) if part)
    facts = {"method": method, "seed": str(config.seed)}
    facts |= {name.replace("_", " "): f"{count:,}" for name, count in counts.items()}
    write_report(table, output, title="Synthetic series", facts=facts, more={"made_of": made_of})
    digest = table.digest()
    profile = {name: counts[name] for name in ("series", "points")}
    tracking.log_dataset(name="synthetic", digest=digest, source=method, context="training", profile=profile)
    tracking.log_metrics(counts)
    for name in (TABLE, HTML, MARKDOWN):
        tracking.log_artifact(output / name, "synthesis")
    logger.info("%s", ", ".join(f"{count} {name}" for name, count in counts.items()))
    return StepResult(
        kind="series",
        counts=counts,
        metadata={
            "horizon": 0,
            "windows": 0,
            "past_covariates": [],
            "known_covariates": [],
            "frequencies": frequency_counts(table),
            "season_lengths": dict(zip(table.frequencies, table.season_lengths.tolist(), strict=True)),
            "dataset_digest": digest,
            "method": method,
            "seed": config.seed,
        },
    )


def _ranges(count: int) -> list[range]:
    return [range(first, min(first + _CHUNK, count)) for first in range(0, count, _CHUNK)]


def _kernel_chunks(config: SynthesisConfig) -> Iterator[Made]:
    if config.kernel is None:
        return
    worker = KernelWorker(config.kernel.length, config.kernel.max_kernels, config.seed)
    workers = min(config.workers or os.cpu_count() or 1, -(-config.kernel.count // _WORTH_A_PROCESS))
    yield from map_chunks(worker, _ranges(config.kernel.count), workers)


def _mixup_chunks(config: SynthesisConfig, series: Manifest | None) -> Iterator[Made]:
    if config.mixup is None or series is None:
        return
    table = open_series(series)
    mixer = Mixer(table, config.mixup)
    for numbers in _ranges(config.mixup.count):
        made = []
        for number in numbers:
            mixture = mixer.draw(np.random.default_rng((config.seed, _MIXUP, number)))
            parts = zip(mixture.weights, mixture.parts, strict=True)
            made.append((mixture.values, " + ".join(f"{weight:.3f} {table.item_ids[part]}" for weight, part in parts)))
        yield made
