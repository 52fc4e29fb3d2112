"""Conversations packed into rows of a fixed length: best-fit-decreasing over how many there are of each length.

Best-fit-decreasing takes the longest first and puts each into the row with the least room that still takes it. Two
conversations of one length are interchangeable, and so are two rows that hold the same lengths, so the plan is made
for lengths and kinds of rows: its cost grows with the number of different lengths, not with that of conversations
(Ding et al. 2024, "Fewer Truncations Improve Language Modeling", arXiv 2404.10830, use the same heuristic).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from modelmill.components.data.permutation import Permutation

_TOKENS_AT_ONCE = 1 << 22  # copied in one go: some 100 MB of index arrays


@dataclass(frozen=True)
class RowKind:
    """Rows that hold the same lengths.

    Attributes:
        rows: how many there are.
        content: (length, how many of it) in the order they lie in a row.
    """

    rows: int
    content: tuple[tuple[int, int], ...]


def plan_rows(counts: np.ndarray, capacity: int) -> list[RowKind]:
    """Best-fit-decreasing of items known by their lengths only.

    Args:
        counts: number of items of each length, int [longest + 1]; `counts[0]` must be 0.
        capacity: room of a row; no item is longer.

    Returns:
        The kinds of rows, in the order they were begun.
    """
    # Kinds by the room they have left. Where rows of one room differ, the kind that was begun last is filled first.
    open_rows: dict[int, list[_Open]] = {capacity: []}
    free = 0  # bit r is set when a row has room r: the least room that is enough is one shift away
    kinds: list[_Open] = []
    for length in map(int, np.flatnonzero(counts)[::-1]):
        waiting = int(counts[length])
        while waiting:
            fitting = free >> length
            if fitting:
                room = length + (fitting & -fitting).bit_length() - 1
                kind = open_rows[room].pop()
                if not open_rows[room]:
                    free &= ~(1 << room)
            else:  # as many new rows as the rest fills
                room = capacity
                kind = _Open(-(-waiting // (capacity // length)), None)
                kinds.append(kind)
            for part, times in kind.take(length, waiting, room):
                waiting -= part.rows * times
                if part is not kind:
                    kinds.append(part)
                left = room - times * length
                if left:
                    open_rows.setdefault(left, []).append(part)
                    free |= 1 << left
    return [RowKind(kind.rows, kind.listed()) for kind in kinds]


class _Open:
    """Rows of one kind while they are filled; what they hold is a linked list, shared by kinds that were split."""

    def __init__(self, rows: int, content: tuple[int, int, object] | None) -> None:
        self.rows, self.content = rows, content

    def take(self, length: int, waiting: int, room: int) -> list[tuple[_Open, int]]:
        """Put up to `waiting` items into these rows, each row filled before the next one is touched.

        Returns the kinds these rows are then, each with the items a row of it got. `self` is one of them.
        """
        fit = room // length
        full, rest = divmod(min(waiting, self.rows * fit), fit)
        parts = [(full, fit), (1 if rest else 0, rest), (self.rows - full - (1 if rest else 0), 0)]
        found: list[tuple[_Open, int]] = []
        before = self.content
        for rows, times in parts:
            if rows:
                part = self if not found else _Open(0, None)
                part.rows, part.content = rows, (length, times, before) if times else before
                found.append((part, times))
        return found

    def listed(self) -> tuple[tuple[int, int], ...]:
        """(length, count) from the first put in to the last."""
        content: list[tuple[int, int]] = []
        link = self.content
        while link is not None:
            length, times, link = link  # type: ignore[assignment]
            content.append((length, times))
        return tuple(reversed(content))


def place_items(lengths: np.ndarray, capacity: int, seed: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Row and place of every item.

    Args:
        lengths: tokens of each item, int [items], each in 1..capacity.
        capacity: tokens of a row.
        seed: decides which of the items of one length share a row with which others.

    Returns:
        Row of each item (int64 [items]), its first position there (int64 [items]), and the number of rows.
    """
    rows, starts = np.empty(len(lengths), np.int64), np.empty(len(lengths), np.int64)
    if not len(lengths):
        return rows, starts, 0
    counts = np.bincount(lengths)
    mixed = Permutation(len(lengths), seed)(np.arange(len(lengths)))
    pool = mixed[np.argsort(lengths[mixed], kind="stable")]  # items by length, those of one length mixed
    taken = np.cumsum(counts) - counts  # of each length, where the next item to place stands in the pool
    total = 0
    for kind in plan_rows(counts, capacity):
        begin = 0
        for length, times in kind.content:
            first = taken[length]
            items = pool[first : first + kind.rows * times].reshape(kind.rows, times)
            taken[length] += items.size
            rows[items] = np.arange(total, total + kind.rows)[:, None]
            starts[items] = begin + length * np.arange(times)
            begin += length * times
        total += kind.rows
    return rows, starts, total


class TokenStore:
    """Tokens and loss masks of many items one after another, on disk."""

    def __init__(self, folder: Path, name: str, dtype: np.dtype) -> None:
        self._paths = folder / f"{name}.tokens", folder / f"{name}.mask"
        self._files: tuple[IO[bytes], IO[bytes]] = (self._paths[0].open("wb"), self._paths[1].open("wb"))
        self._dtype = dtype
        self._lengths: list[int] = []

    def append(self, tokens: np.ndarray, mask: np.ndarray) -> None:
        """Add an item: ids [n] and whether each is to be learnt, bool [n]."""
        self._files[0].write(tokens.astype(self._dtype).tobytes())
        self._files[1].write(mask.astype(np.uint8).tobytes())
        self._lengths.append(len(tokens))

    def close(self) -> None:
        for file in self._files:
            file.close()

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each item, int64 [items]."""
        return np.array(self._lengths, np.int64)

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """All tokens and their masks (uint8), mapped into memory."""
        self.close()
        if not self._lengths:
            return np.empty(0, self._dtype), np.empty(0, np.uint8)
        return np.memmap(self._paths[0], self._dtype, "r"), np.memmap(self._paths[1], np.uint8, "r")


@dataclass(frozen=True)
class PackedRows:
    """Where a split's items lie.

    Attributes:
        rows: number of rows.
        places: row, first position, tokens and targets of each item, int64 [items, 4].
        targets: targets of each row, int32 [rows].
    """

    rows: int
    places: np.ndarray
    targets: np.ndarray


def write_rows(store: TokenStore, prefix: Path, capacity: int, pad: int, seed: int) -> PackedRows:
    """Pack a store's items and write `<prefix>.tokens.npy`, `.loss_mask.npy` and `.documents.npy`.

    Each has the shape [rows, capacity]: token ids, 1 where a token is a target of the loss (uint8), and the number of
    the item within its row (rising from 0; the padding counts as one more item). An item's first token is never a
    target: nothing of its item stands before it.

    Args:
        store: the items, none longer than `capacity`.
        prefix: folder and beginning of the names.
        capacity: tokens of a row.
        pad: id of the token that fills up rows.
        seed: see `place_items`.
    """
    lengths = store.lengths
    tokens, mask = store.read()
    rows, starts, count = place_items(lengths, capacity, seed)
    out = _Arrays(prefix, (count, capacity), tokens.dtype)
    held = np.bincount(rows, minlength=count)
    within = np.empty(len(rows), np.int64)  # which item of its row each one is
    order = np.lexsort((starts, rows))
    within[order] = np.arange(len(rows)) - np.repeat(np.cumsum(held) - held, held)
    out.clear(pad, held)
    learnt_of = np.zeros(len(rows), np.int64)
    begins = np.cumsum(lengths) - lengths
    for part in _chunks(lengths):
        offsets, size = begins[part] - begins[part.start], lengths[part]
        goal = np.repeat(rows[part] * capacity + starts[part] - offsets, size)
        goal += np.arange(len(goal))
        origin = slice(int(begins[part.start]), int(begins[part.start]) + len(goal))
        learnt = np.array(mask[origin])
        learnt[offsets] = 0
        learnt_of[part] = np.add.reduceat(learnt, offsets, dtype=np.int64)
        out.fill(goal, tokens[origin], learnt, np.repeat(within[part], size))
    out.save()
    targets = np.bincount(rows, learnt_of, minlength=count).astype(np.int32)
    return PackedRows(count, np.stack([rows, starts, lengths, learnt_of], 1), targets)


class _Arrays:
    """The three arrays of a split, filled position by position in any order."""

    def __init__(self, prefix: Path, shape: tuple[int, int], dtype: np.dtype) -> None:
        number = np.dtype("<u2" if shape[1] < 1 << 16 else "<u4")
        kinds = {"tokens": dtype, "loss_mask": np.dtype(np.uint8), "documents": number}
        self._arrays = {}
        for name, kind in kinds.items():
            path = prefix.with_name(f"{prefix.name}.{name}.npy")
            if shape[0]:
                self._arrays[name] = np.lib.format.open_memmap(path, "w+", kind, shape)
            else:  # nothing to map
                np.save(path, np.empty(shape, kind))

    def clear(self, pad: int, held: np.ndarray) -> None:
        """Make everything padding: its document comes after the `held` ones of a row."""
        if self._arrays:
            self._arrays["tokens"][:] = pad
            self._arrays["documents"][:] = held[:, None]

    def fill(self, goal: np.ndarray, tokens: np.ndarray, mask: np.ndarray, documents: np.ndarray) -> None:
        for name, values in (("tokens", tokens), ("loss_mask", mask), ("documents", documents)):
            self._arrays[name].reshape(-1)[goal] = values

    def save(self) -> None:
        for array in self._arrays.values():
            array.flush()


def _chunks(lengths: np.ndarray) -> Iterator[slice]:
    """Runs of items with about `_TOKENS_AT_ONCE` tokens each."""
    chunk = np.cumsum(lengths) // _TOKENS_AT_ONCE
    edges = [0, *(np.flatnonzero(np.diff(chunk)) + 1).tolist(), len(lengths)]
    for first, last in itertools.pairwise(edges):
        if last > first:
            yield slice(first, last)
