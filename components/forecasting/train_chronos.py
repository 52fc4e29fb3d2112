"""Step `train_chronos`: a Chronos from random weights, or a given one tuned on series, on the training engine.

As in pretraining, the step's own process stays without torch: a launcher starts this module once a rank.
"""

from __future__ import annotations

import logging
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modelmill.components.core import tracking
from modelmill.components.core.errors import UserError
from modelmill.components.core.manifest import Manifest, json_digest
from modelmill.components.core.model_folder import digest_of, model_folder
from modelmill.components.core.step import StepResult, step_options
from modelmill.components.forecasting.chronos_model import ChronosFolder, read_chronos
from modelmill.components.forecasting.chronos_train_config import ChronosTrainConfig
from modelmill.components.forecasting.chronos_windows import Windows
from modelmill.components.forecasting.series_profile import write_profile
from modelmill.components.forecasting.series_table import open_series
from modelmill.components.training.config import TrainingConfig
from modelmill.components.training.journal import HISTORY, Journal, track_outcome
from modelmill.components.training.launch import (
    LAUNCHED_VARIABLE,
    Launcher,
    TrainingJob,
    TrainingResult,
    current_launcher,
)
from modelmill.components.training.worker import RankContext, run_rank

MODULE = "modelmill.components.forecasting.train_chronos"
FLAVOR = "forecaster"
_MODEL = "model"
logger = logging.getLogger("modelmill")


@step_options(resumable=True, launches=True)
def train_chronos(
    config: ChronosTrainConfig,
    output: Path,
    *,
    series: Manifest,
    base: Manifest | None = None,
    launcher: Launcher | None = None,
    until: int | None = None,
) -> StepResult:
    """Train a new Chronos-Bolt, or all weights of a given Chronos-Bolt or Chronos-T5, on windows of series.

    Writes `model/`, a folder that chronos-forecasting loads (with a base it tells what the series looked like, see
    `series_profile`), and `history.jsonl`; there `tokens` are windows, and
    losses are means over the points of the horizon (of Bolt also over the quantiles). Checkpoints lie beside `output`,
    and a second call goes on from the newest. What the series hold back for the backtest is never read.

    Args:
        config: sizes of a new model, windows and training.
        output: the artifact's folder.
        series: manifest of `prepare_series` or `synthesise_series`.
        base: manifest of the model to start from; without one, `config.model` is made.
        launcher: where the training processes run; default this machine.
        until: step of the schedule to stop after and export, as if it were the last; a later call goes on from there.

    Returns:
        kind `model`; counts `parameters`, `steps`, `windows`, `series`; metadata `flavor`, `family`, `method` (scratch
        or full), `weights_digest`, `dataset_digest` and with a base `base_digest`.

    Raises:
        UserError: section, series and base do not fit together, or training diverged.
        TrainingStoppedError: it was told to stop.
        RankFailedError: a training process crashed.
    """
    place, training = launcher or current_launcher(), config.training
    table, sizes = open_series(series), _sizes(config, base)
    horizon = _horizon(config, sizes)
    windows = _windows(config, sizes, series)
    place.check(training)
    summary = {
        "family": sizes.family,
        "steps": training.steps,
        "windows_per_step": training.global_batch_size,
        "context_length": sizes.context_length,
        "horizon": horizon,
        "series": len(windows.usable),
        "left_out_series": len(table) - len(windows.usable),
        "world_size": training.parallel.world_size,
    }
    logger.info("%s", ", ".join(f"{name} {value}" for name, value in summary.items()))
    digests = {} if base is None else {"base_digest": digest_of(base)}
    tracking.log_params({**summary, **digests})
    profile = {name: count for name, count in series.counts.items() if name in ("series", "points")}
    tracking.log_dataset(name="series", digest=series.digest, source=series.uri, context="training", profile=profile)
    job = TrainingJob(
        module=MODULE,
        spec={
            "config": config.model_dump(mode="json", exclude={"training"}),
            "series": series.model_dump(mode="json"),
            "base": None if base is None else {"folder": str(model_folder(base).absolute()), **digests},
            "output": str(output.absolute()),
            "until": until,
        },
        training=training,
        scratch=output.parent.absolute(),
        exports=(output.absolute() / _MODEL,),
    )
    result = place.launch(job)
    track_outcome(output, result.metrics, training.steps)
    if base is not None:
        write_profile(table, output / _MODEL)
    metadata = {
        **result.metadata,
        "flavor": FLAVOR,
        "family": sizes.family,
        "method": "scratch" if base is None else "full",
        "dataset_digest": series.digest,
        **digests,
    }
    counts = {**result.counts, "series": len(windows.usable)}
    return StepResult("model", counts=counts, metrics=result.metrics, metadata=metadata)


def _sizes(config: ChronosTrainConfig, base: Manifest | None) -> ChronosFolder:
    """What is trained.

    Raises:
        UserError: neither or both of a new model and a base are given, or the base is none that is trained here.
    """
    if (config.model is None) == (base is None):
        what = "sizes and a base are both given" if base is not None else "neither sizes nor a base are given"
        raise UserError(f"chronos.model: {what}; set model for a new Chronos-Bolt, or give the step a base")
    if config.model is not None:
        return ChronosFolder("chronos-bolt", config.model.context_length, config.model.prediction_length)
    assert base is not None
    sizes = read_chronos(model_folder(base), "base")
    if sizes.family == "chronos-2":
        raise UserError(
            "base: a Chronos-2 is tuned by the method of its library, not here; give a Chronos-T5 or Chronos-Bolt"
        )
    return sizes


def _horizon(config: ChronosTrainConfig, sizes: ChronosFolder) -> int:
    horizon = config.horizon or sizes.prediction_length
    if horizon > sizes.prediction_length:
        raise UserError(
            f"chronos.horizon: {horizon} is more than the {sizes.prediction_length} points that the model forecasts at"
            f" once; use at most {sizes.prediction_length}"
        )
    return horizon


def _windows(config: ChronosTrainConfig, sizes: ChronosFolder, series: Manifest) -> Windows:
    training = config.training
    return Windows(
        open_series(series),
        context_length=sizes.context_length,
        horizon=_horizon(config, sizes),
        min_context=config.min_context,
        short_contexts=config.short_contexts,
        hold_out=training.validation_rows > 0,
        seed=training.seed,
        global_batch_size=training.global_batch_size,
    )


def train(ranks: RankContext, spec: Mapping[str, Any], training: TrainingConfig) -> TrainingResult:
    """What one rank does: build or load, train, and take part in the export that rank 0 writes."""
    import os
    import time

    import numpy as np
    import torch

    from modelmill.components.core.weights import weights_digest
    from modelmill.components.forecasting.chronos_model import load_chronos, new_bolt
    from modelmill.components.forecasting.chronos_objective import chronos_loss, training_of
    from modelmill.components.training.checkpoint import Checkpoints
    from modelmill.components.training.gathering import save_whole
    from modelmill.components.training.loop import TrainingData, TrainingLoop
    from modelmill.components.training.prepare import prepare

    config = ChronosTrainConfig.model_validate({**spec["config"], "training": training})
    series, base, output = Manifest.model_validate(spec["series"]), spec["base"], Path(spec["output"])
    if config.model is not None:
        sizes = ChronosFolder("chronos-bolt", config.model.context_length, config.model.prediction_length)
        source: Any = new_bolt(config.model, training.seed)
        model = source
    else:
        folder = Path(base["folder"])
        sizes = read_chronos(folder, "base")
        pipeline = load_chronos(folder, torch.float32, parameter="base")
        model = pipeline.inner_model
        source = model if sizes.family == "chronos-bolt" else pipeline
    windows = _windows(config, sizes, series)
    wrapped, batches = training_of(sizes.family, source, windows)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    prepare(wrapped, ranks, training)
    wrapped.to(ranks.device)
    torch.manual_seed(training.seed + ranks.data_rank)  # dropout; a checkpoint keeps the state
    held = batches.encode(windows.validation(training.validation_rows))
    loop = TrainingLoop(
        model=wrapped,
        objective=chronos_loss,
        data=TrainingData(batches, held, np.ones(len(held), np.int64)),
        config=training if spec["until"] is None else _cut_off(training, spec["until"]),
        ranks=ranks,
        checkpoints=Checkpoints(
            ranks.scratch / "checkpoints",
            digest=json_digest([spec["config"], base and base["base_digest"], training.deciding(), series.digest]),
            keep=training.keep_checkpoints,
            rank=ranks.rank,
            world_size=ranks.world_size,
        ),
        journal=Journal(ranks.scratch / HISTORY, training.steps, enabled=ranks.is_main),
    )
    start = time.time() - float(os.environ[LAUNCHED_VARIABLE])
    metrics = {name.replace("tokens_per", "windows_per"): value for name, value in loop.run().items()}
    counts = {"parameters": parameters, "steps": loop.progress.step, "windows": loop.progress.tokens}
    result = TrainingResult(
        counts={**counts, "world_size": ranks.world_size}, metrics={"start_seconds": start, **metrics}
    )
    began = time.perf_counter()
    save_whole(model, output / _MODEL, wanted=ranks.is_main)
    if ranks.is_main:
        shutil.copyfile(ranks.scratch / HISTORY, output / HISTORY)
        result.metadata["weights_digest"] = weights_digest(output / _MODEL)
        result.metrics["export_seconds"] = time.perf_counter() - began
    return result


def _cut_off(training: TrainingConfig, until: int) -> TrainingConfig:
    """The same schedule, ended after a step of it; unchecked, since its parts are longer than what is left of it."""
    lengths = {"constant_steps": training.constant_length, "decay_steps": training.decay_length}
    return training.model_copy(update={"steps": min(until, training.steps), **lengths})


if __name__ == "__main__":
    run_rank(train, sys.argv)
