"""Tuning a Chronos-2 by its library: what is trained, on what, and what is refused."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chronos import Chronos2Pipeline
from safetensors.numpy import load_file

from modelmill.components.core.errors import UserError
from modelmill.components.core.manifest import Manifest
from modelmill.components.core.recipe import validate
from modelmill.components.forecasting import tune_chronos2 as module
from modelmill.components.forecasting.chronos2_config import Chronos2TuneConfig
from modelmill.components.forecasting.forecast_config import ChronosUseConfig
from modelmill.components.forecasting.forecast_model import open_forecaster
from modelmill.components.forecasting.tune_chronos2 import tune_chronos2
from tests.components.forecasting import chronos_models as models
from tests.components.forecasting.conftest import produce_in


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return models.chronos2(tmp_path_factory.mktemp("chronos2"))


@pytest.fixture(scope="module")
def series(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    values = [np.sin(np.arange(90) * 2 * np.pi / 8 + number) + number for number in range(6)]
    return models.series_manifest(tmp_path_factory.mktemp("waves"), values, horizon=8, windows=1)


def tune(folder: Path, series: Manifest, base: Manifest, **changes: Any) -> Manifest:
    settings = {"steps": 12, "batch_size": 8, "learning_rate": 1e-2, "log_every": 2, "validate_every": 6}
    section = Chronos2TuneConfig.model_validate({**settings, "device": "cpu", **changes})
    return produce_in(folder, tune_chronos2, section, series=series, base=base)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_model_becomes_better_and_stays_whole(
    series: Manifest, base: Manifest, tmp_path: Path, method: str
) -> None:
    tuned = tune(tmp_path / "tuned", series, base, method=method)
    history = [json.loads(line) for line in tuned.path("history.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in history if "loss" in record]
    assert losses[-1] < losses[0]
    assert len([record for record in history if "validation_loss" in record]) == 2
    before, after = (load_file(Path(model.uri) / "model" / "model.safetensors") for model in (base, tuned))
    assert before.keys() == after.keys(), "LoRA is merged"
    changed = {name for name, value in after.items() if not np.array_equal(value, before[name])}
    feed_forward = {name for name in before if ".mlp." in name}
    assert feed_forward
    assert (feed_forward <= changed) is (method == "full")
    assert any("self_attention.q" in name for name in changed)
    assert tuned.metadata["method"] == method
    assert tuned.metadata["base_digest"] == base.metadata["weights_digest"]
    assert isinstance(Chronos2Pipeline.from_pretrained(Path(tuned.uri) / "model"), Chronos2Pipeline)
    open_forecaster(tuned, ChronosUseConfig(device="cpu")).predict(models.contexts(models.walks(2)), 8, [0.5])
    assert not (tmp_path / "tuned" / "chronos2").exists()


def test_equal_inputs_give_equal_bytes(series: Manifest, base: Manifest, tmp_path: Path) -> None:
    runs = [tune(tmp_path / str(number), series, base, steps=4, validate_every=2) for number in range(2)]
    assert runs[0].digest == runs[1].digest
    other = tune(tmp_path / "other", series, base, steps=4, validate_every=2, seed=1)
    assert other.metadata["weights_digest"] != runs[0].metadata["weights_digest"]


def test_what_is_held_back_is_not_read(
    series: Manifest, base: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = [np.concatenate([np.arange(1.0, 61.0), np.full(8, 1e9)])]
    seen: list[Any] = []
    monkeypatch.setattr(module, "_fit", lambda *arguments: seen.append(arguments[4:]) or ({}, 0))
    monkeypatch.setattr(module, "weights_digest", lambda folder: "")
    monkeypatch.setattr(module, "track_outcome", lambda *arguments: None)
    monkeypatch.setattr(module, "write_profile", lambda *arguments: None)
    tune(tmp_path / "run", models.series_manifest(tmp_path, values, horizon=8, windows=1), base)
    ((train, held),) = seen
    assert [len(train[0]), len(held[0])] == [52, 60]
    assert held[0].max() == 1.0


class TestRefusals:
    def test_lora_without_peft_is_no_full_training(
        self, series: Manifest, base: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, "find_spec", lambda name: None if name == "peft" else find_spec(name))
        with pytest.raises(UserError, match=r"chronos2\.method: lora needs the package peft"):
            tune(tmp_path, series, base)

    def test_inputs_that_do_not_fit(self, series: Manifest, base: Manifest, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="base: this step tunes a Chronos-2"):
            tune(tmp_path / "a", series, models.bolt(tmp_path / "bolt"))
        with pytest.raises(
            UserError, match=r"chronos2\.covariates: there is no covariate 'price'; the series have none"
        ):
            tune(tmp_path / "b", series, base, covariates=["price"])
        with pytest.raises(UserError, match=r"chronos2\.min_context: 90, but no series has 106 points"):
            tune(tmp_path / "c", series, base, min_context=90)
        with pytest.raises(UserError, match=r"chronos2\.horizon: the series name none"):
            tune(tmp_path / "d", models.series_manifest(tmp_path / "e", models.walks(1)), base)
        with pytest.raises(UserError, match="rank, alpha: method full trains all weights"):
            validate(Chronos2TuneConfig, {"method": "full", "rank": 4})
