"""Chronos models as forecasters: the library's numbers, whatever is forecast together."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chronos import BaseChronosPipeline
from safetensors.torch import load_file, save_file

from modelmill.components.core.errors import UserError
from modelmill.components.core.manifest import Manifest
from modelmill.components.forecasting.chronos_forecasters import interpolate
from modelmill.components.forecasting.forecast_config import ChronosUseConfig
from modelmill.components.forecasting.forecast_model import open_forecaster
from modelmill.components.forecasting.forecaster import Forecaster
from tests.components.forecasting import chronos_models as models

LEVELS = [0.05, 0.1, 0.5, 0.75, 0.9]
FAMILIES: dict[str, Callable[..., Manifest]] = {"bolt": models.bolt, "t5": models.t5, "chronos2": models.chronos2}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Manifest]:
    return {name: make(tmp_path_factory.mktemp(name)) for name, make in FAMILIES.items()}


def opened(model: Manifest, **config: Any) -> Forecaster:
    return open_forecaster(model, ChronosUseConfig(device="cpu", **config))


def pipeline_of(model: Manifest) -> Any:
    return BaseChronosPipeline.from_pretrained(Path(model.uri) / "model")


@pytest.mark.parametrize("horizon", [5, 8, 21])
@pytest.mark.parametrize("family", ["bolt", "chronos2"])
def test_quantiles_are_those_of_the_library(made: dict[str, Manifest], family: str, horizon: int) -> None:
    series, levels = models.walks(6), models.LEVELS
    found = opened(made[family], batch_size=4).predict(models.contexts(series), horizon, levels)
    inputs = [torch.from_numpy(values).float() for values in series]
    expected, _ = pipeline_of(made[family]).predict_quantiles(
        inputs, prediction_length=horizon, quantile_levels=levels
    )
    # Quantiles of random weights cross.
    expected = np.sort(np.stack([np.asarray(part).reshape(horizon, -1) for part in expected]), axis=-1)
    scale = np.array([np.nanstd(values) for values in series])[:, None, None]
    np.testing.assert_allclose(found / scale, expected / scale, rtol=2e-5, atol=2e-5)


def test_levels_between_the_models_own_are_interpolated() -> None:
    values = np.array([[30.0, 10.0, 20.0]])  # crossing
    found = interpolate([0.1, 0.5, 0.6], values, [0.01, 0.1, 0.2, 0.5, 0.55, 0.6, 0.99])
    np.testing.assert_allclose(found, [[10, 10, 12.5, 20, 25, 30, 30]])


@pytest.mark.parametrize("horizon", [5, 21])
def test_the_likeliest_path_of_t5_is_the_librarys(tmp_path: Path, horizon: int) -> None:
    model = models.t5(tmp_path, top_k=1)
    series = models.walks(4)
    found = opened(model, num_samples=2, batch_size=4).predict(models.contexts(series), horizon, [0.5])
    inputs = [torch.from_numpy(values).float() for values in series]
    expected, _ = pipeline_of(model).predict_quantiles(
        inputs, prediction_length=horizon, quantile_levels=[0.5], num_samples=2
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_t5_draws_as_often_as_the_library_does(made: dict[str, Manifest]) -> None:
    """The distribution of the first point, from many paths of each."""
    values = models.walks(1)[0]
    levels = [0.1, 0.25, 0.5, 0.75, 0.9]
    found = opened(made["t5"], num_samples=2000, batch_size=4000).predict(models.contexts([values]), 1, levels)
    torch.manual_seed(0)
    expected, _ = pipeline_of(made["t5"]).predict_quantiles(
        torch.from_numpy(values).float(), prediction_length=1, quantile_levels=levels, num_samples=2000
    )
    scale = np.nanmean(np.abs(values))
    np.testing.assert_allclose(found[0] / scale, expected[0] / scale, atol=2.0)  # of a width of 30


@pytest.mark.parametrize("family", FAMILIES)
def test_batch_size_order_and_company_change_nothing(made: dict[str, Manifest], family: str) -> None:
    series = models.walks(9)
    given = models.contexts(series, covariates=family == "chronos2")
    whole = opened(made[family]).predict(given, 8, LEVELS)
    assert np.isfinite(whole).all()
    assert (np.diff(whole, axis=-1) >= 0).all()
    scale = np.array([np.nanstd(values) for values in series])[:, None, None]
    close = {"rtol": 1e-5, "atol": 1e-5}
    small = opened(made[family], batch_size=1 if family == "bolt" else 13)
    np.testing.assert_allclose(small.predict(given, 8, LEVELS) / scale, whole / scale, **close)
    order = np.random.default_rng(0).permutation(9)
    shuffled = opened(made[family]).predict([given[place] for place in order], 8, LEVELS)
    np.testing.assert_allclose(shuffled / scale[order], (whole / scale)[order], **close)
    alone = opened(made[family]).predict(given[3:4], 8, LEVELS)
    np.testing.assert_allclose(alone / scale[3], whole[3:4] / scale[3], **close)


def test_series_see_each_other_with_cross_learning_only(made: dict[str, Manifest]) -> None:
    given = models.contexts(models.walks(4))
    changed = [replace(given[0], target=given[0].target[::-1].copy()), *given[1:]]
    for cross, equal in ((False, True), (True, False)):
        forecaster = opened(made["chronos2"], cross_learning=cross)
        found = [forecaster.predict(items, 8, LEVELS)[1:] for items in (given, changed)]
        assert np.allclose(*found, atol=1e-4) is equal


def test_cross_learning_is_the_librarys(made: dict[str, Manifest]) -> None:
    series = models.walks(5)
    found = opened(made["chronos2"], cross_learning=True).predict(models.contexts(series), 21, [0.5])
    inputs = [(values - np.nanmean(values[-32:])) / np.nanstd(values[-32:]) for values in series]
    expected = pipeline_of(made["chronos2"]).predict(inputs, prediction_length=21, cross_learning=True)
    back = [
        np.sort(part[0].numpy(), axis=0)[4] * np.nanstd(values[-32:]) + np.nanmean(values[-32:])
        for part, values in zip(expected, series, strict=True)
    ]
    np.testing.assert_allclose(found[..., 0], back, rtol=1e-4, atol=1e-4)


def test_covariates_are_read_as_the_library_reads_them(made: dict[str, Manifest]) -> None:
    series = models.walks(5, length=30)
    given = models.contexts(series, covariates=True)
    found = opened(made["chronos2"], batch_size=8).predict(given, 8, [0.5])
    inputs = [
        {"target": context.target, "past_covariates": context.past, "future_covariates": context.future}
        for context in given
    ]
    expected = pipeline_of(made["chronos2"]).predict(inputs, prediction_length=8)
    scale = np.array([np.nanstd(values) for values in series])[:, None]
    np.testing.assert_allclose(
        found[..., 0] / scale, np.stack([np.sort(part[0].numpy(), axis=0)[4] for part in expected]) / scale, atol=1e-4
    )
    without = opened(made["chronos2"], covariates=[]).predict(given, 8, [0.5])
    some = opened(made["chronos2"], covariates=["price"]).predict(given, 8, [0.5])
    for one, other in ((found, without), (found, some), (some, without)):
        assert not np.allclose(one, other, atol=1e-3)
    plain = opened(made["chronos2"]).predict(models.contexts(series), 8, [0.5])
    np.testing.assert_allclose(without, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_series_that_are_hard_to_read(made: dict[str, Manifest], family: str) -> None:
    long_gap = np.concatenate([np.arange(20.0), np.full(40, np.nan)])
    series = [np.full(20, 7.0), np.full(10, np.nan), np.zeros(5), np.array([3.0]), long_gap, np.arange(40.0)]
    found = opened(made[family]).predict(models.contexts(series), 8, LEVELS)
    missing = [bool(np.isnan(part).all()) for part in found]
    assert missing == [False, True, False, False, True, False]
    assert np.isfinite(found[[0, 2, 3, 5]]).all()
    if family != "t5":
        np.testing.assert_allclose(found[0], 7.0, atol=1e-2)
    huge = opened(made[family]).predict(models.contexts([1e200 * np.arange(1, 30.0)]), 8, [0.5])
    usual = opened(made[family]).predict(models.contexts([np.arange(1, 30.0)]), 8, [0.5])
    np.testing.assert_allclose(huge / 1e200, usual, rtol=1e-4)
    assert opened(made[family]).predict([], 8, LEVELS).shape == (0, 8, 5)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_lies_before_the_context_is_not_read(made: dict[str, Manifest], family: str) -> None:
    values = models.walks(1)[0]
    spiked = values.copy()
    spiked[: -models.CONTEXT] = 1e6
    found = [opened(made[family]).predict(models.contexts([part]), 8, LEVELS) for part in (values, spiked)]
    np.testing.assert_array_equal(*found)
    short = opened(made[family], context_length=8).predict(models.contexts([values]), 8, LEVELS)
    np.testing.assert_allclose(
        short, opened(made[family]).predict(models.contexts([values[-8:]]), 8, LEVELS), rtol=1e-5, atol=1e-5
    )


def test_draws_depend_on_seed_and_name(made: dict[str, Manifest]) -> None:
    given = models.contexts(models.walks(2))
    first = opened(made["t5"]).predict(given, 8, LEVELS)
    assert np.array_equal(first, opened(made["t5"]).predict(given, 8, LEVELS))
    assert not np.allclose(first, opened(made["t5"], seed=1).predict(given, 8, LEVELS))
    renamed = [replace(context, item_id="other") for context in given]
    assert not np.allclose(first, opened(made["t5"]).predict(renamed, 8, LEVELS))
    longer = opened(made["t5"]).predict(given, 12, LEVELS)
    np.testing.assert_allclose(longer[:, :8], first, rtol=1e-6)


class TestRefusals:
    @pytest.mark.parametrize(
        ("family", "config", "words"),
        [
            ("bolt", {"covariates": ["price"]}, "covariates: price, but a chronos-bolt reads none"),
            ("t5", {"cross_learning": True}, "cross_learning: true, but a chronos-t5"),
            ("bolt", {"num_samples": 5}, "num_samples: 5, but a chronos-bolt draws no samples"),
        ],
        ids=["covariates", "cross", "samples"],
    )
    def test_what_the_model_cannot_do(
        self, made: dict[str, Manifest], family: str, config: dict[str, Any], words: str
    ) -> None:
        with pytest.raises(UserError, match=words):
            opened(made[family], **config)

    def test_a_horizon_beyond_the_context(self, made: dict[str, Manifest]) -> None:
        with pytest.raises(UserError, match="horizon: 33 is more than the 32 points that the model reads"):
            opened(made["bolt"]).predict(models.contexts(models.walks(1)), 33, [0.5])

    def test_an_unknown_covariate(self, made: dict[str, Manifest]) -> None:
        given = models.contexts(models.walks(1), covariates=True)
        with pytest.raises(UserError, match="covariates: the series have no 'prize'; the covariates are day, price"):
            opened(made["chronos2"], covariates=["prize"]).predict(given, 8, [0.5])

    def test_no_chronos(self, made: dict[str, Manifest], tmp_path: Path) -> None:
        shutil.copytree(Path(made["bolt"].uri) / "model", tmp_path / "model")
        config = tmp_path / "model" / "config.json"
        settings = json.loads(config.read_text())
        for change, words in (
            ({"chronos_config": None}, "has no chronos_config"),
            ({"chronos_pipeline_class": "Chronos3Pipeline"}, "is chronos_pipeline_class 'Chronos3Pipeline'"),
        ):
            config.write_text(json.dumps({**settings, **change}))
            with pytest.raises(UserError, match=words):
                opened(Manifest.describe(tmp_path, kind="model"))

    def test_weights_that_are_missing(self, made: dict[str, Manifest], tmp_path: Path) -> None:
        shutil.copytree(Path(made["bolt"].uri) / "model", tmp_path / "model")
        path = tmp_path / "model" / "model.safetensors"
        tensors = load_file(path)
        del tensors["input_patch_embedding.hidden_layer.weight"]
        save_file(tensors, path, {"format": "pt"})
        with pytest.raises(UserError, match=r"lacks tensor input_patch_embedding\.hidden_layer\.weight"):
            opened(Manifest.describe(tmp_path, kind="model"))
