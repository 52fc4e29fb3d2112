"""Step `benchmark`: tasks in the formats of fev and GIFT-Eval, and their numbers."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import fev
import numpy as np
import pandas as pd
import pytest
import yaml

from modelmill.components.core.errors import UserError
from modelmill.components.core.manifest import Manifest
from modelmill.components.core.step import section
from modelmill.components.forecasting import component
from modelmill.components.forecasting.benchmark import benchmark
from modelmill.components.forecasting.benchmark_config import BenchmarkConfig
from modelmill.components.forecasting.benchmark_tasks import tasks_of
from modelmill.components.forecasting.seasonal_naive import SeasonalNaive

from .backtests import seasonal
from .conftest import Produce

LEVELS = [0.1, 0.5, 0.9]
COMMON = {"quantile_levels": LEVELS, "extra_metrics": ["WQL", "MASE", "MAE", "RMSE"], "eval_metric": "SQL"}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def save(path: Path, values: list[np.ndarray], frequency: str, **columns: list[np.ndarray]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "id": f"series-{place}",
            "timestamp": pd.date_range("2001-01-01", periods=len(one), freq=frequency),
            "target": one,
            **{name: column[place] for name, column in columns.items()},
        }
        for place, one in enumerate(values)
    ]
    datasets.Dataset.from_list(rows).to_parquet(str(path))


@pytest.fixture
def fev_source(tmp_path: Path) -> dict[str, Any]:
    """Three tasks: by position with gaps, by date with covariates and two targets, and one named as on the Hub."""
    values = seasonal(5, 40)
    values[1][[3, 38]], values[2], values[4] = np.nan, np.full(40, 2.0), values[4][:12]
    save(tmp_path / "a" / "data.parquet", values, "QS")
    one, two = seasonal(3, 50, season=7, seed=1), seasonal(3, 50, season=7, seed=2)
    save(tmp_path / "b" / "data.parquet", one, "D", other=two, promotion=[np.arange(50) % 2] * 3, sales=one)
    save(tmp_path / "copies" / "m4" / "part-0.parquet", seasonal(2, 60, season=12, seed=3), "MS")
    tasks = [
        {"dataset_path": str(tmp_path / "a" / "data.parquet"), "horizon": 4, "num_windows": 3, "seasonality": 4}
        | COMMON
        | {"window_step_size": 2, "max_context_length": 20},
        {"dataset_path": str(tmp_path / "b" / "data.parquet"), "horizon": 5, "num_windows": 2, "seasonality": 7}
        | COMMON
        | {"initial_cutoff": "2001-02-01", "window_step_size": "5D", "target": ["target", "other"]}
        | {"known_dynamic_columns": ["promotion"], "past_dynamic_columns": ["sales"]},
        {"dataset_path": "autogluon/chronos_datasets", "dataset_config": "m4", "horizon": 6, "seasonality": 12}
        | COMMON,
    ]
    (tmp_path / "tasks.yaml").write_text(yaml.safe_dump({"tasks": tasks}))
    return {"type": "fev", "tasks": str(tmp_path / "tasks.yaml"), "folder": str(tmp_path / "copies")}


def config(source: dict[str, Any], **values: Any) -> BenchmarkConfig:
    return BenchmarkConfig.model_validate({"source": source, "baselines": ["theta"], "workers": 1} | values)


def predictions(array: np.ndarray) -> list[dict[str, Any]]:
    return [
        {"predictions": one[:, 1], **{str(level): one[:, place] for place, level in enumerate(LEVELS)}}
        for one in array
    ]


def of_fev(task: fev.Task, tasks: Iterator[Any]) -> dict[str, Any]:
    """Summary of fev for Seasonal Naive on the same windows."""
    windows = iter(next(tasks).windows())
    found = []
    for _ in task.iter_windows():
        found.append(
            {
                column: predictions(SeasonalNaive().predict(next(windows).contexts, task.horizon, LEVELS))
                for column in task.target_columns
            }
        )
    assert next(windows, None) is None
    return task.evaluation_summary(found, model_name="seasonal-naive")


def test_scores_and_leaderboard_equal_those_of_fev(
    produce: Produce, fev_source: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = produce(benchmark, config(fev_source))
    monkeypatch.setenv("FEV_DATASETS_PREFIX", fev_source["folder"])
    theirs = fev.Benchmark.from_yaml(fev_source["tasks"]).tasks
    ours = json.loads(found.path("benchmark.json").read_text())["tasks"]
    tasks = iter(tasks_of(config(fev_source).source))
    for task, own in zip(theirs, ours, strict=True):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            summary = of_fev(task, tasks)
        metrics = own["metrics"]["seasonal-naive"]
        assert metrics.keys() == {"sql", "wql", "mase", "mae", "rmse"}
        for name, value in metrics.items():
            assert value == pytest.approx(summary[name.upper()], rel=1e-9, abs=0)
        assert metrics["sql"] == pytest.approx(summary["test_error"], rel=1e-9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        board = fev.leaderboard(str(found.path("summaries.json")), baseline_model="seasonal-naive")
    for row in json.loads(found.path("benchmark.json").read_text())["leaderboard"]:
        for name, column in (("skill", "skill_score"), ("win_rate", "win_rate")):
            assert row[name] == pytest.approx(board.loc[row["name"], column], rel=1e-9, abs=1e-12)
    assert found.counts == {"tasks": 3, "forecasts": 3 * 5 + 2 * 2 * 3 + 2, "fallbacks": 0}
    assert found.metrics["relative_sql"] == pytest.approx(1 - found.metrics["skill"])
    report = found.path("report.md").read_text()
    assert "| 2-m4 | SQL |" in report
    assert "| theta |" in report


def test_covariates_of_a_task(fev_source: dict[str, Any]) -> None:
    task = tasks_of(config(fev_source).source)[1]
    windows = list(task.windows())
    assert len(windows) == 4, "two windows of two targets"
    first = windows[0].contexts[0]
    assert (first.frequency, first.season_length, len(first.target)) == ("D", 7, 32)
    assert first.future["promotion"].tolist() == [0, 1, 0, 1, 0]
    assert first.past.keys() == {"promotion", "sales"}
    targets = [window.contexts[0].target for window in windows[:2]]
    np.testing.assert_array_equal(first.past["sales"], targets[1])
    assert np.abs(targets[0] - targets[1]).max() > 0, "fev sorts the targets by their names"
    assert len(windows[2].contexts[0].target) == 37


@pytest.fixture
def gift_source(tmp_path: Path) -> dict[str, Any]:
    hourly = np.stack(seasonal(2, 600, season=24))
    hourly[0, [100, 590]] = np.nan
    daily = seasonal(2, 300, season=7, seed=1)
    yearly = seasonal(3, 25, season=1, seed=2)
    for name, targets, frequency in (
        ("two/H", [hourly], "H"),
        ("days", daily, "D"),
        ("m4_yearly", yearly, "A-DEC"),
    ):
        rows = [
            {"item_id": str(place), "start": pd.Timestamp("2001-01-01"), "freq": frequency, "target": target.tolist()}
            for place, target in enumerate(targets)
        ]
        datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "gift" / name))
    names = ["two/H", "days", "m4_yearly"]
    return {"type": "gift-eval", "folder": str(tmp_path / "gift"), "datasets": names}


def test_windows_of_gift_eval(gift_source: dict[str, Any]) -> None:
    hours, days, years = tasks_of(config(gift_source).source)
    assert [task.horizon for task in (hours, days, years)] == [48, 30, 6]
    assert [task.name for task in (hours, days, years)] == ["two/H/h/short", "days/D/short", "m4_yearly/YE-DEC/short"]
    (window,) = hours.windows()
    assert [context.item_id for context in window.contexts] == ["0_dim0", "0_dim0", "0_dim1", "0_dim1"]
    assert [len(context.target) for context in window.contexts] == [504, 552, 504, 552], "a tenth of 600, rounded up"
    assert {context.season_length for context in window.contexts} == {24}
    (window,) = days.windows()
    assert ({context.season_length for context in window.contexts}, len(window.contexts)) == ({1}, 2)
    (window,) = years.windows()
    assert [len(context.target) for context in window.contexts] == [19, 19, 19]


def test_metrics_of_gift_eval(produce: Produce, gift_source: dict[str, Any]) -> None:
    found = produce(benchmark, config(gift_source))
    ours = json.loads(found.path("benchmark.json").read_text())["tasks"][0]["metrics"]["seasonal-naive"]
    (window,) = tasks_of(config(gift_source).source)[0].windows()
    levels = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
    forecast = SeasonalNaive().predict(window.contexts, 48, levels)
    present = ~np.isnan(window.actual)
    total, losses, scaled = np.abs(window.actual[present]).sum(), [], []
    for place, level in enumerate(levels):
        error = (window.actual - forecast[:, :, place])[present]
        losses.append(2 * np.maximum(level * error, (level - 1) * error).sum() / total)
    for context, actual, quantiles in zip(window.contexts, window.actual, forecast, strict=True):
        scale = np.nanmean(np.abs(context.target[24:] - context.target[:-24]))
        error = np.abs(actual - quantiles[:, 4]) / scale
        scaled += error[~np.isnan(error)].tolist()
    assert ours["wql"] == pytest.approx(np.mean(losses), rel=1e-9), "the mean weighted quantile loss (CRPS)"
    assert ours["mase"] == pytest.approx(np.mean(scaled), rel=1e-9)
    assert found.counts["forecasts"] == 4 + 2 + 3


def test_long_terms(gift_source: dict[str, Any]) -> None:
    source = config(gift_source | {"datasets": ["two/H"], "terms": ["short", "medium", "long"]}).source
    tasks = tasks_of(source)
    assert [task.horizon for task in tasks] == [48, 480, 720]
    assert [len(context.target) for context in next(iter(tasks[1].windows())).contexts] == [120, 120]
    with pytest.raises(UserError, match="a series of 600 points, too few for 1 windows of 720; leave the term out"):
        list(tasks[2].windows())


def test_bad_sources(fev_source: dict[str, Any], gift_source: dict[str, Any], tmp_path: Path) -> None:
    def refuses(source: dict[str, Any], message: str) -> None:
        with pytest.raises(UserError, match=message):
            tasks_of(config(source).source)

    def task(**values: Any) -> dict[str, Any]:
        path = tmp_path / "bad.yaml"
        entry = {"dataset_path": str(tmp_path / "a" / "data.parquet"), "quantile_levels": LEVELS} | values
        path.write_text(yaml.safe_dump({"tasks": [entry]}))
        return {"type": "fev", "tasks": str(path)}

    refuses(task(unknown=1), "holds no tasks of fev")
    refuses(task(eval_metric="MAPE"), "task 0 is judged by MAPE; computed here are SQL, WQL, MASE, MAE, RMSE")
    refuses(task(quantile_levels=[0.1, 0.9]), "quantiles without 0.5, the point forecast; add it")
    refuses(task(dataset_path="/nowhere/data.parquet"), "task 0 has no data, /nowhere/data.parquet does not exist")
    refuses(task(dataset_config="m4"), "task 0 is the data set 'm4'; set benchmark.source.folder")
    refuses({"type": "fev", "tasks": str(tmp_path / "none.yaml")}, "holds no tasks of fev")
    refuses(gift_source | {"datasets": ["none"]}, "none holds no data set; copy 'none' there")
    with pytest.raises(UserError, match=r"benchmark.source.tasks: .*none.yaml is not a file"):
        config({"type": "fev", "tasks": str(tmp_path / "none.yaml")}).fingerprint()
    with pytest.raises(UserError, match="nowhere is not a folder"):
        config(gift_source | {"folder": "nowhere"}).fingerprint()


def test_the_fingerprint_follows_the_data(fev_source: dict[str, Any], tmp_path: Path) -> None:
    before = config(fev_source).fingerprint()
    assert config(fev_source).fingerprint() == before
    save(tmp_path / "copies" / "m4" / "part-1.parquet", seasonal(1, 60), "MS")
    assert config(fev_source).fingerprint() != before


def test_the_shell(gift_source: dict[str, Any], tmp_path: Path) -> None:
    outputs = {name: SimpleNamespace(path=str(tmp_path / name)) for name in ("manifest", "report", "table")}
    logged: dict[str, float] = {}
    metrics = SimpleNamespace(log_metric=logged.__setitem__)
    settings = config(gift_source | {"datasets": ["m4_yearly"]}, baselines=[])
    component.benchmark.python_func(
        section("benchmark", settings, benchmark, settings.fingerprint()), metrics=metrics, **outputs
    )
    assert Manifest.read(tmp_path / "manifest").counts == {"tasks": 1, "forecasts": 3, "fallbacks": 0}
    assert "seasonal-naive" in (tmp_path / "table").read_text()
    assert logged["relative_sql"] == 1.0
