"""Tuning on preferences: the step, and what each of its training processes does.

As in fine-tuning, the step's own process stays without torch. `python -m modelmill.components.finetuning.dpo JOB.json`
is a rank.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from modelmill.components.core.manifest import Manifest, json_digest
from modelmill.components.core.step import StepResult, step_options
from modelmill.components.data.preference_rows import PreferenceSource, open_preferences
from modelmill.components.finetuning.base import open_base, read_model_config
from modelmill.components.finetuning.dpo_config import DpoConfig, PreferenceObjectiveConfig
from modelmill.components.finetuning.job import announce, check_fit, refuse_missing_packages, run_job
from modelmill.components.training.config import TrainingConfig
from modelmill.components.training.journal import HISTORY
from modelmill.components.training.launch import Launcher, TrainingResult, current_launcher
from modelmill.components.training.worker import RankContext, run_rank

if TYPE_CHECKING:
    from modelmill.components.finetuning.causal_lm import SupervisedModel
    from modelmill.components.finetuning.rank import Goal

MODULE = "modelmill.components.finetuning.dpo"


@step_options(resumable=True, launches=True)
def dpo(
    config: DpoConfig, output: Path, *, preferences: Manifest, base: Manifest, launcher: Launcher | None = None
) -> StepResult:
    """Tune a causal language model, or an adapter for it, to prefer one answer of each pair over the other.

    Writes `adapter/` (in the form of `peft`) or with method full `model/` (a Hugging Face folder with the base's
    tokenizer), and `history.jsonl`. That counts in `pairs`, and beside the losses stand `reward_chosen`,
    `reward_rejected`, `reward_margin` and `reward_accuracy` (the share of pairs whose chosen answer has the higher
    reward) of the step's batch, with `validation_` before their names those of the validation pairs.
    Checkpoints and the base's log-probabilities lie beside `output`; a second call goes on from the newest.

    Args:
        config: method, objective and training.
        output: the artifact's folder.
        preferences: manifest of `prepare_preferences`, made with the base's tokenizer.
        base: manifest of the model to start from, which is also the reference.
        launcher: where the training processes run; default this machine.

    Returns:
        kind `adapter` or `model`; metadata `base_digest` (of the base's weights), `base`, `method`, `weights_digest`,
        `dataset_digest`, `template`, `objective`.

    Raises:
        UserError: base, data, adapter and machine do not fit together, or training diverged.
        TrainingStoppedError: it was told to stop.
        RankFailedError: a training process crashed.
    """
    place = launcher or current_launcher()
    refuse_missing_packages(config.method)
    found = open_base(base)
    splits = {split: open_preferences(preferences, split) for split in ("train", "validation")}  # verified once
    check_fit(read_model_config(found), config.training, preferences, "pairs")
    place.check(config.training)
    objective = config.objective.model_dump(mode="json")
    announce(
        config,
        preferences,
        base=found,
        unit="pairs",
        objective=objective,
        sizes={"longest": int(splits["train"].sizes.max())},
        profile=("pairs", "targets"),
    )
    spec = {"objective": objective}
    result = run_job(MODULE, config, output, base=found, data=preferences, spec=spec, launcher=place)
    return StepResult(result.kind, result.counts, result.metrics, {**result.metadata, "objective": objective})


def train(ranks: RankContext, spec: Mapping[str, Any], training: TrainingConfig) -> TrainingResult:
    """What one rank does: load, adapt, compute the reference, train, and take part in the export."""
    from modelmill.components.finetuning.dpo_objective import PreferenceModel
    from modelmill.components.finetuning.rank import train_rank

    preferences = Manifest.model_validate(spec["preferences"])
    return train_rank(
        ranks,
        spec,
        training,
        model_class=PreferenceModel,
        packed=False,
        decided_by=[preferences.digest, spec["objective"]],
        make_goal=lambda model: _goal(model, preferences, ranks, spec, training),
    )


def _goal(
    model: SupervisedModel,
    preferences: Manifest,
    ranks: RankContext,
    spec: Mapping[str, Any],
    training: TrainingConfig,
) -> Goal:
    from modelmill.components.finetuning.dpo_journal import PreferenceJournal
    from modelmill.components.finetuning.dpo_objective import (
        PreferenceBatches,
        PreferenceModel,
        PreferenceObjective,
        pack_pairs,
    )
    from modelmill.components.finetuning.dpo_reference import reference_log_probs
    from modelmill.components.finetuning.rank import Goal
    from modelmill.components.training.loop import TrainingData

    assert isinstance(model, PreferenceModel)
    rows, held_out = open_preferences(preferences, "train"), open_preferences(preferences, "validation")
    source = PreferenceSource(rows, training.seed, training.global_batch_size)
    checked = np.arange(min(training.validation_rows, len(held_out)))
    needed = _needed(source, training)
    depends = [
        spec["base"]["digest"],
        spec["method"],
        spec["quantization"],
        preferences.digest,
        training.precision,
        training.attention,
    ]
    key = json_digest([*depends, needed.tolist(), len(checked)])
    reference = reference_log_probs(model, [(rows, needed), (held_out, checked)], ranks, training, key)
    objective = PreferenceObjective(
        PreferenceObjectiveConfig.model_validate(spec["objective"]), reference, len(rows), training.accumulation_steps
    )
    validation = pack_pairs(held_out, checked, held_out.width(checked), first=len(rows))
    return Goal(
        objective=objective,
        data=TrainingData(
            PreferenceBatches(source, training.global_batch_size), validation, np.ones(len(checked), np.int64)
        ),
        journal=PreferenceJournal(ranks.scratch / HISTORY, training.steps, objective, ranks),
        unit="pairs",
    )


def _needed(source: PreferenceSource, training: TrainingConfig) -> np.ndarray:
    """Numbers of the training pairs that the run will meet, rising."""
    everything = np.arange(len(source.rows))
    # A rollback goes on with batches further on; how far is not known yet.
    if training.stability.action == "rollback" or training.steps * training.global_batch_size >= len(everything):
        return everything
    return np.unique(np.concatenate([source.indices(step) for step in range(training.steps)]))


if __name__ == "__main__":
    run_rank(train, sys.argv)
