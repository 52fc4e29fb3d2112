"""Searches whose trainings cost nothing: a trial's loss is a function of its learning rate and its steps.

    python -m tests.components.forecasting.searches FOLDER KILL_AFTER

runs such a search below a folder in a process that is killed after so many trainings.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from safetensors.numpy import load_file, save_file

from modelmill.components.core.errors import UserError
from modelmill.components.core.manifest import Manifest
from modelmill.components.core.weights import weights_digest
from modelmill.components.forecasting import search_chronos as steps
from modelmill.components.forecasting import search_figures, search_trials
from modelmill.components.forecasting.search_config import Params, SearchConfig
from modelmill.components.forecasting.search_storage import STORAGE_VARIABLE
from modelmill.components.forecasting.search_validation import Judgement
from tests.components.forecasting.backtests import series_manifest

TRAINING = {
    "steps": 8,
    "global_batch_size": 8,
    "micro_batch_size": 4,
    "learning_rate": 1e-3,
    "min_learning_rate": 1e-4,
}
TRAINING |= {"accelerator": "cpu", "threads_per_process": 1, "parallel": {"processes_per_node": 1}}
BASE_VALUE = 2.0


def section(**changes: Any) -> SearchConfig:
    training = {**TRAINING, **changes.pop("training", {})}
    given = {"chronos": {"training": training}, "max_jobs": 6, "startup_trials": 2, **changes}
    return SearchConfig.model_validate({name: value for name, value in given.items() if value is not None})


def save_model(folder: Path, rate: float, step: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"chronos_config": {"context_length": 32, "prediction_length": 8}}
    (folder / "config.json").write_text(json.dumps({"chronos_pipeline_class": "ChronosBoltPipeline", **settings}))
    save_file({"rate": np.array([rate, step], np.float64)}, folder / "model.safetensors")


def base_model(folder: Path) -> Manifest:
    save_model(folder / "model", 0.0, 0)
    return Manifest.describe(folder, kind="model", metadata={"weights_digest": weights_digest(folder / "model")})


def inputs(folder: Path) -> dict[str, Manifest]:
    """What a search is given."""
    folder.mkdir(parents=True, exist_ok=True)
    values = [np.sin(np.arange(40.0)), np.cos(np.arange(40.0))]
    return {"series": series_manifest(folder, values), "base": base_model(folder / "base")}


def loss(rate: float, step: int) -> float:
    """Least at 10^-4.4; falls with the steps."""
    return (math.log10(rate) + 4.4) ** 2 + 8 / step - 0.9


class Trainings:
    """Stands in for what trains and what judges.

    Attributes:
        made: (trial, step) of every training.
        windows: (trial, windows that its series hold back) of every training.
        judged: learning rate and step of every model that was judged.
        on_training: called with their number after each training, before it counts as finished.
        values: of trials by number, instead of the loss; nan is a forecast that is not finite.
        failures: errors that trainings of trials raise.
    """

    def __init__(self, *, figures: bool = False) -> None:
        self.made: list[tuple[str, int]] = []
        self.windows: list[tuple[str, int]] = []
        self.judged: list[tuple[float, int]] = []
        self.on_training: Callable[[int], None] = lambda count: None
        self.values: dict[int, float] = {}
        self.failures: dict[int, Exception] = {}
        self.trials: dict[float, int] = {}
        self._patches = [
            mock.patch.object(search_trials, "_train", self._train),
            mock.patch.object(search_trials, "judge", self._judge),
            mock.patch.object(steps, "judge", self._judge),
        ]
        if not figures:  # drawing takes longer than all the rest
            self._patches.append(mock.patch.object(search_figures, "svg", return_value="<svg>"))

    def __enter__(self) -> Trainings:
        for patch in self._patches:
            patch.start()
        return self

    def __exit__(self, *reason: object) -> None:
        for patch in self._patches:
            patch.stop()

    def _train(self, config: SearchConfig, params: Params, folder: Path, step: int, **inputs: Any) -> Any:
        number = int(folder.name) if folder.name.isdigit() else 0
        self.made.append((folder.name, step))
        self.windows.append((folder.name, inputs["series"].metadata["windows"]))
        self.trials[params["learning_rate"]] = number
        if number in self.failures:
            raise self.failures[number]
        data = folder / "data"
        save_model(data / "model", params["learning_rate"], step)
        (data / "history.jsonl").write_text(json.dumps({"step": step, "loss": 1.0}) + "\n")
        (folder / "checkpoints").mkdir(exist_ok=True)
        self.on_training(len(self.made))
        metadata = {"weights_digest": weights_digest(data / "model")}
        return steps.StepResult("model", counts={"steps": step}, metadata=metadata)

    def _judge(self, config: SearchConfig, series: Manifest, model: Manifest) -> Judgement:
        rate, step = load_file(Path(model.uri) / "model" / "model.safetensors")["rate"]
        if not rate:
            value = self.values.get(0, BASE_VALUE)
        else:
            self.judged.append((float(rate), int(step)))
            value = self.values.get(self.trials.get(float(rate), -1), loss(float(rate), int(step)))
        return Judgement(value, "" if math.isfinite(value) else "3 of 4 forecasts are not finite")


@cache
def empty_database() -> Path:
    """A storage without a search; making its tables takes longer than a search here."""
    from optuna.storages import RDBStorage

    path = Path(tempfile.mkdtemp()) / "empty.sqlite"
    RDBStorage(f"sqlite:///{path}").remove_session()
    return path


def run(folder: Path, config: SearchConfig, **given: Any) -> Manifest:
    """`search_chronos` below a folder, as `run_step` calls it; an unfinished folder goes on."""
    data = folder / "data"
    data.mkdir(parents=True, exist_ok=True)
    if not (folder / "search.sqlite").exists() and STORAGE_VARIABLE not in os.environ:
        shutil.copyfile(empty_database(), folder / "search.sqlite")
    result = steps.search_chronos(config, data, **given)
    return Manifest.describe(
        data, kind=result.kind, counts=result.counts, metrics=result.metrics, metadata=result.metadata
    )


def told(search: Manifest) -> dict[str, Any]:
    return json.loads(search.path("trials.json").read_bytes())


def main() -> None:
    folder, left = Path(sys.argv[1]), int(sys.argv[2])
    pruning = {"segments": 2, "startup_trials": 2}
    with Trainings() as trainings:
        trainings.on_training = lambda count: os.kill(os.getpid(), signal.SIGKILL) if count == left else None
        try:
            run(folder / "search", section(pruning=pruning), **inputs(folder / "inputs"))
        except UserError as error:
            sys.exit(str(error))


if __name__ == "__main__":
    main()
