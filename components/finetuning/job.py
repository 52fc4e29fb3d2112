"""What the steps that tune a model share in their own process, which stays without torch."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from modelmill.components.core import tracking
from modelmill.components.core.errors import UserError
from modelmill.components.core.manifest import Manifest
from modelmill.components.core.step import StepResult
from modelmill.components.finetuning.base import Base
from modelmill.components.finetuning.config import FinetuneConfig
from modelmill.components.finetuning.folders import ADAPTER_FOLDER, MODEL_FOLDER
from modelmill.components.training.config import TrainingConfig
from modelmill.components.training.journal import track_outcome
from modelmill.components.training.launch import Launcher, TrainingJob

logger = logging.getLogger("modelmill")


def refuse_missing_packages(method: str) -> None:
    """Refuse what would otherwise fail on every rank; no method becomes another one silently.

    Raises:
        UserError: the method needs a package that is not installed.
    """
    needed = {"full": (), "qlora": ("peft", "bitsandbytes")}.get(method, ("peft",))
    for package in needed:
        if find_spec(package) is None:
            raise UserError(
                f"method: {method!r} needs the package {package}, which is not installed; install the extra"
                " 'finetune' or use another method"
            )


def check_fit(model: Mapping[str, Any], training: TrainingConfig, data: Manifest, unit: str) -> None:
    """Check the base's `config.json`, training and prepared data against each other, before any process starts.

    Args:
        model: the base's `config.json`.
        training: the section.
        data: manifest of prepared data; its kind is what its section is called.
        unit: what a batch counts, and the data as `train_<unit>`: rows or pairs.

    Raises:
        UserError: they do not fit; one line names the field, its value and what would do.
    """
    section, counts = data.kind, data.counts
    length, room = counts["sequence_length"], model.get("max_position_embeddings")
    if room is not None and length > room:
        raise UserError(
            f"{section}.sequence_length: {length} is more than the {room} positions of the base; use {room} or less"
        )
    words = model.get("vocab_size")
    if words is not None and counts["vocab_size"] > words:
        raise UserError(
            f"{section}.tokenizer: its {counts['vocab_size']} tokens are more than the {words} of the base;"
            f" prepare the {section} with the base's own tokenizer"
        )
    held = counts[f"train_{unit}"]
    if not held:
        raise UserError(f"{section}: the training split is empty; give more records or lower the other fractions")
    if held < training.global_batch_size:
        raise UserError(
            f"training.global_batch_size: {training.global_batch_size} is more than the {held} {unit} of the training"
            f" split; use at most {held}, or more records"
        )
    if training.validation_rows and not counts[f"validation_{unit}"]:
        raise UserError(
            f"training.validation_rows: {training.validation_rows} {unit} are asked for and the validation split is"
            f" empty; raise {section}.validation_fraction or set training.validation_rows to 0"
        )


def announce(
    config: FinetuneConfig,
    data: Manifest,
    *,
    base: Base,
    unit: str,
    objective: Mapping[str, Any],
    sizes: Mapping[str, int],
    profile: Sequence[str],
) -> None:
    """Say in the log and in tracking what is trained on what.

    Args:
        config: method and training.
        data: manifest of prepared data.
        base: the model to start from.
        unit: what a batch counts, and the data as `train_<unit>`: rows or pairs.
        objective: settings of the loss, where it has some.
        sizes: what else there is to say of the training split.
        profile: counts that describe a split as a data set.
    """
    training, counts = config.training, data.counts
    summary = {
        "base": base.name,
        "method": config.method,
        **objective,
        "steps": training.steps,
        f"{unit}_per_step": training.global_batch_size,
        "sequence_length": counts["sequence_length"],
        f"train_{unit}": counts[f"train_{unit}"],
        **sizes,
        "epochs": round(training.steps * training.global_batch_size / counts[f"train_{unit}"], 2),
        "world_size": training.parallel.world_size,
        "shard": training.parallel.shard,
        "accumulation_steps": training.accumulation_steps,
    }
    logger.info("%s", ", ".join(f"{key} {value}" for key, value in summary.items()))
    tracking.log_params({**summary, "base_digest": base.digest})
    tracking.log_splits(data, ("train", "validation"), name=data.kind, suffix=".jsonl", units=profile)


def run_job(
    module: str,
    config: FinetuneConfig,
    output: Path,
    *,
    base: Base,
    data: Manifest,
    spec: Mapping[str, Any],
    launcher: Launcher,
) -> StepResult:
    """Have a launcher train, and say what came of it.

    Args:
        module: what every rank runs.
        config: method, adapter and training.
        output: the artifact's folder.
        base: the model to start from.
        data: manifest of prepared data, given to the ranks under its kind.
        spec: what else they need, as JSON.
        launcher: where they run.

    Returns:
        kind `adapter` or `model`; metadata `base_digest` (of the base's weights), `base`, `method`, `weights_digest`,
        `dataset_digest`, `template`, and of method qlora `quantization`: how the base was rounded.

    Raises:
        UserError, TrainingStoppedError, RankFailedError: see `Launcher.launch`.
    """
    job = TrainingJob(
        module=module,
        spec={
            **spec,
            "base": {"folder": str(base.folder), "digest": base.digest, "name": base.name},
            "method": config.method,
            "adapter": config.adapter.model_dump(mode="json"),
            "quantization": config.quantization.model_dump(mode="json"),
            data.kind: data.model_dump(mode="json"),
            "output": str(output.absolute()),
        },
        training=config.training,
        scratch=output.parent.absolute(),
        exports=tuple(output.absolute() / name for name in (ADAPTER_FOLDER, MODEL_FOLDER)),
    )
    result = launcher.launch(job)
    track_outcome(output, result.metrics, config.training.steps)
    metadata = {
        **result.metadata,
        "method": config.method,
        "base": base.name,
        "base_digest": base.digest,
        "dataset_digest": data.digest,
        "template": data.metadata.get("template"),
    }
    kind = "model" if config.method == "full" else "adapter"
    return StepResult(kind=kind, counts=result.counts, metrics=result.metrics, metadata=metadata)
