"""A shuffle that is computed instead of stored: position -> index for any length, in constant memory.

A balanced Feistel network is a bijection on numbers of an even count of bits whatever its round function is (Luby and
Rackoff, 1988). Walking on until the value falls inside the range makes it one on 0..n-1 (Black and Rogaway, 2002);
the domain is less than four times n, so fewer than four evaluations are needed on average. Opening a data set of any
size costs nothing, and so does going to any step of it.
"""

from __future__ import annotations

import hashlib

import numpy as np

_ROUNDS = 6


class Permutation:
    """A pseudo-random permutation of 0..length-1, decided by (length, seed, epoch).

    Args:
        length: number of items, at least 1.
        seed: any non-negative integer below 2**63.
        epoch: another one gives an unrelated permutation.
    """

    def __init__(self, length: int, seed: int, epoch: int = 0) -> None:
        if length < 1:
            raise ValueError(f"length: {length} items cannot be permuted; give at least 1")
        self.length = length
        bits = max(2, (length - 1).bit_length())
        self._half = np.uint64((bits + 1) // 2)
        self._mask = np.uint64((1 << int(self._half)) - 1)
        material = f"{seed}:{epoch}".encode()
        key = hashlib.blake2b(material, digest_size=8 * _ROUNDS, person=b"modelmill-rows").digest()
        self._keys = np.frombuffer(key, dtype="<u8").astype(np.uint64)

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """Indices (int64) at positions (any integer type, each in 0..length-1), element by element.

        Raises:
            IndexError: a position is outside the range.
        """
        values = np.asarray(positions)
        if values.size and (values.min() < 0 or values.max() >= self.length):
            raise IndexError(f"positions outside 0..{self.length - 1}")
        values = self._encrypt(values.astype(np.uint64))
        outside = values >= self.length
        while outside.any():
            values[outside] = self._encrypt(values[outside])
            outside = values >= self.length
        return values.astype(np.int64)

    def _encrypt(self, values: np.ndarray) -> np.ndarray:
        left, right = values >> self._half, values & self._mask
        for key in self._keys:
            left, right = right, left ^ (_mix(right ^ key) & self._mask)
        return (left << self._half) | right


def _mix(values: np.ndarray) -> np.ndarray:
    """Finaliser of SplitMix64 (Steele, Lea and Flood, 2014): every input bit reaches every output bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
