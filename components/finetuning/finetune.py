"""Fine-tuning: the step, and what each of its training processes does.

As in pretraining, the step's own process stays without torch: it finds base and data and has a launcher start this
module once a rank. `python -m modelmill.components.finetuning.finetune JOB.json` is a rank.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modelmill.components.core.errors import UserError
from modelmill.components.core.manifest import Manifest
from modelmill.components.core.step import StepResult, step_options
from modelmill.components.data.instruction_rows import open_instructions
from modelmill.components.finetuning.base import open_base, read_model_config
from modelmill.components.finetuning.config import FinetuneConfig
from modelmill.components.finetuning.job import announce, check_fit, refuse_missing_packages, run_job
from modelmill.components.training.config import TrainingConfig
from modelmill.components.training.journal import HISTORY, Journal
from modelmill.components.training.launch import Launcher, TrainingResult, current_launcher
from modelmill.components.training.worker import RankContext, run_rank

MODULE = "modelmill.components.finetuning.finetune"


@step_options(resumable=True, launches=True)
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
        `dataset_digest`, `template`, and of method qlora `quantization`: how the base was rounded.

    Raises:
        UserError: base, data, adapter and machine do not fit together, or training diverged.
        TrainingStoppedError: it was told to stop.
        RankFailedError: a training process crashed.
    """
    place = launcher or current_launcher()
    refuse_missing_packages(config.method)
    found = open_base(base)
    if instructions.kind != "instructions":
        raise UserError(f"instructions: {instructions.uri} is of kind {instructions.kind}; run prepare_instructions")
    check_fit(read_model_config(found), config.training, instructions, "rows")
    place.check(config.training)
    for split in ("train", "validation"):
        open_instructions(instructions, split)  # verified once here; the ranks find it verified
    announce(
        config,
        instructions,
        base=found,
        unit="rows",
        objective={},
        sizes={"train_targets": instructions.counts["train_targets"]},
        profile=("conversations", "rows", "targets"),
    )
    return run_job(MODULE, config, output, base=found, data=instructions, spec={}, launcher=place)


def train(ranks: RankContext, spec: Mapping[str, Any], training: TrainingConfig) -> TrainingResult:
    """What one rank does: load, adapt, train, and take part in the export that rank 0 writes."""
    from modelmill.components.finetuning.causal_lm import (
        SupervisedBatches,
        SupervisedModel,
        stack_rows,
        supervised_loss,
    )
    from modelmill.components.finetuning.rank import Goal, train_rank
    from modelmill.components.training.loop import TrainingData

    instructions = Manifest.model_validate(spec["instructions"])
    rows, held_out = open_instructions(instructions, "train"), open_instructions(instructions, "validation")
    batches = SupervisedBatches(rows, training.seed, training.global_batch_size)
    validation = stack_rows(held_out.take(slice(0, training.validation_rows)))
    goal = Goal(
        objective=supervised_loss,
        data=TrainingData(batches, validation, held_out.targets[: len(validation)]),
        journal=Journal(ranks.scratch / HISTORY, training.steps, enabled=ranks.is_main),
    )
    return train_rank(
        ranks,
        spec,
        training,
        model_class=SupervisedModel,
        packed=any(len(split.places) > len(split) for split in (rows, held_out)),
        decided_by=[instructions.digest],
        make_goal=lambda model: goal,
    )


if __name__ == "__main__":
    run_rank(train, sys.argv)
