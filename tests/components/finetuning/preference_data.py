"""Pairs of answers, configurations and runs for the tests of preference tuning."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from modelmill.components.core.manifest import Manifest
from modelmill.components.core.step import StepResult
from modelmill.components.core.weights import weights_digest
from modelmill.components.data.instruction_packing import TokenStore
from modelmill.components.data.preference_rows import write_pairs
from modelmill.components.finetuning.dpo import dpo, train
from modelmill.components.finetuning.dpo_config import DpoConfig
from modelmill.components.training.launch import LAUNCHED_VARIABLE
from tests.components.finetuning.samples import ADAPTER, LENGTH, MEDIUM, VOCAB, model_manifest
from tests.components.training.runs import Here
from tests.components.training.samples import TRAINING


def make_preferences(folder: Path, *, pairs: int = 60, longest: int = LENGTH + 1) -> Manifest:
    """A prompt of random tokens; the chosen answer counts on from its last one, the rejected one counts down."""
    folder.mkdir(parents=True)
    scratch = folder.parent / f"{folder.name}-scratch"
    scratch.mkdir()
    generator = np.random.default_rng(7)
    counts: dict[str, int] = {"vocab_size": VOCAB, "sequence_length": LENGTH}
    for split, number in (("train", pairs), ("validation", 15), ("test", 10)):
        store = TokenStore(scratch, split, np.dtype("<u2"))
        for _ in range(number):
            prompt = generator.integers(1, VOCAB, generator.integers(2, 7))
            for sign in (1, -1):
                steps = np.arange(1, generator.integers(2, longest - 8))
                tokens = np.concatenate([prompt, (prompt[-1] + sign * steps) % VOCAB])
                store.append(tokens, np.arange(len(tokens)) >= len(prompt))
        rows = write_pairs(store, folder / split, LENGTH + 1, 0)
        records = [
            {"id": f"{split}-{n}", "source": 0, "prompt": [], "chosen": "", "rejected": ""} for n in range(number)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        counts |= {f"{split}_pairs": number, f"{split}_rows": len(rows)}
        counts |= {f"{split}_tokens": int(rows.places[:, 2].sum()), f"{split}_targets": int(rows.targets.sum())}
    return Manifest.describe(folder, kind="preferences", counts=counts, metadata={"template": {"kind": "test"}})


def dpo_config(**changes: Any) -> DpoConfig:
    """A section; what is no field of it changes `training`."""
    own = {name: changes.pop(name) for name in ("method", "adapter", "objective") if name in changes}
    adapter = own.pop("adapter", {} if own.get("method") == "full" else ADAPTER)
    training = {**TRAINING, **MEDIUM, "learning_rate": 2e-3, "min_learning_rate": 2e-4, **changes}
    return DpoConfig.model_validate({"adapter": adapter, "training": training, **own})


def job_spec(config: DpoConfig, base: Path, preferences: Manifest, output: Path) -> dict[str, Any]:
    """What the step gives to its ranks."""
    os.environ.setdefault(LAUNCHED_VARIABLE, repr(time.time()))
    output.mkdir(parents=True, exist_ok=True)
    return {
        "base": {"folder": str(base), "digest": weights_digest(base), "name": "base"},
        "method": config.method,
        "adapter": config.adapter.model_dump(mode="json"),
        "quantization": config.quantization.model_dump(mode="json"),
        "objective": config.objective.model_dump(mode="json"),
        "preferences": preferences.model_dump(mode="json"),
        "output": str(output),
    }


def run(config: DpoConfig, scratch: Path, preferences: Manifest, base: Path) -> tuple[Manifest, StepResult]:
    """The step, and the manifest that it becomes."""
    output = scratch / "data"
    output.mkdir(parents=True, exist_ok=True)
    result = dpo(config, output, preferences=preferences, base=model_manifest(base), launcher=Here(train))
    return Manifest.describe(output, kind=result.kind, counts=result.counts, metadata=result.metadata), result
