"""Which examples an evaluation takes, and which of them are computed together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np


def evenly(count: int, limit: int | None) -> np.ndarray:
    """Numbers below `count`, at most `limit` of them, evenly spaced and rising."""
    if limit is None or limit >= count:
        return np.arange(count)
    return np.arange(limit) * count // limit


def batches(lengths: Sequence[int], batch_tokens: int, room: int = 0) -> Iterator[list[int]]:
    """Numbers of sequences to compute together, the longest first.

    Args:
        lengths: of the sequences.
        batch_tokens: a batch holds no more, counting each sequence as the longest; at least one sequence.
        room: tokens to keep free behind each.
    """
    order = sorted(range(len(lengths)), key=lambda place: (-lengths[place], place))
    begin = 0
    while begin < len(order):
        size = max(1, batch_tokens // max(1, lengths[order[begin]] + room))
        yield order[begin : begin + size]
        begin += size
