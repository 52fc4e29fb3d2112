"""What a rank reads: its rows of every global batch, fetched one step ahead."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from modelmill.components.training.worker import RankContext


class Batches(Protocol):
    """Rows of the training split in the order of training; `BatchSource` is one."""

    def batch(self, step: int, rank: int, world: int) -> np.ndarray:
        """This data-parallel rank's rows [global_batch_size / world, ...] of the global batch of a step from 0."""


@runtime_checkable
class WeightedBatches(Batches, Protocol):
    """Rows that hold different numbers of targets, as masked ones do."""

    def targets(self, step: int) -> int:
        """Targets in the global batch of a step, on all ranks together; at least 1, and told without asking them."""


class Feed:
    """This rank's rows step by step as int64 tensors [b, ...], the next ones fetched while a step computes.

    With them the targets of the whole global batch, or None where every row holds as many.
    """

    def __init__(self, batches: Batches, ranks: RankContext, steps: range) -> None:
        self._batches, self._ranks, self._steps = batches, ranks, iter(steps)
        self._pin = ranks.device.type == "cuda"
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
        self._coming = self._fetch()

    def _fetch(self) -> Future[tuple[Tensor, int | None]] | None:
        step = next(self._steps, None)
        return None if step is None else self._worker.submit(self._load, step)

    def _load(self, step: int) -> tuple[Tensor, int | None]:
        rows = self._batches.batch(step, self._ranks.data_rank, self._ranks.data_degree)
        tensor = torch.from_numpy(np.ascontiguousarray(rows, dtype=np.int64))
        targets = self._batches.targets(step) if isinstance(self._batches, WeightedBatches) else None
        return tensor.pin_memory() if self._pin else tensor, targets

    def __next__(self) -> tuple[Tensor, int | None]:
        if self._coming is None:
            raise StopIteration
        loaded = self._coming.result()
        self._coming = self._fetch()
        return loaded

    def __enter__(self) -> Feed:
        return self

    def __exit__(self, *_: object) -> None:
        self._worker.shutdown(cancel_futures=True)
