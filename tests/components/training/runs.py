"""Training loops over a small Llama, for one rank in the test's process and for the ranks of a launched job."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from modelmill.components.core.manifest import Manifest
from modelmill.components.data.loader import BatchSource, open_rows
from modelmill.components.llama.config import LlamaConfig
from modelmill.components.llama.model import LlamaDecoder
from modelmill.components.llama.pretrain import next_token_loss
from modelmill.components.training.accelerator import CPU
from modelmill.components.training.checkpoint import Checkpoints
from modelmill.components.training.config import TrainingConfig
from modelmill.components.training.feed import Batches
from modelmill.components.training.journal import Journal
from modelmill.components.training.launch import LocalLauncher, TrainingJob, TrainingResult
from modelmill.components.training.loop import Objective, TrainingData, TrainingLoop
from modelmill.components.training.mesh import Mesh
from modelmill.components.training.prepare import prepare
from modelmill.components.training.worker import (
    RankContext,
    RankFunction,
    StopRequestedError,
    StopSignal,
    run_rank,
)
from tests.components.training.samples import MODEL, VOCAB, training_config

MODULE = "tests.components.training.runs"


def single_rank(scratch: Path) -> RankContext:
    """The context of a run that is not launched."""
    return RankContext(0, 1, Mesh(), torch.device("cpu"), CPU(), StopSignal(1), scratch)


class Here(LocalLauncher):
    """A launcher whose one rank is this process.

    Args:
        function: what the job's module runs in each process.
    """

    def __init__(self, function: RankFunction) -> None:
        super().__init__()
        self.function = function

    def launch(self, job: TrainingJob) -> TrainingResult:
        return self.function(single_rank(job.scratch), dict(job.spec), job.training)


class Stopping:
    """The batches of another source; asking for those of one step tells this rank to stop."""

    def __init__(self, source: Batches, step: int, stop: StopSignal) -> None:
        self.source, self.step, self.stop = source, step, stop

    def batch(self, step: int, rank: int, world: int) -> np.ndarray:
        if step == self.step:
            self.stop.received = True
        return self.source.batch(step, rank, world)


def make_loop(
    tokens: Manifest,
    training: TrainingConfig,
    ranks: RankContext,
    *,
    dtype: torch.dtype = torch.float32,
    stop_in: int | None = None,
) -> TrainingLoop:
    """A loop over the sample model.

    Args:
        tokens: packed rows.
        training: the training section.
        ranks: whose scratch folder takes checkpoints and history.
        dtype: of the parameters.
        stop_in: step, from 0, while which this rank is told to stop.
    """
    config = LlamaConfig.model_validate({**MODEL, "vocab_size": VOCAB})
    batches: Batches = BatchSource(open_rows(tokens, "train"), training.seed, training.global_batch_size)
    if stop_in is not None:
        batches = Stopping(batches, stop_in, ranks.stop)
    ranks.scratch.mkdir(parents=True, exist_ok=True)
    model = LlamaDecoder(config, device="meta", dtype=dtype)
    prepare(model, ranks, training)
    model.to_empty(device=ranks.device)
    model.init_weights(training.seed)
    return assemble(model, next_token_loss, batches, tokens, training, ranks)


def assemble(
    model: torch.nn.Module,
    objective: Objective,
    batches: Batches,
    tokens: Manifest,
    training: TrainingConfig,
    ranks: RankContext,
) -> TrainingLoop:
    """A loop that checkpoints and keeps its history below the ranks' scratch folder."""
    return TrainingLoop(
        model=model,
        objective=objective,
        data=TrainingData(batches, open_rows(tokens, "validation")),
        config=training,
        ranks=ranks,
        checkpoints=Checkpoints(
            ranks.scratch / "checkpoints",
            digest=json.dumps(training.deciding()),
            keep=2,
            rank=ranks.rank,
            world_size=ranks.world_size,
        ),
        journal=Journal(ranks.scratch / "history.jsonl", training.steps, enabled=ranks.is_main),
    )


def history(scratch: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (scratch / "history.jsonl").read_text().splitlines()]


def digest(model: torch.nn.Module) -> str:
    """Of the bits of all parameters."""
    found = hashlib.sha256()
    for parameter in model.parameters():
        found.update(parameter.detach().numpy().tobytes())
    return found.hexdigest()


def _scenarios(ranks: RankContext, tokens: Manifest) -> Iterator[tuple[str, dict[str, Any]]]:
    """What is measured with all ranks of one launch: name and findings of each scenario."""
    root = ranks.scratch
    for name, dtype, changes in (
        ("float64", torch.float64, {}),
        ("accumulated", torch.float64, {"micro_batch_size": 1}),
        ("first", torch.float32, {}),
        ("again", torch.float32, {}),
    ):
        ranks.scratch = root / name
        loop = make_loop(tokens, training_config(**changes), ranks, dtype=dtype)
        loop.run()
        yield name, {"digest": digest(loop.model)}
    ranks.scratch = root / "one bad loss"
    loop = make_loop(tokens, training_config(validation_rows=0), ranks)
    yield "one bad loss", {"digests": _digests_with_one_bad_loss(loop, rank=1, step=4)}
    ranks.scratch = root / "rolled back"
    stability = {"action": "rollback", "window": 3, "spike_margin": 5.0, "rollback_skip_batches": 2}
    loop = make_loop(tokens, training_config(stability=stability), ranks)
    loop.objective = lambda model, rows: next_token_loss(model, rows) * (1000 if loop.progress.cursor == 4 else 1)
    loop.run()
    yield "rolled back", {"digest": digest(loop.model), "cursor": loop.progress.cursor}
    ranks.scratch = root / "stopped"
    # Only one rank hears the signal; all of them must leave after the same step.
    loop = make_loop(tokens, training_config(), ranks, stop_in=4 if ranks.rank == 1 else None)
    try:
        loop.run()
        yield "stopped", {}
    except StopRequestedError as stop:
        yield "stopped", {"message": str(stop), "step": loop.progress.step}
    ranks.stop = StopSignal(ranks.world_size)
    loop = make_loop(tokens, training_config(), ranks)
    loop.run()
    yield "resumed", {"digest": digest(loop.model)}
    yield "process", {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"), "torch_threads": torch.get_num_threads()}


def _digests_with_one_bad_loss(loop: TrainingLoop, *, rank: int, step: int) -> list[str]:
    """Of the weights before each step and at the end; one rank's loss is infinite in a step, its gradient finite."""
    digests: list[str] = []

    def objective(model: torch.nn.Module, rows: torch.Tensor) -> torch.Tensor:
        if len(digests) == loop.progress.step:  # the step's first micro-batch
            digests.append(digest(loop.model))
        loss = next_token_loss(model, rows)
        return loss + float("inf") if (loop.ranks.rank, loop.progress.step + 1) == (rank, step) else loss

    loop.objective = objective
    loop.run()
    return [*digests, digest(loop.model)]


def measure(ranks: RankContext, spec: dict[str, Any], training: TrainingConfig) -> TrainingResult:
    """Every scenario, and what every rank found."""
    import torch.distributed as dist

    found = dict(_scenarios(ranks, Manifest.model_validate(spec["tokens"])))
    every: list[Any] = [None] * ranks.world_size
    dist.all_gather_object(every, found)
    return TrainingResult(counts={"world_size": training.parallel.world_size}, metadata={"ranks": every})


if __name__ == "__main__":
    run_rank(measure, sys.argv)
