"""Preference tunings on the ranks of one launched job: every layout, and one that is stopped and goes on."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from modelmill.components.core.manifest import Manifest
from modelmill.components.finetuning.dpo import train
from modelmill.components.training.config import TrainingConfig
from modelmill.components.training.launch import TrainingResult
from modelmill.components.training.worker import RankContext, run_rank
from tests.components.finetuning.preference_data import dpo_config, job_spec
from tests.components.finetuning.runs import COPIES, DROPOUT, SHARDS, measure_all

MODULE = "tests.components.finetuning.dpo_runs"
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
    """Every preference tuning."""
    preferences = Manifest.model_validate(spec["preferences"])

    def train_one(context: RankContext, base: str, changes: dict[str, Any], output: Path) -> dict[str, int]:
        config = dpo_config(**changes)
        return train(context, job_spec(config, Path(spec[base]), preferences, output), config.training).counts

    return measure_all(ranks, SCENARIOS, train_one)


if __name__ == "__main__":
    run_rank(measure, sys.argv)
