"""Tasks of public benchmarks as windows: those of fev, and the data sets of GIFT-Eval.

A series with several targets is several series here, as both benchmarks allow; static covariates are not read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from modelmill.components.core.errors import UserError
from modelmill.components.forecasting.benchmark_config import FevTasks, GiftEvalTasks
from modelmill.components.forecasting.frequency import Frequency, parse_frequency
from modelmill.components.forecasting.metrics import METRICS
from modelmill.components.forecasting.series_table import Context
from modelmill.components.forecasting.windows import Window

# GIFT-Eval (Aksu et al. 2024, arXiv:2410.10393): steps of the short horizon by frequency, those of M4 by its own rule.
_STEPS = {"s": 60, "min": 48, "h": 48, "D": 30, "W": 8, "M": 12}
_M4_STEPS = {"h": 48, "D": 14, "W": 13, "M": 18, "Q": 8, "Y": 6}
_TERMS = {"short": 1, "medium": 10, "long": 15}
_TESTED, _MOST_WINDOWS = 0.1, 20  # share of the shortest series that is tested, and windows at most
_LEVELS = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]


@dataclass(frozen=True)
class BenchmarkTask:
    """A task.

    Attributes:
        name: unique in the benchmark.
        horizon: steps.
        levels: quantiles that are forecast, rising, 0.5 among them.
        metric: that the benchmark ranks by.
        windows: reads the data.
        definition: fields of `fev`'s summaries that identify it.
    """

    name: str
    horizon: int
    levels: list[float]
    metric: str
    windows: Callable[[], Iterable[Window]]
    definition: dict[str, Any]


def fev_tasks(source: FevTasks) -> list[BenchmarkTask]:
    """The tasks of a YAML file.

    Raises:
        UserError: `fev` is not installed, the file holds no tasks, or a task has no local data or a metric that is not
            computed here.
    """
    import yaml

    try:
        import fev
    except ImportError:
        raise UserError("benchmark.source.type: fev needs the package of that name; pip install fev") from None
    parameter = f"benchmark.source.tasks: {source.tasks}"
    try:
        entries = yaml.safe_load(Path(source.tasks).read_text(encoding="utf-8"))["tasks"]
        tasks = [fev.Task(**entry) for entry in entries]
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError, AssertionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{parameter} holds no tasks of fev ({reason}); see fev.Task for what one has") from None
    found = []
    for place, (task, entry) in enumerate(zip(tasks, entries, strict=True)):
        metric = task.eval_metric if isinstance(task.eval_metric, str) else ""
        if metric.lower() not in METRICS:
            known = ", ".join(name.upper() for name in METRICS)
            raise UserError(f"{parameter}: task {place} is judged by {task.eval_metric}; computed here are {known}")
        local = fev.Task(**{**entry, **_local(entry, source.folder, f"{parameter}: task {place}")})
        levels = task.quantile_levels or [0.5]
        if 0.5 not in levels:
            raise UserError(f"{parameter}: task {place} has quantiles without 0.5, the point forecast; add it")
        found.append(
            BenchmarkTask(
                name=f"{place}-{task.task_name}",
                horizon=task.horizon,
                levels=levels,
                metric=metric.lower(),
                windows=lambda task=local: _fev_windows(task),  # type: ignore[misc]
                definition={**task.to_dict(), "fev_version": fev.__version__},
            )
        )
    return found


def _local(entry: dict[str, Any], folder: str | None, where: str) -> dict[str, Any]:
    """Fields of a task that point it at local data."""
    config, path = entry.get("dataset_config"), str(entry.get("dataset_path"))
    if config is not None:
        if folder is None:
            raise UserError(f"{where} is the data set {config!r}; set benchmark.source.folder to where its copy lies")
        path = str(Path(folder) / config / "*.parquet")
    if not any(Path(path).parent.glob(Path(path).name)):
        raise UserError(f"{where} has no data, {path} does not exist; copy the data set there")
    return {"dataset_path": path, "dataset_config": None}


def _fev_windows(task: Any) -> Iterator[Window]:
    """Windows of a task, one for each of its targets: metrics are computed of each, and averaged."""
    number = 0
    for window in task.iter_windows():
        past, future = (part.data.table for part in window.get_input_data())
        truth = window.get_ground_truth().data.table
        covariates = {name: _lists(past, name) for name in task.known_dynamic_columns + task.past_dynamic_columns}
        known = {name: _lists(future, name) for name in task.known_dynamic_columns}
        ids = past.column(task.id_column).to_pylist()
        for column in task.target_columns:
            targets = [values.astype(np.float64) for values in _lists(past, column)]
            contexts = [
                Context(
                    item_id=ids[place],
                    target=target,
                    past={name: values[place] for name, values in covariates.items()},
                    future={name: values[place] for name, values in known.items()},
                    frequency=_alias(task.freq),
                    season_length=task.seasonality,
                )
                for place, target in enumerate(targets)
            ]
            yield _window(number, contexts, np.stack(_lists(truth, column)), np.full(len(ids), task.seasonality))
            number += 1


def _alias(name: str) -> str:
    try:
        return parse_frequency(name).alias
    except UserError:
        return name


def _lists(table: pa.Table, column: str) -> list[np.ndarray]:
    """Values of a list column row by row, as they are stored: `fev` itself hands out float32."""
    values = pc.list_flatten(table.column(column)).to_numpy()
    lengths = pc.list_value_length(table.column(column)).to_numpy()
    return np.split(values, np.cumsum(lengths)[:-1])


def _window(number: int, contexts: list[Context], actual: np.ndarray, scale_seasons: np.ndarray) -> Window:
    items = np.arange(len(contexts))
    return Window(number, items, np.zeros_like(items), contexts, actual.astype(np.float64), 0, scale_seasons)


def gift_eval_tasks(source: GiftEvalTasks) -> list[BenchmarkTask]:
    """The data sets and terms of a section.

    Raises:
        UserError: a folder holds no data set, or its frequency has no horizon in the benchmark.
    """
    found = []
    for name in source.datasets:
        if not (Path(source.folder) / name / "dataset_info.json").is_file():
            raise UserError(
                f"benchmark.source.datasets: {Path(source.folder) / name} holds no data set; copy {name!r} there"
            )
        data = _saved(source, name)
        frequency = parse_frequency(data.data.column("freq")[0].as_py(), parameter=f"benchmark.source: {name}")
        steps = (_M4_STEPS if "m4" in name else _STEPS).get(frequency.unit)
        if steps is None:
            raise UserError(f"benchmark.source.datasets: GIFT-Eval has no horizon for {name!r} ({frequency.alias})")
        for term in source.terms:
            horizon = steps * _TERMS[term]
            found.append(
                BenchmarkTask(
                    name=f"{name}/{frequency.alias}/{term}",
                    horizon=horizon,
                    levels=_LEVELS,
                    metric="wql",
                    windows=lambda name=name, frequency=frequency, horizon=horizon: [  # type: ignore[misc]
                        _gift_window(source, name, frequency, horizon)
                    ],
                    definition={"dataset_path": name, "horizon": horizon, "quantile_levels": _LEVELS},
                )
            )
    return found


def _saved(source: GiftEvalTasks, name: str) -> Any:
    import datasets

    return datasets.load_from_disk(str(Path(source.folder) / name))


def _gift_window(source: GiftEvalTasks, name: str, frequency: Frequency, horizon: int) -> Window:
    """All windows of all series as one: GIFT-Eval takes its means over all of them together."""
    data = _saved(source, name)
    ids, targets = data.data.column("item_id").to_pylist(), data.data.column("target").to_pylist()
    series = []
    for item_id, target in zip(ids, targets, strict=True):
        parts = np.atleast_2d(np.array(target, np.float64))
        series += [(item_id if len(parts) == 1 else f"{item_id}_dim{k}", part) for k, part in enumerate(parts)]
    shortest = min(len(values) for _, values in series)
    count = 1 if "m4" in name else min(max(1, int(np.ceil(_TESTED * shortest / horizon))), _MOST_WINDOWS)
    if shortest <= count * horizon:
        raise UserError(
            f"benchmark.source.terms: {name!r} has a series of {shortest} points, too few for {count} windows of"
            f" {horizon}; leave the term out"
        )
    # GluonTS, whose seasons GIFT-Eval takes, knows none of days.
    season = 1 if frequency.unit == "D" else frequency.season_length
    contexts, actual = [], []
    for item_id, values in series:
        for left in range(count, 0, -1):
            origin = len(values) - left * horizon
            contexts.append(Context(item_id, values[:origin], frequency=frequency.alias, season_length=season))
            actual.append(values[origin : origin + horizon])
    scale = [season if season < len(context.target) else 1 for context in contexts]
    return _window(0, contexts, np.stack(actual), np.array(scale))


def tasks_of(source: FevTasks | GiftEvalTasks) -> list[BenchmarkTask]:
    """The tasks of a source, at least one.

    Raises:
        UserError: see `fev_tasks` and `gift_eval_tasks`.
    """
    if source.type == "fev":
        return fev_tasks(source)
    return gift_eval_tasks(source)
