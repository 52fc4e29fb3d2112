"""The served forecaster: the same quantiles as the step's, from a table, and over HTTP."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import mlflow.pyfunc
import numpy as np
import pandas as pd
import pytest
from mlflow.pyfunc.scoring_server import infer_and_parse_data

from modelmill.components.core.manifest import Manifest
from modelmill.components.forecasting.forecast_config import ChronosUseConfig
from modelmill.components.forecasting.forecast_model import open_forecaster
from modelmill.components.forecasting.series_table import Context
from modelmill.components.registry import modelmill_forecaster
from modelmill.components.registry.flavors import flavor_of
from tests.components.forecasting import chronos_models as models

LEVELS = [0.1, 0.5, 0.9]
FAMILIES = {"bolt": models.bolt, "t5": models.t5, "chronos2": models.chronos2}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Manifest]:
    found = {}
    for name, make in FAMILIES.items():
        folder = tmp_path_factory.mktemp(name)
        found[name] = Manifest.describe(
            folder, kind="model", metadata={**make(folder).metadata, "flavor": "forecaster"}
        )
    return found


@pytest.fixture(scope="module")
def package(made: dict[str, Manifest], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a registration writes of the Bolt."""
    folder = tmp_path_factory.mktemp("package") / "model"
    _, flavor = flavor_of(made["bolt"])
    mlflow.pyfunc.save_model(
        str(folder),
        loader_module=flavor.module,
        data_path=str(Path(made["bolt"].uri) / "model"),
        code_paths=[str(flavor.loader())],
        signature=flavor.signature(made["bolt"]),
        pip_requirements=list(flavor.requirements),
    )
    return folder


def table_of(series: list[np.ndarray]) -> pd.DataFrame:
    frames = []
    for number, values in enumerate(series):
        times = pd.date_range("2024-01-01", periods=len(values), freq="D" if number % 2 else "MS")
        frames.append(pd.DataFrame({"item_id": f"item-{number}", "timestamp": times, "target": values}))
    return pd.concat(frames)


@pytest.mark.parametrize("family", ["bolt", "chronos2"])
def test_the_table_gets_the_quantiles_of_the_step(made: dict[str, Manifest], family: str) -> None:
    series = models.walks(4)
    served = modelmill_forecaster._load_pyfunc(made[family].uri)
    shuffled = table_of(series).dropna().sample(frac=1, random_state=0)
    found = served.predict(shuffled, {"horizon": 6}).sort_values(["item_id", "timestamp"])
    contexts = [
        Context(f"item-{n}", values[np.flatnonzero(~np.isnan(values))[0] :]) for n, values in enumerate(series)
    ]
    expected = open_forecaster(made[family], ChronosUseConfig(device="cpu")).predict(contexts, 6, models.LEVELS)
    columns = [f"{level:g}" for level in models.LEVELS]
    # Scaled otherwise, so equal up to rounding.
    np.testing.assert_allclose(found[columns].to_numpy().reshape(4, 6, 9), expected, rtol=1e-3, atol=1e-3)
    some = served.predict(shuffled, {"horizon": 2, "quantile_levels": [0.9, 0.5]})
    assert (some["0.9"] >= some["0.5"]).all()
    times = found.groupby("item_id")["timestamp"].first()
    assert str(times["item-1"].date()) == "2024-02-27"
    assert str(times["item-0"].date()) == "2029-01-01"


def test_t5_draws_the_same_in_any_company(made: dict[str, Manifest]) -> None:
    served = modelmill_forecaster._load_pyfunc(made["t5"].uri)
    table = table_of(models.walks(3))
    whole = served.predict(table, {"horizon": 4})
    alone = served.predict(table[table["item_id"] == "item-2"], {"horizon": 4})
    np.testing.assert_array_equal(whole[whole["item_id"] == "item-2"]["0.5"], alone["0.5"])


def test_records_go_through_the_server_and_back(package: Path, made: dict[str, Manifest]) -> None:
    """What the scoring server of MLflow does with a request, without the socket."""
    model = mlflow.pyfunc.load_model(str(package))
    _, flavor = flavor_of(made["bolt"])
    request = {"dataframe_records": flavor.example, "params": {"horizon": 3, "quantile_levels": LEVELS}}
    data = infer_and_parse_data(request, model.metadata.get_input_schema())
    found = model.predict(data, params=request["params"])
    assert list(found.columns) == ["item_id", "timestamp", "0.1", "0.5", "0.9"]
    assert [str(time.date()) for time in found["timestamp"]] == ["2024-01-29", "2024-01-30", "2024-01-31"]
    assert len(model.predict(data)) == models.PREDICTION


def test_gaps_and_empty_targets_are_missing(made: dict[str, Manifest]) -> None:
    served = modelmill_forecaster._load_pyfunc(made["bolt"].uri)
    table = table_of([np.arange(20.0), np.arange(30.0)])
    table.loc[table["timestamp"] == "2024-01-05", "target"] = None
    gaps = table.dropna()
    pd.testing.assert_frame_equal(served.predict(table), served.predict(gaps))
    with pytest.raises(ValueError, match="item 'item-0' has no target among its latest 20 points"):
        served.predict(table.assign(target=np.nan))


@pytest.mark.parametrize(
    ("rows", "params", "words"),
    [
        ([{"item_id": "a", "timestamp": "2024-01-01"}], {}, "the column 'target' is missing"),
        ([{"item_id": "a", "timestamp": "2024-01-01", "target": 1.0}] * 2, {}, "two rows for 2024-01-01"),
        ([{"item_id": "a", "timestamp": "2024-01-01", "target": 1.0}], {}, "'a' has 1 rows; give at least 3"),
        ([], {"horizon": 33}, "horizon: 33 lies outside 1 to 32"),
        ([], {"quantile_levels": [0.0]}, "quantile_levels: .* must lie between 0 and 1"),
    ],
    ids=["column", "twice", "short", "horizon", "levels"],
)
def test_bad_requests(
    made: dict[str, Manifest], rows: list[dict[str, Any]], params: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        modelmill_forecaster._load_pyfunc(made["bolt"].uri).predict(rows, params)


@pytest.mark.slow
def test_mlflow_serves_json_in_and_out(package: Path, made: dict[str, Manifest]) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", str(package), "-p", str(port)]
    command += ["-h", "127.0.0.1", "--env-manager", "local", "-w", "1"]
    log = (package.parent / "server.log").open("wb")
    process = subprocess.Popen(
        command,
        stdout=log,
        stderr=log,
        start_new_session=True,
        env={
            **os.environ,
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        },
    )
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=2).close()
                break
            except OSError:
                assert process.poll() is None, (package.parent / "server.log").read_text()[-2000:]
                assert time.monotonic() < deadline
                time.sleep(0.2)
        _, flavor = flavor_of(made["bolt"])
        body = {"dataframe_records": flavor.example, "params": {"horizon": 3, "quantile_levels": LEVELS}}
        answer = post(port, body)
        assert [row["timestamp"][:10] for row in answer["predictions"]] == ["2024-01-29", "2024-01-30", "2024-01-31"]
        assert set(answer["predictions"][0]) == {"item_id", "timestamp", "0.1", "0.5", "0.9"}
        expected = mlflow.pyfunc.load_model(str(package)).predict(
            pd.DataFrame(flavor.example).astype({"timestamp": "datetime64[ns]"}), params=body["params"]
        )
        np.testing.assert_allclose([row["0.5"] for row in answer["predictions"]], expected["0.5"], rtol=1e-5)
        with pytest.raises(urllib.error.HTTPError) as refused:
            post(port, {**body, "params": {"horizon": 33}})
        assert refused.value.code >= 400
        assert b"horizon: 33" in refused.value.read()
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        log.close()


def post(port: int, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/invocations",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read())
