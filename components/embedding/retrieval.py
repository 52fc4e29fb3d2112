"""Ranks of texts by the cosines of their vectors with a question's, and what they are worth.

What counts is the rank of the texts that belong to a question: one more than the number of texts that lie nearer;
equally near ones are ranked by their ids. Metrics as in BEIR (Thakur et al. 2021, arXiv:2104.08663).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_BLOCK = 1 << 22  # similarities held at once
_DEPTHS = (1, 5, 10)


@dataclass(frozen=True)
class Held:
    """Held-out questions and the corpus.

    Attributes:
        ids: of the questions, sorted, [n].
        questions: [n].
        corpus_ids: sorted, [m].
        corpus: the texts to find, [m].
        relevant: of each question the places of its texts in the corpus, ascending, [n].
    """

    ids: Sequence[str]
    questions: Sequence[str]
    corpus_ids: Sequence[str]
    corpus: Sequence[str]
    relevant: Sequence[NDArray[np.int64]]

    @classmethod
    def of(cls, pairs: Sequence[Mapping[str, Any]]) -> Held:
        """From pairs that belong together, as `read_pairs` gives them."""
        questions = {pair["id"]: pair["question"] for pair in pairs}
        corpus = {pair["positive_id"]: pair["positive"] for pair in pairs}
        ids, corpus_ids = sorted(questions), sorted(corpus)
        places = {identity: place for place, identity in enumerate(corpus_ids)}
        found: dict[str, set[int]] = {identity: set() for identity in ids}
        for pair in pairs:
            found[pair["id"]].add(places[pair["positive_id"]])
        relevant = [np.array(sorted(found[identity]), np.int64) for identity in ids]
        return cls(ids, [questions[i] for i in ids], corpus_ids, [corpus[i] for i in corpus_ids], relevant)


@dataclass(frozen=True)
class Found:
    """What a model found.

    Attributes:
        ranks: of each question the ranks of its texts, from 1, [n] of the shapes of `Held.relevant`.
        cosines: and their cosines with the question.
        nearest: place of the nearest text, [n].
    """

    ranks: Sequence[NDArray[np.int64]]
    cosines: Sequence[NDArray[np.float64]]
    nearest: NDArray[np.int64]


def rank(questions: NDArray[np.float32], corpus: NDArray[np.float32], relevant: Sequence[NDArray[np.int64]]) -> Found:
    """Rank the texts that belong to each question among all of the corpus.

    Args:
        questions: vectors [n, d] of length 1.
        corpus: vectors [m, d] of length 1.
        relevant: places in the corpus, [n].
    """
    ranks: list[NDArray[np.int64]] = []
    cosines: list[NDArray[np.float64]] = []
    nearest = np.empty(len(questions), np.int64)
    step = max(1, _BLOCK // len(corpus))
    for begin in range(0, len(questions), step):
        block = questions[begin : begin + step] @ corpus.T
        nearest[begin : begin + step] = block.argmax(axis=1)
        for row, places in zip(block, relevant[begin : begin + step], strict=True):
            near = row[places]
            before = [
                (row > value).sum() + (row[:place] == value).sum() for place, value in zip(places, near, strict=True)
            ]
            ranks.append(np.array(before, np.int64) + 1)
            cosines.append(near.astype(np.float64))
    return Found(ranks, cosines, nearest)


def score(found: Found) -> dict[str, NDArray[np.float64]]:
    """Scores of every question by metric, [n] each."""
    scores = {f"recall_at_{depth}": [float((ranks <= depth).mean()) for ranks in found.ranks] for depth in _DEPTHS}
    depth = _DEPTHS[-1]
    best = [int(ranks.min()) for ranks in found.ranks]
    scores[f"mrr_at_{depth}"] = [1 / first if first <= depth else 0.0 for first in best]
    scores[f"ndcg_at_{depth}"] = [
        float(_gain(ranks[ranks <= depth]) / _gain(np.arange(1, min(len(ranks), depth) + 1))) for ranks in found.ranks
    ]
    scores["cosine"] = [float(values.mean()) for values in found.cosines]
    return {name: np.array(values) for name, values in scores.items()}


def _gain(ranks: NDArray[np.int64]) -> float:
    return float((1 / np.log2(ranks + 1)).sum())
