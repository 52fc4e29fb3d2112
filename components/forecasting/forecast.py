"""Step `forecast`: quantiles of what follows every series."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from modelmill.components.core import events, tracking
from modelmill.components.core.errors import UserError
from modelmill.components.core.manifest import Manifest
from modelmill.components.core.model_folder import digest_of
from modelmill.components.core.step import StepResult, step_options
from modelmill.components.evaluation.page import html_table, markdown_table, page, text
from modelmill.components.forecasting.forecast_config import ForecastConfig
from modelmill.components.forecasting.forecast_model import open_forecaster
from modelmill.components.forecasting.forecaster import Forecaster
from modelmill.components.forecasting.frequency import parse_frequency
from modelmill.components.forecasting.grid import advance
from modelmill.components.forecasting.raw_series import stamp
from modelmill.components.forecasting.series_table import SeriesTable, open_series

FILE, HTML, MARKDOWN = "forecasts.parquet", "report.html", "report.md"
_TOGETHER = 4096  # series that are read, forecast and written together
_LISTED = 20
_HISTORY, _LEAST_HISTORY = 3, 50  # horizons and points before a forecast that are drawn
logger = logging.getLogger("modelmill")


@step_options(device=True)
def forecast(config: ForecastConfig, output: Path, *, series: Manifest, model: Manifest) -> StepResult:
    """Forecast what follows the last point of every series.

    Writes `forecasts.parquet`, one row a point to come: `item_id`, `timestamp` and a column for each level, named as
    its number (`0.1`); and `report.html` and `report.md`. A series without a value among the points that the model
    reads has rows of nan, and is counted.

    Args:
        config: horizon, levels and how the model is run.
        output: an empty folder.
        series: manifest of `prepare_series`; known covariates must reach over the horizon.
        model: manifest of a Chronos (`model/`).

    Returns:
        kind `forecasts`; counts `series`, `points`, `not_forecast` (series of nan); metadata `weights_digest`,
        `dataset_digest`, `horizon`, `quantiles`, `model`.

    Raises:
        UserError: there is no horizon or a too long one, a covariate is unknown or ends before the horizon, or the
            model cannot be used.
    """
    table = open_series(series)
    horizon = config.horizon or table.horizon
    if not horizon:
        raise UserError("forecast.horizon: the series name none; set one, such as 24")
    _check_covariates(config.use.covariates, table)
    events.progress("loading the model")
    done = 0

    def report(count: int) -> None:
        nonlocal done
        done += count
        events.progress("series", done, len(table))

    forecaster = open_forecaster(model, config.use, report=report)
    drawn = set(np.unique(np.linspace(0, len(table) - 1, min(config.num_charts, len(table))).astype(int)).tolist())
    charts: list[tuple[str, str]] = []
    failed: list[str] = []
    with pq.ParquetWriter(output / FILE, _schema(config.quantiles)) as writer:
        for begin in range(0, len(table), _TOGETHER):
            numbers = range(begin, min(begin + _TOGETHER, len(table)))
            values = _predict(forecaster, table, numbers, horizon, config)
            writer.write_table(_rows(table, numbers, values, config.quantiles))
            failed += [table.item_ids[n] for n, part in zip(numbers, values, strict=True) if np.isnan(part).any()]
            for number in sorted(drawn.intersection(numbers)):
                part = values[number - begin]
                charts.append((_caption(table, number, horizon), _chart(table, number, part, config.quantiles)))
    if failed:
        some = ", ".join(failed[:5])
        logger.warning("%d series have no value that the model could read, and no forecast: %s", len(failed), some)
    counts = {"series": len(table), "points": len(table) * horizon, "not_forecast": len(failed)}
    facts = {"model": f"{forecaster.name}, weights {digest_of(model)[:16]}", "horizon": str(horizon)}
    facts |= {name.replace("_", " "): f"{count:,}" for name, count in counts.items()}
    _write_report(output, facts, charts, failed, config.quantiles)
    tracking.log_params({"model": forecaster.name, "horizon": horizon, "weights_digest": digest_of(model)})
    tracking.log_metrics(counts)
    for name in (FILE, HTML, MARKDOWN):
        tracking.log_artifact(output / name, "forecasts")
    logger.info("forecast %s points of %s series", f"{counts['points']:,}", f"{len(table):,}")
    return StepResult(
        "forecasts",
        counts=counts,
        metadata={
            "weights_digest": digest_of(model),
            "dataset_digest": series.digest,
            "horizon": horizon,
            "quantiles": list(config.quantiles),
            "model": forecaster.name,
        },
    )


def _check_covariates(wanted: Sequence[str] | None, table: SeriesTable) -> None:
    held = (*table.past_names, *table.known_names)
    for name in wanted or ():
        if name not in held:
            names = ", ".join(held) or "none"
            raise UserError(f"forecast.use.covariates: there is no covariate {name!r}; the series have {names}")


def _predict(
    forecaster: Forecaster, table: SeriesTable, numbers: range, horizon: int, config: ForecastConfig
) -> np.ndarray:
    read = config.use.covariates
    if read is None:
        read = list(table.known_names) if forecaster.name == "chronos-2" else []
    # What is not read need not reach over the horizon.
    ahead = horizon if set(read) & set(table.known_names) else 0
    contexts = [table.context(number, horizon=ahead) for number in numbers]
    return forecaster.predict(contexts, horizon, config.quantiles)


def _schema(levels: Sequence[float]) -> pa.Schema:
    columns = [("item_id", pa.string()), ("timestamp", pa.timestamp("ns"))]
    return pa.schema([*columns, *((f"{level:g}", pa.float64()) for level in levels)])


def _rows(table: SeriesTable, numbers: range, values: np.ndarray, levels: Sequence[float]) -> pa.Table:
    """A row a point, [series * horizon]."""
    horizon, chosen = values.shape[1], np.array(numbers)
    names = np.array(table.frequencies)[chosen]
    times = np.empty((len(chosen), horizon), "datetime64[ns]")
    for name in np.unique(names):
        rows = names == name
        steps = table.lengths[chosen[rows], None] + np.arange(horizon)
        starts = np.repeat(table.starts[chosen[rows]], horizon)
        times[rows] = advance(parse_frequency(str(name)), starts, steps.reshape(-1)).reshape(-1, horizon)
    items = pa.array([table.item_ids[number] for number in numbers]).take(
        pa.array(np.repeat(chosen - chosen[0], horizon))
    )
    columns = [items, pa.array(times.reshape(-1)), *values.reshape(-1, len(levels)).T]
    return pa.Table.from_arrays([pa.array(column) for column in columns], schema=_schema(levels))


def _caption(table: SeriesTable, number: int, horizon: int) -> str:
    end = int(table.lengths[number])
    times = table.timestamps(number, end, end + horizon)
    return f"{table.item_ids[number]}: {stamp(times[0].to_datetime64())} to {stamp(times[-1].to_datetime64())}"


def _chart(table: SeriesTable, number: int, values: np.ndarray, levels: Sequence[float]) -> str:
    """The end of a series and its forecast."""
    # Imported here, so that a reused step does not pay for matplotlib.
    from modelmill.components.forecasting.fan_chart import Fan, fan_chart

    end, horizon = int(table.lengths[number]), len(values)
    begin = max(0, end - max(_HISTORY * horizon, _LEAST_HISTORY))
    times = table.timestamps(number, begin, end + horizon).to_numpy()
    fan = Fan(times[end - begin :], values)
    title = f"Forecast of {text(table.item_ids[number])}"
    return fan_chart(times[: end - begin], table.target(number)[begin:], [fan], levels, title=title)


def _write_report(
    output: Path,
    facts: dict[str, str],
    charts: Sequence[tuple[str, str]],
    failed: Sequence[str],
    levels: Sequence[float],
) -> None:
    rows = [[name, value] for name, value in facts.items()]
    bands = ", ".join(f"{high - low:.0%}" for low, high in zip(levels, reversed(levels), strict=True) if low < high)
    note = f"The line is the median; bands hold {bands} of what is expected." if bands else "The line is the median."
    figures = [f"<figure>{svg}<figcaption>{text(caption)}</figcaption></figure>" for caption, svg in charts]
    parts = [html_table(["", ""], rows).replace("<table>", "<table class=facts>"), f"<p class=note>{text(note)}</p>"]
    lines = ["# Forecasts\n", markdown_table(["", ""], rows)]
    parts += figures
    if failed:
        listed = [[item] for item in failed[:_LISTED]]
        parts += ["<h2>Without a value to forecast from</h2>", html_table(["series"], listed)]
        lines += ["## Without a value to forecast from\n", markdown_table(["series"], listed)]
    (output / HTML).write_text(page("Forecasts", parts), encoding="utf-8")
    (output / MARKDOWN).write_text("\n".join(lines), encoding="utf-8")
