"""Preference tunings on the ranks of one launched job: every layout, and one that is stopped and goes on."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from modelmill.components.core.manifest import Manifest
from modelmill.components.finetuning.dpo import train
from modelmill.components.training.config import TrainingConfig
from modelmill.components.training.launch import TrainingResult
from modelmill.components.training.layout import ParallelConfig
from modelmill.components.training.mesh import Mesh
from modelmill.components.training.worker import RankContext, StopRequestedError, StopSignal, run_rank
from tests.components.finetuning.preference_data import dpo_config, job_spec
from tests.components.finetuning.runs import StopAfter

MODULE = "tests.components.finetuning.dpo_runs"
COPIES, SHARDS = {"processes_per_node": 2}, {"processes_per_node": 2, "shard": 2}
DROPOUT: dict[str, Any] = {"method": "dora", "adapter": {"rank": 4, "dropout": 0.2}, "parallel": SHARDS}
SCENARIOS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora on copies": ("exact", {"parallel": COPIES}),
    "lora on shards": ("exact", {"parallel": SHARDS}),
    "lora in other cuts": ("exact", {"parallel": SHARDS, "micro_batch_size": 1, "activation_memory": "full"}),
    "full on shards": ("exact", {"parallel": SHARDS, "method": "full"}),
    "tied on shards": ("tied", {"parallel": SHARDS, "method": "full", "objective": {"sft_weight": 0.3}}),
    "half on shards": ("half", {"parallel": SHARDS, "precision": "bf16-mixed"}),
    "bf16 weights on shards": ("half", {"parallel": SHARDS, "precision": "bf16-stochastic"}),
    "dropout": ("llama", DROPOUT),
}


def measure(ranks: RankContext, spec: dict[str, Any], training: TrainingConfig) -> TrainingResult:
    """Every scenario in a folder of its own name; what it gives out lies there."""
    preferences, root = Manifest.model_validate(spec["preferences"]), ranks.scratch
    meshes = {shard: Mesh.build(ParallelConfig(processes_per_node=2, shard=shard), "cpu") for shard in (1, 2)}
    found: dict[str, Any] = {}

    def run(name: str, base: str, changes: dict[str, Any], stop: StopSignal) -> None:
        config, folder = dpo_config(**changes), Path(spec[base])
        scratch = root / name
        scratch.mkdir(exist_ok=True)
        mesh = meshes[config.training.parallel.shard]
        context = replace(ranks, mesh=mesh, stop=stop, scratch=scratch)
        found[name] = train(context, job_spec(config, folder, preferences, scratch / "data"), config.training).counts

    for name, (base, changes) in SCENARIOS.items():
        run(name, base, changes, ranks.stop)
    try:
        run("stopped", "llama", DROPOUT, StopAfter(2, calls=2, mine=ranks.rank == 1))
    except StopRequestedError as stop:
        found["message"] = str(stop)
    run("stopped", "llama", DROPOUT, ranks.stop)
    return TrainingResult(metadata={"found": found})


if __name__ == "__main__":
    run_rank(measure, sys.argv)
