"""Step `tune_chronos2`: a Chronos-2 tuned on series by the `fit` of its library, all weights or LoRA."""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from modelmill.components.core import events, tracking
from modelmill.components.core.errors import UserError
from modelmill.components.core.manifest import Manifest
from modelmill.components.core.model_folder import digest_of, model_folder
from modelmill.components.core.step import StepResult, step_options
from modelmill.components.core.weights import weights_digest
from modelmill.components.forecasting.chronos2_config import Chronos2TuneConfig
from modelmill.components.forecasting.chronos_model import load_chronos, read_chronos
from modelmill.components.forecasting.series_profile import write_profile
from modelmill.components.forecasting.series_table import SeriesTable, open_series
from modelmill.components.training.journal import HISTORY, Journal, track_outcome

logger = logging.getLogger("modelmill")
_TARGETS = (
    "self_attention.q",
    "self_attention.v",
    "self_attention.k",
    "self_attention.o",
    "output_patch_embedding.output_layer",
)


@step_options(device=True)
def tune_chronos2(config: Chronos2TuneConfig, output: Path, *, series: Manifest, base: Manifest) -> StepResult:
    """Tune a Chronos-2 on windows of series, with their covariates.

    Writes `model/`, a whole model also with LoRA, with what the series looked like (see `series_profile`), and
    `history.jsonl`. What the series hold back for the backtest is
    never read. A step that was stopped begins again.

    Args:
        config: method, windows and schedule.
        output: an empty folder.
        series: manifest of `prepare_series`.
        base: manifest of a Chronos-2.

    Returns:
        kind `model`; counts `parameters`, `steps`, `series`; metadata `flavor` (forecaster), `family`, `method`,
        `weights_digest`, `base_digest`, `dataset_digest`.

    Raises:
        UserError: the base is no Chronos-2, peft is missing, no series is long enough, a covariate is unknown, there
            is no such device, or training diverged.
    """
    folder = model_folder(base)
    if read_chronos(folder, "base").family != "chronos-2":
        raise UserError("base: this step tunes a Chronos-2; tune a Chronos-T5 or Chronos-Bolt with train_chronos")
    if config.method == "lora" and find_spec("peft") is None:
        # The library would train all weights instead, with a warning.
        raise UserError("chronos2.method: lora needs the package peft; pip install 'modelmill[finetune]' or use full")
    table = open_series(series)
    horizon = config.horizon or table.horizon
    if not horizon:
        raise UserError("chronos2.horizon: the series name none; set one, such as 24")
    train, held = _inputs(config, table, horizon)
    summary = {"method": config.method, "steps": config.steps, "horizon": horizon, "series": len(train)}
    logger.info("%s", ", ".join(f"{name} {value}" for name, value in summary.items()))
    tracking.log_params({**summary, "base_digest": digest_of(base), "learning_rate": config.learning_rate})
    tracking.log_dataset(
        name="series", digest=series.digest, source=series.uri, context="training", profile=dict(series.counts)
    )
    metrics, parameters = _fit(config, folder, output, horizon, train, held)
    track_outcome(output, metrics, config.steps)
    write_profile(table, output / "model")
    return StepResult(
        "model",
        counts={"parameters": parameters, "steps": config.steps, "series": len(train)},
        metrics=metrics,
        metadata={
            "flavor": "forecaster",
            "family": "chronos-2",
            "method": config.method,
            "weights_digest": weights_digest(output / "model"),
            "base_digest": digest_of(base),
            "dataset_digest": series.digest,
        },
    )


def _inputs(config: Chronos2TuneConfig, table: SeriesTable, horizon: int) -> tuple[list[Any], list[Any] | None]:
    """Series as the library takes them: to train on, and those whose ends are for validation."""
    names = [*table.past_names, *table.known_names]
    if config.covariates is not None:
        if unknown := [name for name in config.covariates if name not in names]:
            listed = ", ".join(names) or "none"
            raise UserError(f"chronos2.covariates: there is no covariate {unknown[0]!r}; the series have {listed}")
        names = list(config.covariates)
    ahead = [name for name in names if name in table.known_names]
    ends = table.lengths - table.horizon * table.windows
    least = config.min_context + horizon
    cut = horizon if config.validate_every is not None else 0
    usable = np.flatnonzero(ends - cut >= least)
    if not len(usable):
        raise UserError(
            f"chronos2.min_context: {config.min_context}, but no series has {least + cut} points before its backtest"
            f" windows; the longest has {max(0, int(ends.max(initial=0)))}; lower it or chronos2.horizon"
        )
    numbers = [int(number) for number in usable if not np.isnan(table.target(int(number))[: ends[number] - cut]).all()]
    train = [_input(table, number, int(ends[number]) - cut, names, ahead) for number in numbers]
    held = [_input(table, number, int(ends[number]), names, ahead) for number in numbers] if cut else None
    return train, held


def _input(table: SeriesTable, number: int, end: int, names: Sequence[str], ahead: Sequence[str]) -> Any:
    target = table.target(number)[:end]
    size = float(np.nanmax(np.abs(target))) or 1.0  # float32 does not hold every value; the model's scale is its own
    scaled = target / size
    if not names:
        return scaled
    past = {name: table.covariate(number, name)[:end] for name in names}
    return {"target": scaled, "past_covariates": past, "future_covariates": dict.fromkeys(ahead)}


def _fit(
    config: Chronos2TuneConfig, folder: Path, output: Path, horizon: int, train: list[Any], held: list[Any] | None
) -> tuple[dict[str, float], int]:
    """Tune, write `model/` and `history.jsonl`; returns the last losses and the number of weights."""
    import torch
    from transformers import TrainerCallback, set_seed

    from modelmill.components.training.gathering import save_whole

    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("chronos2.device: cuda is not in this machine; use auto or cpu")
    events.progress("loading the base")
    device = "cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu"
    pipeline = load_chronos(folder, torch.float32, device, "base")
    scratch = output.parent / "chronos2"
    scratch.mkdir(exist_ok=True)
    (scratch / HISTORY).unlink(missing_ok=True)
    journal = Journal(scratch / HISTORY, config.steps, enabled=True)

    class Report(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            logs = kwargs["logs"]
            if "loss" in logs:
                if not math.isfinite(logs["loss"]):
                    rate = f"chronos2.learning_rate: {config.learning_rate:g}"
                    raise UserError(f"{rate} made the loss of step {state.global_step} {logs['loss']}; lower it")
                named = {name: float(logs[name]) for name in ("loss", "learning_rate", "grad_norm") if name in logs}
                journal.trained({"step": state.global_step, **named}, {})
            if "eval_loss" in logs:
                journal.validated(state.global_step, float(logs["eval_loss"]))

    set_seed(config.seed)  # numpy's too, which draws the windows
    options: dict[str, Any] = {"seed": config.seed, "logging_steps": config.log_every, "logging_first_step": True}
    options["disable_tqdm"] = True
    if config.validate_every is not None:
        options |= {"eval_steps": config.validate_every, "save_steps": config.validate_every}
    if config.method == "lora":
        options["lora_config"] = {"r": config.rank, "lora_alpha": config.alpha, "target_modules": list(_TARGETS)}
    limit = int(pipeline.model_context_length)
    tuned = pipeline.fit(
        train,
        prediction_length=horizon,
        validation_inputs=held,
        finetune_mode=config.method,
        context_length=min(limit, config.context_length or limit),
        learning_rate=config.learning_rate,
        num_steps=config.steps,
        batch_size=config.batch_size,
        min_past=config.min_context,
        output_dir=scratch,
        callbacks=[Report()],
        remove_printer_callback=True,
        logging_nan_inf_filter=False,
        **options,
    )
    model = tuned.model.merge_and_unload() if config.method == "lora" else tuned.model
    save_whole(model, output / "model", wanted=True)
    shutil.copyfile(scratch / HISTORY, output / HISTORY)
    shutil.rmtree(scratch)
    named = {"loss": "train_loss", "validation_loss": "validation_loss"}
    metrics = {named[name]: value for name, value in journal.latest.items() if name in named}
    return metrics, sum(parameter.numel() for parameter in model.parameters())
