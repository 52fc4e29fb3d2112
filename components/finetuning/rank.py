"""What a rank does in tuning, whatever is minimised: load, adapt, train, and take part in the export."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from modelmill.components.core import events
from modelmill.components.core.manifest import json_digest
from modelmill.components.core.weights import weights_digest
from modelmill.components.finetuning import trained_model
from modelmill.components.finetuning.causal_lm import SupervisedModel
from modelmill.components.finetuning.config import AdapterConfig
from modelmill.components.training.checkpoint import Checkpoints
from modelmill.components.training.config import TrainingConfig
from modelmill.components.training.journal import HISTORY, Journal
from modelmill.components.training.launch import LAUNCHED_VARIABLE, TrainingResult
from modelmill.components.training.loop import Objective, TrainingData, TrainingLoop
from modelmill.components.training.prepare import prepare
from modelmill.components.training.worker import RankContext


@dataclass(frozen=True)
class Goal:
    """What is trained for.

    Attributes:
        objective: what is minimised.
        data: rows of both splits.
        journal: where points go, `history.jsonl` in the rank's scratch folder.
        unit: what `Progress.tokens` counts, the targets of `data.batches`: tokens or pairs.
    """

    objective: Objective
    data: TrainingData
    journal: Journal
    unit: str = "tokens"


def train_rank(
    ranks: RankContext,
    spec: Mapping[str, Any],
    training: TrainingConfig,
    *,
    model_class: type[SupervisedModel],
    packed: bool,
    decided_by: Sequence[Any],
    make_goal: Callable[[SupervisedModel], Goal],
) -> TrainingResult:
    """Train a base, or adapters for it, and export what was trained.

    Args:
        ranks: who this rank is.
        spec: of the job, from `job.run_job`.
        training: the section.
        model_class: what the loop calls, around the model of transformers.
        packed: whether rows hold more than one conversation.
        decided_by: what decides the weights besides base, method, adapter and training: data and objective.
        make_goal: called by all ranks together with the laid out model, which still computes what the base does.

    Returns:
        On every rank; complete on the main one, which has written the export.
    """
    events.progress("loading the base")
    model, names = trained_model.load(spec, training, packed=packed, device=ranks.device)
    sizes, described = trained_model.sizes(model), trained_model.describe(model, spec["method"])
    wrapped = model_class(model)
    prepare(wrapped, ranks, training)
    wrapped.to(ranks.device)
    goal = make_goal(wrapped)
    torch.manual_seed(training.seed + ranks.data_rank)  # dropout; a checkpoint keeps the state
    loop = _loop(wrapped, goal, ranks, spec, training, decided_by)
    start = time.time() - float(os.environ[LAUNCHED_VARIABLE])
    metrics = {"start_seconds": start, **_in_unit(loop.run(), goal.unit)}
    progress = {"steps": loop.progress.step, goal.unit: loop.progress.tokens, "world_size": ranks.world_size}
    began = time.perf_counter()
    folder = trained_model.export(wrapped, names, spec, wanted=ranks.is_main)
    result = TrainingResult(counts={**sizes, **progress}, metrics=metrics, metadata=described)
    if ranks.is_main:
        shutil.copyfile(ranks.scratch / HISTORY, Path(spec["output"]) / HISTORY)
        result.metrics["export_seconds"] = time.perf_counter() - began
        result.metadata["weights_digest"] = weights_digest(folder)
    return result


def _in_unit(metrics: Mapping[str, float], unit: str) -> dict[str, float]:
    """Throughput is told in what the loop counts as targets."""
    return {name.replace("tokens_per_second", f"{unit}_per_second"): value for name, value in metrics.items()}


def _loop(
    wrapped: SupervisedModel,
    goal: Goal,
    ranks: RankContext,
    spec: Mapping[str, Any],
    training: TrainingConfig,
    decided_by: Sequence[Any],
) -> TrainingLoop:
    full = spec["method"] == "full"
    ratio = 1.0 if full else AdapterConfig.model_validate(spec["adapter"]).learning_rate_ratio
    adapter = [None if full else spec["adapter"], spec["quantization"] if spec["method"] == "qlora" else None]
    deciding = [spec["base"]["digest"], spec["method"], *adapter, training.deciding()]
    return TrainingLoop(
        model=wrapped,
        objective=goal.objective,
        data=goal.data,
        config=training,
        ranks=ranks,
        checkpoints=Checkpoints(
            ranks.scratch / "checkpoints",
            digest=json_digest([*deciding, *decided_by]),
            keep=training.keep_checkpoints,
            rank=ranks.rank,
            world_size=ranks.world_size,
        ),
        journal=goal.journal,
        rate_scale=lambda name: ratio if trained_model.is_output_matrix(name) else 1.0,
    )
