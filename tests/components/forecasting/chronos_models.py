"""Tiny Chronos models with random weights, as manifests, and series to forecast."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from chronos.chronos2 import Chronos2Model
from chronos.chronos2.config import Chronos2CoreConfig
from transformers import T5Config, T5ForConditionalGeneration

from modelmill.components.core.manifest import Manifest
from modelmill.components.core.weights import weights_digest
from modelmill.components.forecasting.chronos_model import new_bolt
from modelmill.components.forecasting.chronos_train_config import BoltConfig
from modelmill.components.forecasting.series_table import FILE, Context, Points, SeriesWriter

CONTEXT, PREDICTION = 32, 8
SIZES: dict[str, Any] = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
LEVELS = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]


def bolt(folder: Path, **changes: Any) -> Manifest:
    sizes = {name: SIZES[name] for name in ("d_model", "d_ff", "num_layers", "num_heads")}
    sizes |= {"num_decoder_layers": 1, "context_length": CONTEXT, "prediction_length": PREDICTION, "patch_size": 4}
    return _saved(folder, new_bolt(BoltConfig(**{**sizes, "initializer_factor": 0.5, **changes}), 0))


def t5(folder: Path, **changes: Any) -> Manifest:
    settings = {
        "tokenizer_class": "MeanScaleUniformBins",
        "tokenizer_kwargs": {"low_limit": -15.0, "high_limit": 15.0},
        "context_length": CONTEXT,
        "prediction_length": PREDICTION,
        "n_tokens": 64,
        "n_special_tokens": 2,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "use_eos_token": True,
        "model_type": "seq2seq",
        "num_samples": 5,
        "temperature": 1.0,
        "top_k": 50,
        "top_p": 1.0,
        **changes,
    }
    torch.manual_seed(0)
    config = T5Config(
        **SIZES, vocab_size=64, decoder_start_token_id=0, chronos_config=settings, tie_word_embeddings=False
    )
    return _saved(folder, T5ForConditionalGeneration(config))


def chronos2(folder: Path) -> Manifest:
    settings = {
        "context_length": CONTEXT,
        "input_patch_size": 4,
        "input_patch_stride": 4,
        "output_patch_size": 4,
        "max_output_patches": 2,
        "quantiles": LEVELS,
        "use_reg_token": True,
        "use_arcsinh": True,
    }
    torch.manual_seed(0)
    config = Chronos2CoreConfig(
        **SIZES, initializer_factor=0.5, chronos_config=settings, chronos_pipeline_class="Chronos2Pipeline"
    )
    config.architectures = ["Chronos2Model"]
    return _saved(folder, Chronos2Model(config))


def _saved(folder: Path, model: Any) -> Manifest:
    model.save_pretrained(str(folder / "model"))
    digest = weights_digest(folder / "model")
    return Manifest.describe(folder, kind="model", metadata={"weights_digest": digest})


def walks(count: int, *, length: int = 60, seed: int = 0) -> list[np.ndarray]:
    """Random walks of different lengths with some missing points."""
    random = np.random.default_rng(seed)
    found = []
    for number in range(count):
        values = random.normal(size=max(3, length - 3 * number)).cumsum() + 10 * number
        values[random.random(len(values)) < 0.1] = np.nan
        values[-1] = number
        found.append(values)
    return found


def contexts(series: list[np.ndarray], *, covariates: bool = False, horizon: int = 8) -> list[Context]:
    found = []
    for number, values in enumerate(series):
        past: dict[str, np.ndarray] = {}
        future: dict[str, np.ndarray] = {}
        if covariates:
            random = np.random.default_rng(number)
            price = random.normal(size=len(values) + horizon)
            days = np.array(["mon", "tue", None], object)[random.integers(0, 3, len(values) + horizon)]
            past = {"visitors": random.normal(size=len(values)), "price": price[:-horizon], "day": days[:-horizon]}
            future = {"price": price[-horizon:], "day": days[-horizon:]}
        found.append(Context(f"item-{number}", values, past, future, "D", 7))
    return found


def series_manifest(folder: Path, series: list[np.ndarray], *, horizon: int = 0, windows: int = 0) -> Manifest:
    """What `prepare_series` would make of some series."""
    data = folder / "data"
    data.mkdir(parents=True)
    lengths = [len(values) for values in series]
    with SeriesWriter(data / FILE) as writer:
        writer.append(
            [f"item-{number}" for number in range(len(series))],
            np.full(len(series), np.datetime64("2024-01-01", "ns")),
            ["D"] * len(series),
            np.full(len(series), 7),
            Points(np.concatenate([[0], np.cumsum(lengths)]), np.concatenate(series)),
        )
    return Manifest.describe(
        data, kind="series", counts={"series": len(series)}, metadata={"horizon": horizon, "windows": windows}
    )
