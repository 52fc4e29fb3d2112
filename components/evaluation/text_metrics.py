"""Exact match, token F1 and chrF of generated text against one or more references."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)
_CHARACTER_ORDER, _WORD_ORDER = 6, 2

Counts = tuple[tuple[int, int, int], ...]
"""For each order of n-grams how many the prediction has, the reference has, and both share."""


def normalize_answer(text: str) -> str:
    """Lower case without punctuation, English articles and superfluous space.

    As the SQuAD evaluation does it (Rajpurkar et al. 2016, arXiv:1606.05250).
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_WITHOUT_PUNCTUATION)).split())


def exact_match(references: Sequence[str], prediction: str) -> float:
    """1.0 where the normalized prediction is a normalized reference, else 0.0."""
    answer = normalize_answer(prediction)
    return float(any(answer == normalize_answer(reference) for reference in references))


def token_f1(references: Sequence[str], prediction: str) -> float:
    """Harmonic mean of precision and recall over the words of the normalized texts, the best of the references.

    Where one of the two has no word, 1.0 if the other has none either, else 0.0, as in SQuAD 2.0
    (arXiv:1806.03822).
    """
    words = normalize_answer(prediction).split()
    counted = Counter(words)
    best = 0.0
    for reference in references:
        expected = normalize_answer(reference).split()
        hits = (Counter(expected) & counted).total()
        if not words or not expected:
            best = max(best, float(words == expected))
        elif hits:
            precision, recall = hits / len(words), hits / len(expected)
            best = max(best, 2 * precision * recall / (precision + recall))
    return best


def chrf_counts(references: Sequence[str], prediction: str) -> list[Counts]:
    """What `chrf` needs to know of a prediction against each of its references."""
    predicted = _ngrams(prediction)
    return [
        tuple(_shared(ours, theirs) for ours, theirs in zip(predicted, _ngrams(reference), strict=True))
        for reference in references
    ]


def chrf(counts: Counts, *, plus_plus: bool = False) -> float:
    """F-score over n-grams of characters, recall counting twice, from 0 to 100.

    chrF of Popović (2015, W15-3049), with `plus_plus` chrF++ of Popović (2017, W17-4770), which adds words and pairs
    of words. Equal to `sacrebleu` with its defaults: orders that a text is too short for are left out of the mean.
    """
    orders = _CHARACTER_ORDER + (_WORD_ORDER if plus_plus else 0)
    usable = [(shared / ours, shared / theirs) for ours, theirs, shared in counts[:orders] if ours > 0 and theirs > 0]
    if not usable:
        return 0.0
    # Added one by one: `sum` compensates for rounding from Python 3.12 on and would differ in the last digit.
    precision = recall = 0.0
    for one, other in usable:
        precision += one
        recall += other
    precision /= len(usable)
    recall /= len(usable)
    if not precision + recall:
        return 0.0
    score = 5 * precision * recall
    score /= 4 * precision + recall
    return 100 * score


def best_chrf_counts(counts: Sequence[Counts], *, plus_plus: bool = False) -> Counts:
    """The counts against the reference that scores highest, the first of equals."""
    return max(counts, key=lambda each: chrf(each, plus_plus=plus_plus))


def corpus_chrf(best: Sequence[Counts], *, plus_plus: bool = False) -> float:
    """chrF of a whole set from the best counts of its examples: long texts weigh more than in the mean of examples."""
    totals = tuple(tuple(map(sum, zip(*order, strict=True))) for order in zip(*best, strict=True))
    return chrf(totals, plus_plus=plus_plus)  # type: ignore[arg-type]


def _ngrams(text: str) -> list[Counter[str]]:
    """N-grams of characters without space, orders 1 to 6, then of words, orders 1 and 2."""
    characters = "".join(text.split())
    words = _words(text)
    return [
        *(_counted(characters, order) for order in range(1, _CHARACTER_ORDER + 1)),
        Counter(words),
        Counter(map(" ".join, pairwise(words))),
    ]


def _counted(characters: str, order: int) -> Counter[str]:
    return Counter([characters[place : place + order] for place in range(len(characters) - order + 1)])


def _words(text: str) -> list[str]:
    """Words with one punctuation mark split off, at the end or else at the beginning."""
    words: list[str] = []
    for word in text.split():
        if len(word) > 1 and word[-1] in string.punctuation:
            words += [word[:-1], word[-1]]
        elif len(word) > 1 and word[0] in string.punctuation:
            words += [word[0], word[1:]]
        else:
            words.append(word)
    return words


def _shared(predicted: Counter[str], reference: Counter[str]) -> tuple[int, int, int]:
    shared = sum(min(predicted[gram], reference[gram]) for gram in predicted.keys() & reference.keys())
    return (predicted.total() if reference else 0), reference.total(), shared
