"""The steps of `chronos_tune`, as its recipe lists them; a Chronos-Bolt goes the same way in test_forecasting.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

from modelmill.components.core.events import STEP_VARIABLE
from modelmill.components.core.manifest import Manifest
from modelmill.components.core.step import run_step
from modelmill.pipelines import catalog, plan
from tests.components.forecasting import chronos_models

pytestmark = pytest.mark.slow
ENGINE: dict[str, Any] = {
    "horizon": 4,
    "training": {
        "steps": 4,
        "global_batch_size": 8,
        "micro_batch_size": 8,
        "parallel": {"processes_per_node": 1},
        "learning_rate": 1e-3,
        "min_learning_rate": 1e-4,
        "warmup_steps": 0,
        "precision": "fp32",
        "accelerator": "cpu",
        "validate_every": None,
        "validation_rows": 0,
        "checkpoint_every": None,
        "seed": 10,
    },
}
LORA = {"method": "lora", "steps": 3, "batch_size": 8, "validate_every": None, "device": "cpu"}
WAYS: dict[str, tuple[Callable[[Path], Manifest], dict[str, Any], str]] = {
    "chronos-2": (chronos_models.chronos2, {"chronos2": LORA}, "lora"),
    "chronos-t5": (chronos_models.t5, {"chronos": ENGINE}, "full"),
}


def recipe(folder: Path, base: Path, tuning: dict[str, Any]) -> Any:
    times = pd.date_range("2000-01-01", periods=60, freq="QS-JAN")
    random, parts = np.random.default_rng(0), []
    for number in range(4):
        values = 10 + 3 * np.sin(np.arange(60) * np.pi / 2) + random.normal(0, 0.3, 60)
        parts.append(pd.DataFrame({"item_id": f"shop-{number}", "timestamp": times, "target": values}))
    pd.concat(parts).to_csv(folder / "sales.csv", index=False)
    content = {
        "pipeline": "chronos_tune",
        "name": "tiny",
        "model": {"reference": str(base)},
        "series": {"source": {"type": "files", "paths": [str(folder / "sales.csv")]}, "horizon": 4, "windows": 2},
        "tuning": tuning,
        "backtest": {"baselines": []},
        "registry": {"name": "demand"},
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(content))
    return catalog.load(str(folder / "tiny.yaml"))


def run(folder: Path, base: Path, tuning: dict[str, Any]) -> dict[str, Manifest]:
    """Every step but the report of the engine's outcome, in this process."""
    made = recipe(folder, base, tuning)
    texts, found = plan.sections(made), dict[str, Manifest]()
    for step in made.steps()[:-1]:
        inputs = {parameter: str(folder / f"{upstream}.json") for parameter, upstream in step.needs.items()}
        function = catalog.resolve(step.function)
        found[step.name] = run_step(
            function, texts[step.name], inputs, {"manifest": str(folder / f"{step.name}.json")}
        )
    return found


@pytest.fixture(autouse=True)
def isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "MODELMILL_RUN_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MODELMILL_HOME", str(tmp_path / "home"))
    monkeypatch.setenv(STEP_VARIABLE, "")


@pytest.mark.parametrize("family", list(WAYS))
def test_the_family_goes_the_whole_way(family: str, tmp_path: Path) -> None:
    make, tuning, method = WAYS[family]
    base = make(tmp_path / "base")
    found = run(tmp_path, tmp_path / "base" / "model", tuning)
    tuned = found["tune"].metadata
    assert (tuned["family"], tuned["method"]) == (family, method)
    assert tuned["base_digest"] == base.metadata["weights_digest"] != tuned["weights_digest"]
    assert found["backtest_tuned"].metadata["weights_digest"] == tuned["weights_digest"]
    assert found["register_model"].metadata["weights_digest"] == tuned["weights_digest"]
    assert found["promote"].metadata["outcome"] in ("promoted", "kept")
    assert found["forecast"].counts["points"] == 16


def test_a_search_is_a_way_too(tmp_path: Path) -> None:
    chronos_models.bolt(tmp_path / "base")
    search = {"chronos": ENGINE, "max_jobs": 1, "startup_trials": 1, "use": {"device": "cpu"}}
    found = run(tmp_path, tmp_path / "base" / "model", {"search": search})
    assert found["tune"].metadata["winner"] in ("base", "trial")
    assert found["tune"].counts["trials"] >= 1
    assert found["promote"].metadata["outcome"] in ("promoted", "kept")
