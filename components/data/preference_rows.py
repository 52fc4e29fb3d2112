"""Batches of answer pairs, as a pure function of (seed, step, data set).

A prepared split lies on disk as rows like those of instruction data (`instruction_rows`), one conversation each: row
2 i is prompt i with the chosen answer, row 2 i + 1 with the rejected one. Targets are the tokens of the last answer.
Nothing here needs torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from modelmill.components.core.errors import UserError
from modelmill.components.core.manifest import Manifest
from modelmill.components.data.instruction_packing import TokenStore
from modelmill.components.data.instruction_rows import InstructionRows, open_instructions
from modelmill.components.data.loader import BatchSource
from modelmill.components.data.section_names import told_as

_WIDTHS = 8  # a batch is as wide as one of so many parts of a row: few shapes, and little padding


@dataclass(frozen=True)
class PreferenceRows:
    """A split of pairs, mapped into memory; `rows` has two rows for each."""

    rows: InstructionRows

    def __len__(self) -> int:
        return len(self.rows) // 2

    @cached_property
    def sizes(self) -> np.ndarray:
        """Tokens of each prompt with its chosen and rejected answer, int64 [pairs, 2]."""
        return self.rows.places[:, 2].reshape(-1, 2)

    @cached_property
    def targets(self) -> np.ndarray:
        """Targets of each answer, int64 [pairs, 2]: its tokens with the end of turn."""
        return self.rows.places[:, 3].reshape(-1, 2)

    def take(self, pairs: np.ndarray, width: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets of pairs, each int64 [b, 2, width]; `IGNORE` where a target does not count.

        Args:
            pairs: numbers [b].
            width: inputs of each answer; None takes whole rows. What lies behind must be padding.
        """
        numbers = (2 * np.asarray(pairs)[:, None] + np.arange(2)).ravel()
        batch, shape = self.rows.take(numbers), (len(pairs), 2, -1)
        return batch.tokens[:, :width].reshape(shape), batch.targets[:, :width].reshape(shape)

    def width(self, pairs: np.ndarray) -> int:
        """Inputs that pairs need, rounded up to an eighth of a row."""
        whole = self.rows.tokens.shape[1] - 1
        eighth = -(-whole // _WIDTHS)
        needed = int(self.sizes[pairs].max()) - 1 if len(pairs) else 1
        return min(whole, -(-max(1, needed) // eighth) * eighth)

    def conversation(self, pair: int, side: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids [t] of a prompt with its chosen (0) or rejected (1) answer, and which are targets, bool [t]."""
        size = int(self.sizes[pair, side])
        return self.rows.tokens[2 * pair + side, :size], self.rows.loss_mask[2 * pair + side, :size] != 0


def open_preferences(preferences: Manifest, split: str) -> PreferenceRows:
    """Map a split of `prepare_preferences`.

    Raises:
        UserError: it holds no pairs, or a file is missing or not what was written.
    """
    if preferences.kind != "preferences":
        raise UserError(f"preferences: {preferences.uri} is of kind {preferences.kind}; run prepare_preferences")
    with told_as("preferences", instead_of="instructions"):
        return PreferenceRows(open_instructions(preferences, split))


def read_pairs(preferences: Manifest, split: str) -> Iterator[dict[str, Any]]:
    """Pairs of a split in the order of its rows: `id`, `source`, `prompt`, `chosen` and `rejected`."""
    with preferences.path(f"{split}.jsonl").open(encoding="utf-8") as file:
        yield from map(json.loads, file)


class PreferenceSource:
    """Shuffled batches of pairs, without end: every epoch uses each pair once, in an order of its own.

    Args:
        rows: from `open_preferences`.
        seed: decides the order.
        global_batch_size: pairs an optimizer step uses on all ranks together.

    Raises:
        UserError: the split is empty.
    """

    def __init__(self, rows: PreferenceRows, seed: int, global_batch_size: int) -> None:
        if not len(rows):
            raise UserError("preferences: the split holds no pair; raise its fraction or give it a source")
        self.rows = rows
        self._order = BatchSource(rows.sizes, seed, global_batch_size)

    def indices(self, step: int) -> np.ndarray:
        """Numbers of the pairs of a step's global batch."""
        return self._order.indices(step)

    def indices_of(self, step: int, rank: int, world: int) -> np.ndarray:
        """Numbers of a rank's share of them: consecutive parts, joined in rank order the global batch."""
        return self._order.indices_of(step, rank, world)

    def width(self, step: int) -> int:
        """Inputs that the longest answer of a step's global batch needs; the same on every rank."""
        return self.rows.width(self.indices(step))


def write_pairs(store: TokenStore, prefix: Path, capacity: int, pad: int) -> InstructionRows:
    """Write a store's items as rows, one each: the arrays that `open_instructions` maps.

    Args:
        store: conversations in pairs, none longer than `capacity`.
        prefix: folder and beginning of the names.
        capacity: tokens of a row.
        pad: id of the token that fills up rows.

    Returns:
        The rows that were written.
    """
    lengths = store.lengths
    tokens, mask = store.read()
    shape = (len(lengths), capacity)
    kinds = {"tokens": tokens.dtype, "loss_mask": np.dtype(np.uint8), "documents": np.dtype("<u2")}
    arrays = {name: _create(prefix, name, shape, kind) for name, kind in kinds.items()}
    targets, begin = np.zeros(len(lengths), np.int64), 0
    for row, size in enumerate(lengths.tolist()):
        learnt = np.array(mask[begin : begin + size])
        learnt[0] = 0  # nothing stands before it
        arrays["tokens"][row, :size], arrays["tokens"][row, size:] = tokens[begin : begin + size], pad
        arrays["loss_mask"][row, :size] = learnt
        arrays["documents"][row, size:] = 1
        targets[row] = learnt.sum()
        begin += size
    for name, array in arrays.items():
        if isinstance(array, np.memmap):
            array.flush()
        else:
            np.save(prefix.with_name(f"{prefix.name}.{name}.npy"), array)
    places = np.stack([np.arange(len(lengths)), np.zeros_like(lengths), lengths, targets], 1)
    np.save(prefix.with_name(f"{prefix.name}.places.npy"), places)
    np.save(prefix.with_name(f"{prefix.name}.targets.npy"), targets.astype(np.int32))
    return InstructionRows(**arrays, places=places, targets=targets.astype(np.int32))


def _create(prefix: Path, name: str, shape: tuple[int, int], kind: np.dtype) -> np.ndarray:
    if not shape[0]:  # nothing to map
        return np.empty(shape, kind)
    return np.lib.format.open_memmap(prefix.with_name(f"{prefix.name}.{name}.npy"), "w+", kind, shape)
