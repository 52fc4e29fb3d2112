"""N-gram language models that a trained model has to beat, counted on the same tokens.

Rows are arrays [rows, T + 1] of token ids: `row[:-1]` are contexts, `row[1:]` the predicted tokens. Everything is
sorted arrays, so memory grows with the number of distinct pairs and never with the square of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.integer]
Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
_CHUNK_TOKENS = 1 << 21  # predicted tokens handled at once: some 100 MB of work arrays
_FALLBACK_DISCOUNT = 0.5  # where nothing was seen once the estimate is 0, which leaves the unseen no mass


@dataclass(frozen=True)
class UnigramModel:
    """Add-one (Laplace) unigram: `p(w) = (c(w) + 1) / (N + V)`."""

    log_probabilities: Floats  # [V]

    @classmethod
    def fit(cls, rows: Tokens, vocab_size: int) -> UnigramModel:
        """Count the predicted tokens of rows [n, T + 1]."""
        counts = np.zeros(vocab_size, dtype=np.int64)
        for part in _chunks(rows):
            counts += np.bincount(part[:, 1:].ravel(), minlength=vocab_size)
        return cls(np.log(counts + 1) - np.log(counts.sum() + vocab_size))

    def log_probability(self, contexts: Tokens, targets: Tokens) -> Floats:
        """Natural log of p(target), for arrays of any equal shape; the contexts do not matter."""
        return self.log_probabilities[targets]


@dataclass(frozen=True)
class KneserNeyBigram:
    """Interpolated Kneser-Ney bigram with one discount an order.

    `p(w | v) = max(c(v, w) - D, 0) / c(v) + D N(v, .) / c(v) q(w)`, where `N(v, .)` is the number of distinct
    followers of v. The lower order counts in how many contexts a token was seen, is discounted the same way and
    interpolated with the uniform distribution, so that every token has a probability and they sum to one. A context
    never seen gives `q` itself. Discounts follow Ney, Essen and Kneser (1994), `D = n1 / (n1 + 2 n2)` from the numbers
    of things seen once and twice; 0.5 where nothing was seen once. See Chen and Goodman (1999), section 2.7.
    """

    vocab_size: int
    codes: Ints  # [pairs], sorted: context * V + target
    counts: Ints  # [pairs]
    context_counts: Ints  # [V], c(v)
    followers: Ints  # [V], N(v, .)
    lower: Floats  # [V], q
    discount: float
    lower_discount: float

    @classmethod
    def fit(cls, rows: Tokens, vocab_size: int) -> KneserNeyBigram:
        """Count the pairs of rows [n, T + 1]."""
        codes, counts = count_pairs(rows, vocab_size)
        contexts, targets = np.divmod(codes, vocab_size)
        context_counts = np.bincount(contexts, weights=counts, minlength=vocab_size).astype(np.int64)
        seen_after = np.bincount(targets, minlength=vocab_size)  # in how many contexts each token was seen
        lower_discount = _discount(seen_after)
        reserved = lower_discount * np.count_nonzero(seen_after)
        lower = (np.maximum(seen_after - lower_discount, 0) + reserved / vocab_size) / len(codes)
        return cls(
            vocab_size=vocab_size,
            codes=codes,
            counts=counts,
            context_counts=context_counts,
            followers=np.bincount(contexts, minlength=vocab_size),
            lower=lower,
            discount=_discount(counts),
            lower_discount=lower_discount,
        )

    def log_probability(self, contexts: Tokens, targets: Tokens) -> Floats:
        """Natural log of p(target | context), for arrays of any equal shape."""
        wanted = contexts.astype(np.int64) * self.vocab_size + targets
        place = np.minimum(np.searchsorted(self.codes, wanted), len(self.codes) - 1)
        pair_counts = np.where(self.codes[place] == wanted, self.counts[place], 0)
        totals = self.context_counts[contexts]
        known = totals > 0
        divisor = np.where(known, totals, 1)
        reserved = np.where(known, self.discount * self.followers[contexts] / divisor, 1.0)
        higher = np.where(known, np.maximum(pair_counts - self.discount, 0) / divisor, 0.0)
        return np.log(higher + reserved * self.lower[targets])


def count_pairs(rows: Tokens, vocab_size: int) -> tuple[Ints, Ints]:
    """Distinct (context, target) pairs of rows [n, T + 1] as sorted codes `context * V + target`, and their counts."""
    runs: list[tuple[Ints, Ints]] = []
    for part in _chunks(rows):
        codes = part[:, :-1].astype(np.int64) * vocab_size + part[:, 1:]
        unique, counts = np.unique(codes, return_counts=True)
        runs.append((unique, counts.astype(np.int64)))
        # Merging only runs of similar size keeps the work at n log n whatever the number of chunks.
        while len(runs) > 1 and len(runs[-2][0]) <= 2 * len(runs[-1][0]):
            runs.append(_merge(runs.pop(), runs.pop()))
    while len(runs) > 1:
        runs.append(_merge(runs.pop(), runs.pop()))
    return runs[0]


def row_losses(model: UnigramModel | KneserNeyBigram, rows: Tokens) -> Floats:
    """Mean negative log-likelihood of each of the rows [n, T + 1] in nats a token: [n]."""
    parts = [-model.log_probability(part[:, :-1], part[:, 1:]).mean(axis=1) for part in _chunks(rows)]
    return np.concatenate(parts)


def _merge(first: tuple[Ints, Ints], second: tuple[Ints, Ints]) -> tuple[Ints, Ints]:
    codes = np.concatenate([first[0], second[0]])
    counts = np.concatenate([first[1], second[1]])
    order = np.argsort(codes, kind="stable")
    codes, counts = codes[order], counts[order]
    starts = np.flatnonzero(np.diff(codes, prepend=-1))
    return codes[starts], np.add.reduceat(counts, starts)


def _discount(counts: NDArray[np.integer]) -> float:
    once, twice = int(np.count_nonzero(counts == 1)), int(np.count_nonzero(counts == 2))
    return once / (once + 2 * twice) if once else _FALLBACK_DISCOUNT


def _chunks(rows: Tokens) -> Iterator[NDArray[np.integer]]:
    size = max(1, _CHUNK_TOKENS // max(1, rows.shape[1] - 1))
    for begin in range(0, len(rows), size):
        yield np.asarray(rows[begin : begin + size])
