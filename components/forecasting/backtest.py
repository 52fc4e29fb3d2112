"""Step `backtest`: forecasts of the last windows of every series, beside those of baselines.

It writes `scores.jsonl` of the candidate for the gate, `scores.parquet` with every metric of every forecaster, series
and window, `backtest.json` with all that the report shows, and the report.
"""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from modelmill.components.core import tracking
from modelmill.components.core.errors import UserError
from modelmill.components.core.manifest import Manifest
from modelmill.components.core.model_folder import digest_of
from modelmill.components.core.step import StepResult, step_options
from modelmill.components.evaluation.records import SCORES_FILE, write_scores
from modelmill.components.forecasting.backtest_config import BacktestConfig
from modelmill.components.forecasting.backtest_report import write_report
from modelmill.components.forecasting.backtest_summary import Summary, drawn_series, summarise
from modelmill.components.forecasting.baselines import baselines_of
from modelmill.components.forecasting.evaluate import Evaluation, evaluate
from modelmill.components.forecasting.forecast_config import ChronosUseConfig
from modelmill.components.forecasting.forecaster import Forecaster
from modelmill.components.forecasting.metrics import METRICS
from modelmill.components.forecasting.series_table import SeriesTable, open_series
from modelmill.components.forecasting.windows import WindowPlan, rolling_windows, stamps

logger = logging.getLogger("modelmill")
TABLE, RECORD = "scores.parquet", "backtest.json"
GATED = ("sql", "mase", "wql")  # in `scores.jsonl`; lower is better


@step_options(device=True)
def backtest(config: BacktestConfig, output: Path, *, series: Manifest, model: Manifest | None = None) -> StepResult:
    """Judge a model, or the best baseline, on rolling origins.

    A line of `scores.jsonl` is a window of a series. Windows whose series did not change over a season before the
    origin have no scaled error; they are in the table's `wql`, `mae` and `rmse` only, and counted.

    Args:
        config: windows, quantiles, baselines.
        output: an empty folder.
        series: of `prepare_series`, with windows held back.
        model: a forecaster; None makes the best baseline the candidate.

    Returns:
        kind `scores`; counts `series`, `windows`, `scored`, `skipped`, `unscaled`, `fallbacks` (of the candidate);
        metrics of the candidate; metadata `candidate`, `forecasters`, `fallbacks`, `scoring`, `dataset_digest`, and
        `weights_digest` of the model.

    Raises:
        UserError: windows over points that were not held back, or no window that can be scored.
    """
    table = open_series(series)
    plan = plan_of(config, table)
    forecasters = [*baselines_of(config), *([] if model is None else [opened(model, config.use)])]
    with tempfile.TemporaryDirectory(dir=output, prefix=".forecasts") as folder:
        found = evaluate(rolling_windows(table, plan), plan.horizon, forecasters, config.quantiles, Path(folder))
        scored = _scored(found, table, plan)
        chosen = config.candidate if model is None else forecasters[-1].name
        summary = summarise(found, len(table), config.metric, chosen)
        drawn = drawn_series(found, table, plan, summary)
    _write_scores(output, found, table, summary, scored)
    _write_table(output / TABLE, found, table)
    record = {"summary": summary.record(table.item_ids), "drawn": drawn, "plan": vars(plan), "metric": config.metric}
    (output / RECORD).write_text(json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n", "utf-8")
    write_report(output, record)
    counts = {
        "series": len(table),
        "windows": len(found.items),
        "scored": int(scored.sum()),
        "skipped": found.skipped,
        "unscaled": int((~scored).sum()),
        "fallbacks": summary.candidate.fallbacks,
    }
    metadata: dict[str, Any] = {
        "candidate": summary.candidate.name,
        "forecasters": [judged.name for judged in found.judged],
        "fallbacks": {judged.name: judged.fallbacks for judged in found.judged},
        "dataset_digest": series.metadata.get("dataset_digest", series.digest),
        "scoring": {**vars(plan), "quantiles": config.quantiles},
    }
    if model is not None:
        metadata["weights_digest"] = digest_of(model)
    _track(output, series, found, summary, counts)
    return StepResult("scores", counts, summary.metrics(), metadata)


def plan_of(config: BacktestConfig, table: SeriesTable) -> WindowPlan:
    """Where the windows of a section lie on some series.

    Raises:
        UserError: they lie on points that were not held back, or horizon and windows are known from nowhere.
    """
    for name, own, theirs in (("horizon", config.horizon, table.horizon), ("windows", config.windows, table.windows)):
        if not (own or theirs):
            raise UserError(f"backtest.{name}: the series hold nothing back; prepare them with {name} of at least 1")
    horizon = config.horizon or table.horizon
    plan = WindowPlan(
        horizon=horizon,
        windows=config.windows or table.windows,
        step=config.step or horizon,
        context_length=config.context_length,
        min_context=config.min_context,
    )
    plan.check_held_back(table)
    return plan


def opened(model: Manifest, use: ChronosUseConfig) -> Forecaster:
    """The forecaster of a manifest."""
    # Imported here, so that a backtest of baselines does not need chronos-forecasting.
    from modelmill.components.forecasting.forecast_model import open_forecaster

    return open_forecaster(model, use)


def _scored(found: Evaluation, table: SeriesTable, plan: WindowPlan) -> np.ndarray:
    """Which rows have scaled errors; bool [rows], the same for every forecaster."""
    if not len(found.items):
        longest = int(table.lengths.max(initial=0))
        raise UserError(
            f"backtest.horizon: no series has a window of {plan.horizon} steps with a point in it and"
            f" {plan.min_context} or more before it; the longest of {len(table)} has {longest} points"
        )
    scored = np.isfinite(found.judged[0].rows("sql"))
    if not scored.any():
        raise UserError(
            f"series: none of {len(scored)} windows can be scored, as no series changes over a season before its"
            " origin; give longer or other series, or a shorter season (series.season_lengths)"
        )
    return scored


def _write_scores(output: Path, found: Evaluation, table: SeriesTable, summary: Summary, scored: np.ndarray) -> None:
    times = np.datetime_as_string(stamps(table, found.items, found.origins), unit="s")
    ids = [f"{table.item_ids[item]}@{time}" for item, time in zip(found.items, times, strict=True)]
    digests = [hashlib.sha256(row.astype("<f8").tobytes()).hexdigest()[:16] for part in found.actual for row in part]
    values = {name: summary.candidate.rows(name) for name in GATED}
    kept = np.flatnonzero(scored)
    # A window in which all actuals are 0 leaves `wql` undefined, for every forecaster alike.
    defined = {name: column[kept] for name, column in values.items() if np.isfinite(column[kept]).all()}
    write_scores(output / SCORES_FILE, [ids[row] for row in kept], defined, [digests[row] for row in kept])


def _write_table(path: Path, found: Evaluation, table: SeriesTable) -> None:
    parts = []
    ids = np.array(table.item_ids, object)[found.items]
    for judged in found.judged:
        columns = {"forecaster": pa.array([judged.name] * len(ids)).dictionary_encode(), "item_id": pa.array(ids)}
        columns |= {"window": pa.array(found.windows), "origin": pa.array(stamps(table, found.items, found.origins))}
        parts.append(pa.table(columns | {name: pa.array(judged.rows(name)) for name in METRICS}))
    pq.write_table(pa.concat_tables(parts, promote_options="default").unify_dictionaries(), path)


def _track(output: Path, series: Manifest, found: Evaluation, summary: Summary, counts: dict[str, int]) -> None:
    digest = str(series.metadata.get("dataset_digest", series.digest))
    profile = {name: counts[name] for name in ("series", "windows")}
    tracking.log_dataset(name="series", digest=digest, source=series.uri, context="test", profile=profile)
    tracking.log_metrics(summary.metrics())
    for judged in found.judged:
        values = {f"{judged.name}.{name}": value for name, value in judged.metrics().items()}
        tracking.log_metrics({**values, f"{judged.name}.seconds": judged.seconds})
    tracking.set_tags({"modelmill.candidate": summary.candidate.name})
    for file in sorted(path for path in output.rglob("*") if path.is_file() and path.name != SCORES_FILE):
        folder = file.relative_to(output).parent.as_posix()
        tracking.log_artifact(file, "backtest" if folder == "." else f"backtest/{folder}")
    for row in summary.rows:
        logger.info("%s", row.line())
