"""Batches of packed rows as a pure function of (seed, step, data set).

A batch depends neither on how many processes share it nor on what was read before, so a run resumes at any step, on
any number of ranks, by that one number. Nothing here needs torch; `torch.from_numpy` takes a batch without a copy.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from modelmill.components.core.errors import UserError
from modelmill.components.core.manifest import Manifest
from modelmill.components.data.permutation import Permutation


def open_rows(tokens: Manifest, split: str) -> np.ndarray:
    """Memory-map a split of packed tokens: uint16 or uint32 [rows, sequence_length + 1].

    Row `i`'s first `sequence_length` tokens are the inputs and its last ones, shifted by one, the targets.

    Args:
        tokens: manifest of `pack_tokens`.
        split: `train`, `validation` or `test`.

    Raises:
        UserError: no such split, or the file is missing, truncated or not what was written.
    """
    path = tokens.path(f"{split}.bin")
    shape = (tokens.counts[f"{split}_rows"], tokens.counts["sequence_length"] + 1)
    dtype = np.dtype(tokens.metadata["dtype"]).newbyteorder("<")
    if path.stat().st_size != shape[0] * shape[1] * dtype.itemsize:
        raise UserError(f"tokens: {path} does not hold {shape[0]} rows of {shape[1]} tokens; run pack_tokens again")
    return np.memmap(path, dtype=dtype, mode="r", shape=shape)


class BatchSource:
    """Shuffled batches over rows, without end: every epoch uses each row once, in an order of its own.

    Args:
        rows: [rows, sequence_length + 1], from `open_rows`.
        seed: decides the order.
        global_batch_size: rows an optimizer step uses on all ranks together.
    """

    def __init__(self, rows: np.ndarray, seed: int, global_batch_size: int) -> None:
        if global_batch_size < 1:
            raise ValueError(f"global_batch_size: {global_batch_size} rows make no batch; give at least 1")
        self._rows = rows
        self._seed = seed
        self._permutation = lru_cache(maxsize=2)(lambda epoch: Permutation(len(rows), seed, epoch))
        self.global_batch_size = global_batch_size

    def indices(self, step: int) -> np.ndarray:
        """Row numbers (int64 [global_batch_size]) of the global batch of a step, counted from 0.

        A batch may begin in one epoch and end in the next.
        """
        first = step * self.global_batch_size
        places = np.arange(first, first + self.global_batch_size, dtype=np.int64)
        epochs, positions = np.divmod(places, len(self._rows))
        chosen = np.empty_like(positions)
        for epoch in np.unique(epochs):
            inside = epochs == epoch
            chosen[inside] = self._permutation(int(epoch))(positions[inside])
        return chosen

    def indices_of(self, step: int, rank: int, world: int) -> np.ndarray:
        """Row numbers of a rank's share of a step's global batch: int64 [global_batch_size / world].

        Ranks hold consecutive parts: joined in rank order they are the same batch for every world size.

        Raises:
            ValueError: the batch cannot be shared evenly, or there is no such rank.
        """
        if self.global_batch_size % world:
            raise ValueError(f"global_batch_size: {self.global_batch_size} is not a multiple of {world} ranks")
        if not 0 <= rank < world:
            raise ValueError(f"rank: {rank} is outside 0..{world - 1}")
        share = self.global_batch_size // world
        return self.indices(step)[rank * share : (rank + 1) * share]

    def batch(self, step: int, rank: int = 0, world: int = 1) -> np.ndarray:
        """A rank's share of a step's global batch: int64 [global_batch_size / world, sequence_length + 1].

        Raises:
            ValueError: see `indices_of`.
        """
        return self._rows[self.indices_of(step, rank, world)].astype(np.int64)
