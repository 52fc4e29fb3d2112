"""Training in this process, as the one rank of a job, and what it leaves."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist

from modelmill.components.core.manifest import Manifest
from modelmill.components.embedding import contrastive
from modelmill.components.embedding.config import EmbeddingTrainingConfig
from modelmill.components.training.accelerator import CPU
from modelmill.components.training.launch import LAUNCHED_VARIABLE, TrainingResult
from modelmill.components.training.mesh import Mesh
from modelmill.components.training.worker import RankContext, StopSignal


@pytest.fixture
def one_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A process group of this process alone."""
    monkeypatch.setenv(LAUNCHED_VARIABLE, "0")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class StopAfter(StopSignal):
    """A request to stop that comes with a step."""

    def __init__(self, step: int | None) -> None:
        super().__init__(1)
        self._left = step

    def requested(self) -> bool:
        if self._left is not None:
            self._left -= 1
        return self._left is not None and self._left <= 0


@dataclass(frozen=True)
class Run:
    """What a training left."""

    result: TrainingResult
    folder: Path

    @property
    def history(self) -> list[dict[str, float]]:
        return [json.loads(line) for line in (self.folder / "history.jsonl").read_text().splitlines()]

    @property
    def losses(self) -> list[float]:
        return [record["loss"] for record in self.history if "loss" in record]


def train(
    scratch: Path, pairs: Manifest, base: Manifest, *, stop_after: int | None = None, steps: int = 8, **config: Any
) -> Run:
    """Train in a scratch folder, or go on where one was stopped."""
    output = scratch / "data"
    output.mkdir(parents=True, exist_ok=True)
    settings = {"batch_size": 16, "learning_rate": 1e-3, "log_every": 1, "accelerator": "cpu", **config}
    section = EmbeddingTrainingConfig(steps=steps, **settings)
    ranks = RankContext(0, 1, cast(Mesh, None), torch.device("cpu"), CPU(), StopAfter(stop_after), scratch)
    return Run(contrastive.train(ranks, section, pairs, Path(base.uri) / "model", output, steps), output)
