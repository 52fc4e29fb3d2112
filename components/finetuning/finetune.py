"""Fine-tuning: the step, and what each of its training processes does.

As in pretraining, the step's own process stays without torch: it finds base and data and has a launcher start this
module once a rank. `python -m modelmill.components.finetuning.finetune JOB.json` is a rank.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelmill.components.core import events, tracking
from modelmill.components.core.errors import UserError
from modelmill.components.core.manifest import Manifest, json_digest
from modelmill.components.core.step import StepResult, step_options
from modelmill.components.core.weights import weights_digest
from modelmill.components.data.instruction_rows import open_instructions
from modelmill.components.finetuning.base import open_base, read_model_config
from modelmill.components.finetuning.config import AdapterConfig, FinetuneConfig
from modelmill.components.finetuning.folders import ADAPTER_FOLDER, MODEL_FOLDER
from modelmill.components.training.config import TrainingConfig
from modelmill.components.training.journal import HISTORY, Journal, track_outcome
from modelmill.components.training.launch import (
    LAUNCHED_VARIABLE,
    Launcher,
    LocalLauncher,
    TrainingJob,
    TrainingResult,
)
from modelmill.components.training.worker import RankContext, run_rank

if TYPE_CHECKING:
    from modelmill.components.data.instruction_rows import InstructionRows
    from modelmill.components.finetuning.causal_lm import SupervisedModel
    from modelmill.components.training.loop import TrainingLoop

MODULE = "modelmill.components.finetuning.finetune"
logger = logging.getLogger("modelmill")


@step_options(resumable=True)
def finetune(
    config: FinetuneConfig,
    output: Path,
    *,
    instructions: Manifest,
    base: Manifest,
    launcher: Launcher | None = None,
) -> StepResult:
    """Train a causal language model, or an adapter for it, on packed conversations.

    Writes `adapter/` (in the form of `peft`) or with method full `model/` (a Hugging Face folder with the base's
    tokenizer), and `history.jsonl`. There `tokens` are targets: what the loss is over, no prompts and no padding.
    Checkpoints hold what is trained; they lie beside `output`, and a second call goes on from the newest.

    Args:
        config: method and training.
        output: the artifact's folder.
        instructions: manifest of `prepare_instructions`, made with the base's tokenizer.
        base: manifest of the model to start from, `fetch_model`'s or one that an earlier step made.
        launcher: where the training processes run; default this machine.

    Returns:
        kind `adapter` or `model`; metadata `base_digest` (of the base's weights), `base`, `method`, `weights_digest`,
        `dataset_digest`, `template`.

    Raises:
        UserError: base, data, adapter and machine do not fit together, or training diverged.
        TrainingStoppedError: it was told to stop.
        RankFailedError: a training process crashed.
    """
    training, place = config.training, launcher or LocalLauncher()
    refuse_missing_method(config.method)
    found = open_base(base)
    check_data(read_model_config(found), training, instructions)
    place.check(training)
    for name in (ADAPTER_FOLDER, MODEL_FOLDER):
        shutil.rmtree(output / name, ignore_errors=True)  # an export that was cut off
    for split in ("train", "validation"):
        open_instructions(instructions, split)  # verified once here; the ranks find it verified
    _announce(config, found.name, found.digest, instructions)
    job = TrainingJob(
        module=MODULE,
        spec={
            "base": {"folder": str(found.folder), "digest": found.digest, "name": found.name},
            "method": config.method,
            "adapter": config.adapter.model_dump(mode="json"),
            "instructions": instructions.model_dump(mode="json"),
            "output": str(output.absolute()),
        },
        training=training,
        scratch=output.parent.absolute(),
    )
    result = place.launch(job)
    track_outcome(output, result.metrics, training.steps)
    metadata = {
        **result.metadata,
        "method": config.method,
        "base": found.name,
        "base_digest": found.digest,
        "dataset_digest": instructions.digest,
        "template": instructions.metadata.get("template"),
    }
    kind = "model" if config.method == "full" else "adapter"
    return StepResult(kind=kind, counts=result.counts, metrics=result.metrics, metadata=metadata)


def refuse_missing_method(method: str) -> None:
    """Refuse what would otherwise silently become another method.

    Raises:
        UserError: 4-bit weights are asked for.
    """
    if method == "qlora":
        raise UserError(
            "finetune.method: 'qlora' needs 4-bit weights, which this engine does not train on yet; use lora, with"
            " training.parallel.shard and training.precision bf16-mixed to fit a large base"
        )


def check_data(model: Mapping[str, Any], training: TrainingConfig, instructions: Manifest) -> None:
    """Check the base's `config.json`, training and data against each other, before any process starts.

    Raises:
        UserError: they do not fit; one line names the field, its value and what would do.
    """
    if instructions.kind != "instructions":
        raise UserError(f"instructions: {instructions.uri} is of kind {instructions.kind}; run prepare_instructions")
    counts = instructions.counts
    length, room = counts["sequence_length"], model.get("max_position_embeddings")
    if room is not None and length > room:
        raise UserError(
            f"instructions.sequence_length: {length} is more than the {room} positions of the base; use {room} or less"
        )
    words = model.get("vocab_size")
    if words is not None and counts["vocab_size"] > words:
        raise UserError(
            f"instructions.tokenizer: its {counts['vocab_size']} tokens are more than the {words} of the base;"
            " prepare the instructions with the base's own tokenizer"
        )
    rows = counts["train_rows"]
    if not rows:
        raise UserError("instructions: the training split is empty; give more records or lower the other fractions")
    if rows < training.global_batch_size:
        raise UserError(
            f"training.global_batch_size: {training.global_batch_size} sequences are more than the {rows} rows of the"
            f" training split; use at most {rows}, or more records"
        )
    if training.validation_rows and not counts["validation_rows"]:
        raise UserError(
            f"training.validation_rows: {training.validation_rows} rows are asked for and the validation split is"
            " empty; raise instructions.validation_fraction or set training.validation_rows to 0"
        )


def _announce(config: FinetuneConfig, name: str, digest: str, instructions: Manifest) -> None:
    training, counts = config.training, instructions.counts
    summary = {
        "base": name,
        "method": config.method,
        "steps": training.steps,
        "rows_per_step": training.global_batch_size,
        "sequence_length": counts["sequence_length"],
        "train_rows": counts["train_rows"],
        "train_targets": counts["train_targets"],
        "epochs": round(training.steps * training.global_batch_size / counts["train_rows"], 2),
        "world_size": training.parallel.world_size,
        "shard": training.parallel.shard,
        "accumulation_steps": training.accumulation_steps,
    }
    logger.info("%s", ", ".join(f"{key} {value}" for key, value in summary.items()))
    tracking.log_params({**summary, "base_digest": digest})
    digests = {entry.path: entry.sha256 for entry in instructions.files}
    for split, context in (("train", "training"), ("validation", "validation")):
        tracking.log_dataset(
            name=f"instructions-{split}",
            digest=digests[f"{split}.jsonl"],
            source=instructions.uri,
            context=context,
            profile={name: counts[f"{split}_{name}"] for name in ("conversations", "rows", "targets")},
        )


def train(ranks: RankContext, spec: Mapping[str, Any], training: TrainingConfig) -> TrainingResult:
    """What one rank does: load, adapt, train, and take part in the export that rank 0 writes."""
    import torch

    from modelmill.components.finetuning import trained_model
    from modelmill.components.finetuning.causal_lm import SupervisedModel
    from modelmill.components.training.prepare import prepare

    instructions = Manifest.model_validate(spec["instructions"])
    rows, held_out = open_instructions(instructions, "train"), open_instructions(instructions, "validation")
    events.progress("loading the base")
    packed = any(len(split.places) > len(split) for split in (rows, held_out))
    model, names = trained_model.load(spec, training, packed=packed)
    sizes = trained_model.sizes(model)
    supervised = SupervisedModel(model)
    prepare(supervised, ranks, training)
    supervised.to(ranks.device)
    torch.manual_seed(training.seed + ranks.data_rank)  # dropout; a checkpoint keeps the state
    loop = _loop(supervised, rows, held_out, ranks, spec, training, instructions.digest)
    start = time.time() - float(os.environ[LAUNCHED_VARIABLE])
    metrics = {"start_seconds": start, **loop.run()}
    progress = {"steps": loop.progress.step, "tokens": loop.progress.tokens, "world_size": ranks.world_size}
    began = time.perf_counter()
    folder = trained_model.export(supervised, names, spec, wanted=ranks.is_main)
    result = TrainingResult(counts={**sizes, **progress}, metrics=metrics)
    if ranks.is_main:
        shutil.copyfile(ranks.scratch / HISTORY, Path(spec["output"]) / HISTORY)
        result.metrics["export_seconds"] = time.perf_counter() - began
        result.metadata["weights_digest"] = weights_digest(folder)
    return result


def _loop(
    supervised: SupervisedModel,
    rows: InstructionRows,
    held_out: InstructionRows,
    ranks: RankContext,
    spec: Mapping[str, Any],
    training: TrainingConfig,
    data_digest: str,
) -> TrainingLoop:
    from modelmill.components.finetuning import adapters, causal_lm
    from modelmill.components.training.checkpoint import Checkpoints
    from modelmill.components.training.loop import TrainingData, TrainingLoop

    full = spec["method"] == "full"
    ratio = 1.0 if full else AdapterConfig.model_validate(spec["adapter"]).learning_rate_ratio
    batches = causal_lm.SupervisedBatches(rows, training.seed, training.global_batch_size)
    validation = causal_lm.stack_rows(held_out.take(slice(0, training.validation_rows)))
    deciding = [spec["base"]["digest"], spec["method"], None if full else spec["adapter"], training.deciding()]
    return TrainingLoop(
        model=supervised,
        objective=causal_lm.supervised_loss,
        data=TrainingData(batches, validation, held_out.targets[: len(validation)]),
        config=training,
        ranks=ranks,
        checkpoints=Checkpoints(
            ranks.scratch / "checkpoints",
            digest=json_digest([*deciding, data_digest]),
            keep=training.keep_checkpoints,
            rank=ranks.rank,
            world_size=ranks.world_size,
        ),
        journal=Journal(ranks.scratch / HISTORY, training.steps, enabled=ranks.is_main),
        rate_scale=lambda name: ratio if adapters.is_output_matrix(name) else 1.0,
    )


if __name__ == "__main__":
    run_rank(train, sys.argv)
