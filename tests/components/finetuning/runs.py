"""Fine-tunings on the ranks of one launched job: every layout, and one that is stopped and goes on."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from modelmill.components.core.manifest import Manifest
from modelmill.components.finetuning.finetune import train
from modelmill.components.training.config import TrainingConfig
from modelmill.components.training.launch import TrainingResult
from modelmill.components.training.layout import ParallelConfig
from modelmill.components.training.mesh import Mesh
from modelmill.components.training.worker import RankContext, StopRequestedError, StopSignal, run_rank
from tests.components.finetuning.samples import finetune_config, job_spec

MODULE = "tests.components.finetuning.runs"
COPIES, SHARDS = {"processes_per_node": 2}, {"processes_per_node": 2, "shard": 2}
DROPOUT: dict[str, Any] = {"method": "dora", "adapter": {"rank": 4, "dropout": 0.2}, "parallel": SHARDS}
SCENARIOS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora on copies": ("exact", {"parallel": COPIES}),
    "lora on shards": ("exact", {"parallel": SHARDS}),
    "lora in other cuts": ("exact", {"parallel": SHARDS, "micro_batch_size": 1, "activation_memory": "full"}),
    "dora on shards": ("exact", {"parallel": SHARDS, "method": "dora"}),
    "full on shards": ("exact", {"parallel": SHARDS, "method": "full"}),
    "tied on shards": ("tied", {"parallel": SHARDS, "method": "full"}),
    "lora on llama shards": ("llama", {"parallel": SHARDS}),
    "half on shards": ("half", {"parallel": SHARDS, "precision": "bf16-mixed"}),
    "half on copies": ("half", {"parallel": COPIES, "precision": "bf16-mixed"}),
    "bf16 weights on shards": ("llama", {"parallel": SHARDS, "precision": "bf16-stochastic"}),
    "qlora on copies": ("llama", {"parallel": COPIES, "method": "qlora"}),
    "qlora on shards": ("llama", {"parallel": SHARDS, "method": "qlora"}),
    "qlora half on shards": ("half", {"parallel": SHARDS, "method": "qlora", "precision": "bf16-mixed"}),
    "dora half on shards": ("half", {"parallel": SHARDS, "method": "dora", "precision": "bf16-mixed"}),
    "dropout": ("llama", DROPOUT),
}


class StopAfter(StopSignal):
    """One rank is told to stop when it is asked the n-th time."""

    def __init__(self, world_size: int, calls: int, mine: bool) -> None:
        super().__init__(world_size)
        self._calls, self._mine = calls, mine

    def requested(self) -> bool:
        self._calls -= 1
        self.received = self.received or (self._mine and self._calls <= 0)
        return super().requested()


Train = Callable[[RankContext, str, dict[str, Any], Path], dict[str, int]]


def measure_all(
    ranks: RankContext, scenarios: Mapping[str, tuple[str, dict[str, Any]]], train_one: Train
) -> TrainingResult:
    """Every scenario in a folder of its own name, where what it gives out lies; `dropout` also stopped on its way.

    Args:
        ranks: of the job.
        scenarios: name to base and changes of the section; one is called dropout.
        train_one: trains a base with changes, and puts what it gives out into a folder.
    """
    meshes = {shard: Mesh.build(ParallelConfig(processes_per_node=2, shard=shard), "cpu") for shard in (1, 2)}
    found: dict[str, Any] = {}

    def run(name: str, base: str, changes: dict[str, Any], stop: StopSignal) -> None:
        scratch = ranks.scratch / name
        scratch.mkdir(exist_ok=True)
        mesh = meshes[changes["parallel"].get("shard", 1)]
        context = replace(ranks, mesh=mesh, stop=stop, scratch=scratch)
        found[name] = train_one(context, base, changes, scratch / "data")

    for name, (base, changes) in scenarios.items():
        run(name, base, changes, ranks.stop)
    base, changes = scenarios["dropout"]
    try:
        run("stopped", base, changes, StopAfter(2, calls=2, mine=ranks.rank == 1))
    except StopRequestedError as stop:
        found["message"] = str(stop)
    run("stopped", base, changes, ranks.stop)
    return TrainingResult(metadata={"found": found})


def measure(ranks: RankContext, spec: dict[str, Any], training: TrainingConfig) -> TrainingResult:
    """Every fine-tuning."""
    instructions = Manifest.model_validate(spec["instructions"])

    def train_one(context: RankContext, base: str, changes: dict[str, Any], output: Path) -> dict[str, int]:
        config = finetune_config(**changes)
        return train(context, job_spec(config, Path(spec[base]), instructions, output), config.training).counts

    return measure_all(ranks, SCENARIOS, train_one)


if __name__ == "__main__":
    run_rank(measure, sys.argv)
