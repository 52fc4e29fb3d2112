"""Step `backtest`: its scores against `fev`, no leakage, what it counts, refuses and shows."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import fev
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from modelmill.components.core.errors import UserError
from modelmill.components.core.manifest import Manifest
from modelmill.components.core.step import section
from modelmill.components.evaluation.config import GateConfig
from modelmill.components.evaluation.gate import gate
from modelmill.components.evaluation.records import read_scores
from modelmill.components.forecasting import component, forecast_model
from modelmill.components.forecasting.backtest import backtest
from modelmill.components.forecasting.backtest_config import BacktestConfig
from modelmill.components.forecasting.baselines import baselines_of
from modelmill.components.forecasting.evaluate import Evaluation, evaluate
from modelmill.components.forecasting.forecaster import Forecaster
from modelmill.components.forecasting.series_table import SeriesTable
from modelmill.components.forecasting.windows import WindowPlan, rolling_windows

from . import chronos_models
from .backtests import LEVELS, Last, points, seasonal, series_manifest, series_table, write_series
from .conftest import Produce

UseModel = Callable[[Forecaster], Manifest]


def config(**values: Any) -> BacktestConfig:
    return BacktestConfig.model_validate({"quantiles": LEVELS, "baselines": [], "workers": 1} | values)


@pytest.fixture
def use_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> UseModel:
    """A manifest that opens as some forecaster."""

    def use(forecaster: Forecaster) -> Manifest:
        monkeypatch.setattr(forecast_model, "open_forecaster", lambda model, config: forecaster)
        folder = tmp_path / "model-artifact"
        folder.mkdir(exist_ok=True)
        return Manifest.describe(folder, kind="model", metadata={"weights_digest": "a" * 64})

    return use


def record(manifest: Manifest) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(manifest.path("backtest.json").read_text())
    return found


def rows(manifest: Manifest) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in record(manifest)["summary"]["rows"]}


def test_scores_of_the_best_baseline(produce: Produce, tmp_path: Path) -> None:
    series = series_manifest(tmp_path, seasonal(6, 40))
    found = produce(backtest, config(baselines=["theta"]), series=series)
    assert (found.kind, found.metadata["candidate"]) == ("scores", "theta")
    counts = {"series": 6, "windows": 12, "scored": 12, "skipped": 0, "unscaled": 0, "fallbacks": 0}
    assert found.counts == counts
    assert "weights_digest" not in found.metadata
    assert found.metadata["dataset_digest"] == "d" * 64
    scores = read_scores(found, "candidate")
    assert scores.ids[:3] == ("item-0@2008-07-01T00:00:00", "item-0@2009-04-01T00:00:00", "item-1@2008-07-01T00:00:00")
    assert scores.values.keys() == {"sql", "mase", "wql"}
    table = pq.read_table(found.path("scores.parquet")).to_pandas()
    assert set(table["forecaster"]) == {"seasonal-naive", "theta"}
    own = table[table["forecaster"] == "theta"].sort_values(["item_id", "window"])
    for name in ("sql", "mase", "wql"):
        np.testing.assert_array_equal(scores.values[name], own[name])
    assert found.metrics["sql"] == pytest.approx(own.groupby("window")["sql"].mean().mean())
    again = produce(backtest, config(baselines=["theta"]), series=series)
    assert again.digest == found.digest, "equal inputs give equal bytes"


def test_metrics_equal_those_of_fev_on_the_same_forecasts(produce: Produce, tmp_path: Path) -> None:
    values = [np.round(one, 1).astype(np.float32).astype(float) for one in seasonal(5, 40)]
    values[1][[20, 36]], values[3] = np.nan, np.full(40, 7.0)
    values[4] = values[4][:11]
    series = series_manifest(tmp_path, values, horizon=4, windows=3)
    found = produce(backtest, config(baselines=["theta"], step=3, min_context=2), series=series)
    frames = [
        {"id": f"item-{place}", "timestamp": pd.date_range("2000", periods=len(one), freq="QS"), "target": one}
        for place, one in enumerate(values)
    ]
    datasets.Dataset.from_list(frames).to_parquet(str(tmp_path / "data.parquet"))
    task = fev.Task(
        dataset_path=str(tmp_path / "data.parquet"),
        horizon=4,
        num_windows=3,
        window_step_size=3,
        min_context_length=2,
        seasonality=4,
        quantile_levels=LEVELS,
        eval_metric="SQL",
        extra_metrics=["WQL", "MASE", "MAE", "RMSE"],
    )
    table = SeriesTable(series.path("series.arrow"), horizon=4, windows=3)
    plan = WindowPlan(horizon=4, windows=3, step=3, min_context=2)
    spool = tmp_path / "spool"
    spool.mkdir()
    forecast = evaluate(rolling_windows(table, plan), 4, baselines_of(config(baselines=["theta"])), LEVELS, spool)
    assert 0 < forecast.skipped < 3, "one series is too short for some windows"
    for judged in forecast.judged:
        arrays = [np.load(judged.files[number]) for number in range(3)]
        summary = task.evaluation_summary([predictions(array) for array in arrays], model_name=judged.name)
        for name, value in rows(found)[judged.name]["metrics"].items():
            assert value == pytest.approx(summary[name.upper()], rel=1e-9, abs=0)


def predictions(array: np.ndarray) -> list[dict[str, Any]]:
    levels = {str(level): array[:, :, place] for place, level in enumerate(LEVELS)}
    return [
        {"predictions": levels["0.5"][item], **{name: column[item] for name, column in levels.items()}}
        for item in range(len(array))
    ]


def test_a_model_is_judged_beside_the_baselines_and_gated(
    produce: Produce, tmp_path: Path, use_model: UseModel
) -> None:
    series = series_manifest(tmp_path, [step * np.arange(40.0) for step in range(5, 13)])
    model = use_model(Last())
    found = produce(backtest, config(), series=series, model=model)
    assert found.metadata["candidate"] == "last"
    assert found.metadata["weights_digest"] == "a" * 64
    reference = produce(backtest, config(), series=series)
    assert reference.metadata["candidate"] == "seasonal-naive"
    assert read_scores(found, "a").references_digests == read_scores(reference, "b").references_digests
    decision = GateConfig.model_validate({"metric": "sql", "direction": "lower", "tie": "fail"})
    judged = produce(gate, decision, candidate=found, reference=reference)
    assert found.metrics["relative_sql"] < 0.9, "the last point of a trend is better than one a season before it"
    assert judged.metadata["outcome"] == "better"
    assert judged.metadata["candidate_weights_digest"] == "a" * 64
    other = produce(backtest, config(windows=1), series=series)
    with pytest.raises(UserError, match="was scored with windows 2, reference with 1"):
        produce(gate, decision, candidate=found, reference=other)


def test_a_chronos_is_judged(produce: Produce, tmp_path: Path) -> None:
    model = chronos_models.bolt(tmp_path / "bolt")
    series = series_manifest(tmp_path, seasonal(3, 40))
    found = produce(backtest, config(baselines=["theta"], use={"device": "cpu"}), series=series, model=model)
    assert found.metadata["candidate"] == "chronos-bolt"
    assert found.metadata["weights_digest"] == model.metadata["weights_digest"]
    assert found.counts["fallbacks"] == 0
    assert found.metrics["skill"] < 0, "its weights are random"
    assert "| chronos-bolt |" in found.path("report.md").read_text()


def spiked(values: Sequence[np.ndarray], begin: int) -> list[np.ndarray]:
    found = [one.copy() for one in values]
    for one in found:
        one[begin:] += 1e6
    return found


def forecasts(found: Evaluation) -> dict[str, np.ndarray]:
    return {judged.name: np.stack([np.load(path) for path in judged.files.values()]) for judged in found.judged}


def test_a_spike_in_the_future_changes_no_forecast(tmp_path: Path) -> None:
    values = seasonal(4, 40)
    plan, forecasters = WindowPlan(horizon=3, windows=2, step=3), baselines_of(config(baselines=["theta", "lightgbm"]))
    found = []
    for number, targets in enumerate((values, spiked(values, -3), spiked(values, -6))):
        folder = tmp_path / str(number)
        folder.mkdir()
        table = series_table(tmp_path, targets)
        found.append(forecasts(evaluate(rolling_windows(table, plan), 3, [*forecasters, Last()], LEVELS, folder)))
    usual, last, both = found
    for name, forecast in usual.items():
        np.testing.assert_array_equal(last[name], forecast)
        np.testing.assert_array_equal(both[name][0], forecast[0])
        assert np.abs(both[name][1] - forecast[1]).max() > 1, "the second window does see the first one's actuals"


def test_a_spike_in_the_future_changes_errors_only(produce: Produce, tmp_path: Path) -> None:
    (values,) = seasonal(1, 40)
    found = [
        record(
            produce(backtest, config(baselines=["theta"], candidate="theta"), series=series_manifest(tmp_path, one))
        )
        for one in ([values], spiked([values], -3))
    ]
    assert found[0]["drawn"][0]["forecasts"] == found[1]["drawn"][0]["forecasts"]
    errors = [one["drawn"][0]["error"] for one in found]
    assert errors[1] > 100 * errors[0]


def test_known_covariates_reach_the_model(produce: Produce, tmp_path: Path, use_model: UseModel) -> None:
    ahead = np.arange(20.0)
    data = tmp_path / "data"
    data.mkdir()
    write_series(data / "series.arrow", [np.arange(20.0) % 7], known=[ahead], past=[ahead])
    series = Manifest.describe(data, kind="series", metadata={"horizon": 2, "windows": 1})
    model = Last()
    produce(backtest, config(), series=series, model=use_model(model))
    (context,) = model.seen
    assert {name: one.tolist() for name, one in context.future.items()} == {"k": [18, 19]}
    assert context.past["p"].tolist() == ahead[:18].tolist()


def test_seasonal_naive_stands_in_for_what_fails(produce: Produce, tmp_path: Path, use_model: UseModel) -> None:
    series = series_manifest(tmp_path, seasonal(3, 40))
    model = use_model(Last(fails=["item-1"]))
    found = produce(backtest, config(), series=series, model=model)
    assert found.counts["fallbacks"] == 2
    assert found.metadata["fallbacks"] == {"seasonal-naive": 0, "last": 2}
    table = pq.read_table(found.path("scores.parquet")).to_pandas().set_index(["forecaster", "item_id", "window"])
    for window in (0, 1):
        assert table.loc["last", "item-1", window]["sql"] == table.loc["seasonal-naive", "item-1", window]["sql"]
        assert table.loc["last", "item-0", window]["sql"] != table.loc["seasonal-naive", "item-0", window]["sql"]
    naive = produce(backtest, config(), series=series, model=use_model(Last(fails=["item-0", "item-1", "item-2"])))
    assert naive.metrics["relative_sql"] == 1.0


def test_series_of_every_kind(produce: Produce, tmp_path: Path) -> None:
    (usual,) = seasonal(1, 40)
    zero = np.where(np.arange(40) < 34, np.arange(40) % 3, 0.0)
    values = [usual, np.full(40, 5.0), np.full(40, np.nan), zero, usual[:4], np.append(np.full(34, np.nan), usual[:6])]
    series = series_manifest(tmp_path, values)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        found = produce(backtest, config(baselines=["auto-ets", "theta", "lightgbm"]), series=series)
    # Skipped: all missing twice, too short once for the older window, nothing before the older origin.
    assert found.counts["skipped"] == 2 + 1 + 1
    assert found.counts["windows"] == 12 - 4
    # Unscaled: the constant twice, one with a point before the newer origin, one with three.
    assert found.counts["unscaled"] == 4
    assert found.counts["scored"] == 4
    assert read_scores(found, "a").values.keys() == {"sql", "mase", "wql"}
    assert found.metadata["fallbacks"]["lightgbm"] > found.metadata["fallbacks"]["auto-ets"] > 0


@pytest.mark.parametrize("length", [7, 10])
def test_one_series(produce: Produce, tmp_path: Path, length: int) -> None:
    series = series_manifest(tmp_path, [np.arange(length) ** 2.0], horizon=1, windows=1)
    found = produce(backtest, config(), series=series)
    assert (found.counts["scored"], found.metrics["relative_sql"]) == (1, 1.0)
    assert "win_rate" not in found.metrics
    assert [drawn["role"] for drawn in record(found)["drawn"]] == ["best and median and worst"]


REFUSED = {
    "constant": ([np.full(20, 1.0)], {}, "none of 2 windows can be scored, as no series changes over a season"),
    "missing": ([np.full(20, np.nan)], {}, "no series has a window of 3 steps with a point in it and 1 or more"),
    "short": ([np.arange(3.0), np.arange(2.0)], {}, "the longest of 2 has 3 points"),
    "more windows": ([np.arange(20.0)], {"windows": 5}, r"backtest.windows: 5 windows of 3 steps, 3 apart"),
    "longer horizon": ([np.arange(20.0)], {"horizon": 30}, r"cover the last 60 points, but series.horizon"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_judged_is_refused(produce: Produce, tmp_path: Path, case: str) -> None:
    values, changes, message = REFUSED[case]
    with pytest.raises(UserError, match=message):
        produce(backtest, config(**changes), series=series_manifest(tmp_path, values))


def test_series_that_hold_nothing_back_are_refused(produce: Produce, tmp_path: Path) -> None:
    series = series_manifest(tmp_path, [np.arange(20.0)], horizon=0, windows=0)
    with pytest.raises(UserError, match=r"backtest.horizon: the series hold nothing back; prepare them with horizon"):
        produce(backtest, config(), series=series)
    with pytest.raises(UserError, match=r"series.horizon \* series.windows = 0"):
        produce(backtest, config(horizon=2, windows=1), series=series)


def test_a_forecast_of_the_wrong_shape_is_an_error(produce: Produce, tmp_path: Path, use_model: UseModel) -> None:
    class Short(Last):
        def predict(self, *arguments: Any) -> np.ndarray:
            return super().predict(*arguments)[:, 1:]

    with pytest.raises(ValueError, match=r"last returned forecasts of shape \(1, 2, 5\), not \(1, 3, 5\)"):
        produce(backtest, config(), series=series_manifest(tmp_path, seasonal(1, 20)), model=use_model(Short()))


INVALID = {
    "falling": ({"quantiles": [0.5, 0.1]}, "must rise, lie between 0 and 1 and hold 0.5"),
    "no median": ({"quantiles": [0.1, 0.9]}, "must rise, lie between 0 and 1 and hold 0.5"),
    "twice": ({"baselines": ["theta", "theta"]}, "named twice"),
    "stranger": ({"candidate": "theta"}, "'theta' is not among the baselines seasonal-naive; add it"),
}


@pytest.mark.parametrize("case", INVALID)
def test_sections_that_make_no_sense(case: str) -> None:
    values, message = INVALID[case]
    with pytest.raises(ValidationError, match=message):
        config(**values)


def test_the_report(produce: Produce, tmp_path: Path) -> None:
    values = [one * 10.0**place for place, one in enumerate(seasonal(5, 40))]
    found = produce(backtest, config(baselines=["theta"]), series=series_manifest(tmp_path, values))
    page, table = found.path("report.html").read_text(), found.path("report.md").read_text()
    gain = f"{found.metrics['skill']:.1%}"
    assert f"theta is number 1 of 2 by SQL; its error is {gain} below that of seasonal-naive" in table
    lines = [line for line in table.splitlines() if line.startswith(("| theta", "| seasonal-naive"))]
    assert [line.split(" | ")[0] for line in lines] == ["| theta", "| seasonal-naive"]
    assert len(re.findall("<svg ", page)) == 5
    drawn = record(found)["drawn"]
    assert [one["role"] for one in drawn] == ["best", "median", "worst"]
    errors = [one["error"] for one in drawn]
    assert errors == sorted(errors)
    assert errors[0] < errors[1] < errors[2]
    for number, one in enumerate(drawn, 1):
        assert found.path(f"figures/series-{number}.svg").read_text().startswith("<svg ")
        place = int(one["item_id"].removeprefix("item-"))
        assert one["values"] == values[place][one["begin"] :].tolist()
        assert len(one["times"]) == len(one["values"])
        assert [window["origin"] for window in one["forecasts"]] == [34, 37]
    steps = record(found)["summary"]["by_step"]["theta"]
    assert len(steps) == 3
    assert np.mean(steps) == pytest.approx(found.metrics["sql"])


def test_names_of_series_cannot_become_markup(produce: Produce, tmp_path: Path) -> None:
    from modelmill.components.forecasting.series_table import SeriesWriter

    data = tmp_path / "data"
    data.mkdir()
    (values,) = seasonal(1, 30)
    with SeriesWriter(data / "series.arrow") as writer:
        start = np.array(["2000-01-01"], "datetime64[ns]")
        writer.append(["<b>$x^</b> é\x07"], start, ["D"], np.array([7]), points([values]))
    series = Manifest.describe(data, kind="series", metadata={"horizon": 2, "windows": 2})
    found = produce(backtest, config(), series=series)
    page = found.path("report.html").read_text()
    assert "<b>" not in page
    assert "&lt;b&gt;$x^&lt;/b&gt; é" in page


def test_the_shell(tmp_path: Path) -> None:
    path = tmp_path / "series.json"
    series_manifest(tmp_path, seasonal(2, 30)).write(path)
    outputs = {name: SimpleNamespace(path=str(tmp_path / name)) for name in ("manifest", "report", "table")}
    logged: dict[str, float] = {}
    metrics = SimpleNamespace(log_metric=logged.__setitem__)
    text = section("backtest", config(), backtest)
    component.backtest.python_func(text, series=SimpleNamespace(path=str(path)), metrics=metrics, **outputs)
    assert Manifest.read(tmp_path / "manifest").metadata["candidate"] == "seasonal-naive"
    assert "seasonal-naive" in (tmp_path / "table").read_text()
    assert logged["relative_sql"] == 1.0
