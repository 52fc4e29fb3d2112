"""Batches of packed conversations with their loss masks, as a pure function of (seed, step, data set).

Like `loader.BatchSource`, which reads a corpus: nothing depends on how many processes share a batch or on what was
read before. Nothing here needs torch; `torch.from_numpy` takes the arrays without a copy.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from modelmill.components.core.errors import UserError
from modelmill.components.core.manifest import Manifest
from modelmill.components.data.loader import BatchSource

IGNORE = -100  # torch's cross_entropy passes over targets with this value


class InstructionBatch(NamedTuple):
    """Rows as a model takes them; each int64 [b, sequence_length].

    Attributes:
        tokens: inputs.
        targets: the token after each, or `IGNORE` where it is not to be learnt, ends its conversation or is padding.
        documents: number of the conversation in its row, rising from 0; padding is one more.
    """

    tokens: np.ndarray
    targets: np.ndarray
    documents: np.ndarray


def document_positions(documents: np.ndarray) -> np.ndarray:
    """Position of each token within its own document, int64 [b, T], from `InstructionBatch.documents`.

    Models of transformers take them as `position_ids`; without an attention mask they then keep documents apart.
    """
    places = np.arange(documents.shape[1])
    begins = np.zeros(documents.shape, np.int64)
    begins[:, 1:] = np.where(np.diff(documents, axis=1) != 0, places[1:], 0)
    return places - np.maximum.accumulate(begins, axis=1)


@dataclass(frozen=True)
class InstructionRows:
    """A split of packed conversations, mapped into memory.

    Attributes:
        tokens: ids, uint16 or uint32 [rows, sequence_length + 1].
        loss_mask: 1 where a token is a target, uint8, same shape.
        documents: number of the conversation in its row, uint16 or uint32, same shape.
        places: row, first position, tokens and targets of each conversation, int64 [conversations, 4], in the order
            of the lines of the split's `.jsonl`.
        targets: targets of each row, int32 [rows].
    """

    tokens: np.ndarray
    loss_mask: np.ndarray
    documents: np.ndarray
    places: np.ndarray
    targets: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)

    def take(self, rows: np.ndarray | slice) -> InstructionBatch:
        """The rows of these numbers as a model takes them."""
        tokens = self.tokens[rows].astype(np.int64)
        targets = np.where(self.loss_mask[rows][:, 1:] != 0, tokens[:, 1:], IGNORE)
        return InstructionBatch(tokens[:, :-1], targets, self.documents[rows][:, :-1].astype(np.int64))


def open_instructions(instructions: Manifest, split: str) -> InstructionRows:
    """Map a split of `prepare_instructions`.

    Args:
        instructions: manifest of `prepare_instructions`.
        split: `train`, `validation` or `test`.

    Raises:
        UserError: no such split, or a file is missing or not what was written.
    """
    found = {
        name: _open(instructions, f"{split}.{name}.npy")
        for name in ("tokens", "loss_mask", "documents", "places", "targets")
    }
    shape = (instructions.counts[f"{split}_rows"], instructions.counts["sequence_length"] + 1)
    if any(found[name].shape != shape for name in ("tokens", "loss_mask", "documents")):
        raise UserError(f"instructions: {instructions.uri} has no {shape} arrays; run prepare_instructions again")
    return InstructionRows(**found)


def _open(instructions: Manifest, name: str) -> np.ndarray:
    path = instructions.path(name)
    try:
        if instructions.counts.get(f"{name.partition('.')[0]}_rows", 0):
            return np.load(path, mmap_mode="r", allow_pickle=False)
        return np.load(path, allow_pickle=False)
    except ValueError as error:
        raise UserError(f"instructions: {path} is no array ({error}); run prepare_instructions again") from None


def read_conversations(instructions: Manifest, split: str) -> Iterator[dict[str, Any]]:
    """Conversations of a split in the order of `InstructionRows.places`: `id`, `source` and `messages`."""
    with instructions.path(f"{split}.jsonl").open(encoding="utf-8") as file:
        yield from map(json.loads, file)


class InstructionSource:
    """Shuffled batches over rows, without end: every epoch uses each row once, in an order of its own.

    Rows differ in how many targets they hold. A mean over a batch must weigh by them: divide the sum of a rank's (or
    a micro-batch's) losses by `targets(step)`, which every rank can tell without asking the others.

    Args:
        rows: from `open_instructions`.
        seed: decides the order.
        global_batch_size: rows an optimizer step uses on all ranks together.

    Raises:
        UserError: the split is empty.
    """

    def __init__(self, rows: InstructionRows, seed: int, global_batch_size: int) -> None:
        if not len(rows):
            raise UserError("instructions: the split holds no conversation; raise its fraction or give it a source")
        self._rows = rows
        self._order = BatchSource(rows.tokens, seed, global_batch_size)
        self.global_batch_size = global_batch_size

    def batch(self, step: int, rank: int = 0, world: int = 1) -> InstructionBatch:
        """A rank's share of a step's global batch, [global_batch_size / world] rows.

        Ranks hold consecutive parts: joined in rank order they are the same batch for every world size.

        Raises:
            ValueError: the batch cannot be shared evenly, or there is no such rank.
        """
        return self._rows.take(self._order.indices_of(step, rank, world))

    def targets(self, step: int) -> int:
        """Targets of a step's global batch, on all ranks together: what its summed loss is divided by."""
        return int(self._rows.targets[self._order.indices(step)].sum())
