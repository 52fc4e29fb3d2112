"""Step `benchmark`: a model beside the baselines on the tasks of fev-bench or GIFT-Eval, from local copies.

Errors of each task are divided by Seasonal Naive's, clipped to 0.01 ... 100 and aggregated by geometric mean, as the
leaderboards of both do. `summaries.json` has the form of `fev`'s, so that published results can be put beside it.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from modelmill.components.core import events, tracking
from modelmill.components.core.manifest import Manifest
from modelmill.components.core.model_folder import digest_of
from modelmill.components.core.step import StepResult, step_options
from modelmill.components.forecasting.backtest import opened
from modelmill.components.forecasting.backtest_config import BacktestConfig
from modelmill.components.forecasting.baselines import baselines_of
from modelmill.components.forecasting.benchmark_config import BenchmarkConfig
from modelmill.components.forecasting.benchmark_report import write_report
from modelmill.components.forecasting.benchmark_tasks import BenchmarkTask, tasks_of
from modelmill.components.forecasting.evaluate import Judged, evaluate
from modelmill.components.forecasting.metrics import METRICS, geometric_means, relative_errors, win_rates

SUMMARIES, RECORD = "summaries.json", "benchmark.json"


@step_options(device=True)
def benchmark(config: BenchmarkConfig, output: Path, *, model: Manifest | None = None) -> StepResult:
    """Run forecasters over the tasks of a benchmark.

    Args:
        config: tasks and baselines.
        output: an empty folder.
        model: a forecaster; None shows the baselines only.

    Returns:
        kind `benchmark`; counts `tasks`, `forecasts` (series and windows of each forecaster), `fallbacks` (of the
        candidate: the model, or the best baseline); its metrics `skill`, `win_rate` and `relative_<metric>`; metadata
        `candidate`, and `weights_digest` of the model.

    Raises:
        UserError: the tasks cannot be read.
    """
    shown = BacktestConfig(baselines=config.baselines, fitted_points=config.fitted_points, workers=config.workers)
    forecasters = [*baselines_of(shown), *([] if model is None else [opened(model, config.use)])]
    tasks = tasks_of(config.source)
    results: list[list[Judged]] = []
    forecasts = 0
    for number, task in enumerate(tasks):
        events.progress(task.name, number, len(tasks))
        with tempfile.TemporaryDirectory(dir=output, prefix=".forecasts") as folder:
            found = evaluate(task.windows(), task.horizon, forecasters, task.levels, Path(folder))
        forecasts += len(found.items)
        results.append(found.judged)
    names = [forecaster.name for forecaster in forecasters]
    board = leaderboard(tasks, results, names)
    candidate = names[-1] if model is not None else board[0]["name"]
    chosen = next(row for row in board if row["name"] == candidate)
    per_task = [
        {"name": task.name, "metric": task.metric, "metrics": {one.name: one.metrics() for one in judged}}
        for task, judged in zip(tasks, results, strict=True)
    ]
    _write_files(output, tasks, results, {"leaderboard": board, "tasks": per_task, "candidate": candidate})
    metrics = {name: value for name, value in chosen.items() if isinstance(value, float)}
    tracking.log_metrics(metrics)
    for file in sorted(output.iterdir()):
        tracking.log_artifact(file, "benchmark")
    metadata: dict[str, Any] = {"candidate": candidate, "forecasters": names}
    if model is not None:
        metadata["weights_digest"] = digest_of(model)
    counts = {"tasks": len(tasks), "forecasts": forecasts, "fallbacks": chosen["fallbacks"]}
    return StepResult("benchmark", counts, metrics, metadata)


def leaderboard(tasks: list[BenchmarkTask], results: list[list[Judged]], names: list[str]) -> list[dict[str, Any]]:
    """Forecasters over all tasks, the best first.

    Args:
        tasks: of the benchmark.
        results: of each task what was found of each forecaster, Seasonal Naive first.
        names: of the forecasters.

    Returns:
        of each its `name`, `skill` and `win_rate` in the metric that each task is judged by (missing without an
        opponent), `relative_<metric>` (geometric means over the tasks that define the metric for all), `fallbacks`.
    """
    errors = _errors(results, [task.metric for task in tasks])
    judged = relative_errors(errors[np.isfinite(errors).all(1)], 0)
    rows: list[dict[str, Any]] = [{"name": name} for name in names]
    for metric in METRICS:
        values = _errors(results, [metric] * len(tasks))
        kept = values[np.isfinite(values).all(1)]
        if len(kept):
            for row, mean in zip(rows, geometric_means(relative_errors(kept, 0)), strict=True):
                row[f"relative_{metric}"] = float(mean)
    skills = 1 - geometric_means(judged) if len(judged) else np.full(len(names), np.nan)
    wins = win_rates(judged) if len(judged) else np.full(len(names), np.nan)
    for place, row in enumerate(rows):
        for name, values in (("skill", skills), ("win_rate", wins)):
            if np.isfinite(values[place]):
                row[name] = float(values[place])
        row["fallbacks"] = sum(judged[place].fallbacks for judged in results)
    return sorted(rows, key=lambda row: -row.get("skill", -np.inf))


def _errors(results: list[list[Judged]], metrics: list[str]) -> np.ndarray:
    """[tasks, forecasters], nan where a metric is undefined."""
    rows = [
        [one.metrics().get(metric, np.nan) for one in judged] for judged, metric in zip(results, metrics, strict=True)
    ]
    return np.array(rows, np.float64)


def _write_files(
    output: Path, tasks: list[BenchmarkTask], results: list[list[Judged]], record: dict[str, Any]
) -> None:
    summaries = []
    for task, judged in zip(tasks, results, strict=True):
        for one in judged:
            found = one.metrics()
            values = {name.upper(): value for name, value in found.items()}
            summaries.append(
                {**task.definition, "model_name": one.name, "test_error": found.get(task.metric), **values}
            )
    for name, content in ((SUMMARIES, summaries), (RECORD, record)):
        (output / name).write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    write_report(output, record)
