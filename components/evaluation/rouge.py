"""ROUGE-1, -2, -L and -Lsum, equal to the `rouge_score` package to the last digit and many times faster.

Lin, C.-Y. (2004): ROUGE: A Package for Automatic Evaluation of Summaries. What the paper leaves open (tokens, stems of
words longer than three letters, sentences split at line breaks, no token counted twice in ROUGE-Lsum, the best of
several references) follows `rouge_score` 0.1.2, the numbers people compare with.

Where the time goes instead: every distinct word is stemmed and numbered once; the longest common subsequence runs on
whole rows of the table as the bits of one integer (Crochemore et al. 2001, Hyyrö 2004), also where ROUGE-Lsum needs to
know which subsequence it is.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from itertools import chain, pairwise
from typing import Any, NamedTuple

from modelmill.components.evaluation.stemming import stem

METRICS = ("rouge1", "rouge2", "rougeL", "rougeLsum")
_WORD = re.compile(r"[a-z0-9]+")


class Score(NamedTuple):
    """Precision, recall and their harmonic mean, each between 0 and 1."""

    precision: float
    recall: float
    fmeasure: float


_NOTHING = Score(0.0, 0.0, 0.0)


class Rouge:
    """Scores texts; keep one for a whole set of examples, since it remembers the stems of the words it has seen."""

    def __init__(self, metrics: Sequence[str] = METRICS, *, use_stemmer: bool = True) -> None:
        """
        Args:
            metrics: some of `METRICS`.
            use_stemmer: compare words of more than three letters by their Porter stem.
        """
        if unknown := sorted(set(metrics) - set(METRICS)):
            raise ValueError(f"metrics: {unknown} are not among {', '.join(METRICS)}")
        self._metrics = tuple(metrics)
        self._words = _Words(use_stemmer)

    def score(self, references: Sequence[str], prediction: str) -> dict[str, Score]:
        """Each metric's score against the reference with the highest F-measure, the first of equals.

        Args:
            references: one or more; line breaks part sentences.
            prediction: what the model wrote.
        """
        predicted = _Text(prediction, self._words)
        each = [self._against(_Text(reference, self._words), predicted) for reference in references]
        if len(each) == 1:
            return each[0]
        return {name: max((scores[name] for scores in each), key=lambda score: score.fmeasure) for name in each[0]}

    def _against(self, target: _Text, predicted: _Text) -> dict[str, Score]:
        scores: dict[str, Score] = {}
        sentence_score: Score | None = None
        for name in self._metrics:
            if name == "rouge1":
                scores[name] = _ngram_score(target.unigrams, predicted.unigrams)
            elif name == "rouge2":
                scores[name] = _ngram_score(target.bigrams, predicted.bigrams)
            elif name == "rougeL" or max(len(target.sentences), len(predicted.sentences)) == 1:
                # Of one sentence and one sentence the summary's score is the sentence's.
                sentence_score = sentence_score or _sentence_score(target.tokens, predicted.tokens)
                scores[name] = sentence_score
            else:
                scores[name] = _summary_score(target, predicted)
        return scores


class _Words(dict[str, int]):
    """Number of each word, the same for words of the same stem."""

    def __init__(self, use_stemmer: bool) -> None:
        self._use_stemmer = use_stemmer
        self._numbers: dict[str, int] = {}

    def __missing__(self, word: str) -> int:
        root = stem(word) if self._use_stemmer and len(word) > 3 else word
        number = self[word] = self._numbers.setdefault(root, len(self._numbers))
        return number


class _Text:
    """A text as numbered words, by sentence and as a whole."""

    def __init__(self, text: str, words: _Words) -> None:
        number = words.__getitem__
        found = (_WORD.findall(line) for line in text.lower().split("\n"))
        self.sentences = [list(map(number, line)) for line in found if line]

    @cached_property
    def tokens(self) -> list[int]:
        return self.sentences[0] if len(self.sentences) == 1 else list(chain.from_iterable(self.sentences))

    @cached_property
    def unigrams(self) -> Counter[int]:
        return Counter(self.tokens)

    @cached_property
    def bigrams(self) -> Counter[tuple[int, int]]:
        return Counter(pairwise(self.tokens))


def lcs_length(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the longest common subsequence of two sequences of numbers."""
    common = set(first) & set(second)
    if not common:
        return 0
    if len(common) < len(first):  # what only one side has is in no common subsequence
        first = [token for token in first if token in common]
    masks = _masks(first)
    row = full = (1 << len(first)) - 1
    for token in second:
        if token in common:
            matches = row & masks[token]
            row = (row + matches) | (row - matches)
            row &= full
    return len(first) - row.bit_count()


def lcs_members(masks: dict[int, int], length: int, second: Sequence[int]) -> int:
    """Which places of a sequence the traced longest common subsequence with another one uses, as bits.

    Walks the table from its end as the reference implementation does: take a match, else go towards the larger
    neighbour, the first sequence's side where they are equal. Row `i` of column `j` exceeds row `i - 1` exactly where
    the column's bit is 0, which is all that the walk asks for.

    Args:
        masks: places of each token of the first sequence, see `_masks`.
        length: of the first sequence.
        second: the other sequence.
    """
    found = list(map(masks.get, second))
    matches_of = list(filter(None, found))
    if not matches_of:
        return 0
    if len(matches_of) == 1:  # most pairs of sentences share one word or none
        only = matches_of[0]
        return 1 << (only.bit_length() - 1) if found[-1] else only & -only
    row = full = (1 << length) - 1
    columns: list[tuple[int, int]] = []  # the matches of each column, and where its rows exceed the row before
    gap = True
    for matched in found:
        if matched:
            matches = row & matched
            row = ((row + matches) | (row - matches)) & full
            columns.append((matched, row ^ full))
            gap = False
        elif not gap:  # columns without a match are equal: one stands for all that follow each other
            columns.append((0, row ^ full))
            gap = True
    members, below = 0, full
    for matched, exceeding in reversed(columns):
        place = ((matched | exceeding) & below).bit_length()  # go down past rows that neither match nor exceed
        if not place:
            break
        bit = 1 << (place - 1)
        if matched & bit:
            members |= bit
            below = bit - 1
        else:
            below = (bit << 1) - 1
    return members


def _masks(tokens: Sequence[int]) -> dict[int, int]:
    """The places of each token as bits."""
    masks: dict[int, int] = {}
    bit = 1
    for token in tokens:
        masks[token] = masks.get(token, 0) | bit
        bit <<= 1
    return masks


def _ngram_score(target: Counter[Any], predicted: Counter[Any]) -> Score:
    hits = 0
    for gram in target.keys() & predicted.keys():
        wanted, found = target[gram], predicted[gram]
        hits += wanted if wanted < found else found
    return _score(hits, max(predicted.total(), 1), max(target.total(), 1))


def _sentence_score(target: Sequence[int], predicted: Sequence[int]) -> Score:
    if not target or not predicted:
        return _NOTHING
    return _score(lcs_length(target, predicted), len(predicted), len(target))


def _summary_score(target: _Text, predicted: _Text) -> Score:
    """Section 3.2 of the paper: each reference sentence against the union of its subsequences with all predicted."""
    if not target.tokens or not predicted.tokens:
        return _NOTHING
    used: Counter[int] = Counter()
    for sentence in target.sentences:
        masks, union = _masks(sentence), 0
        for other in predicted.sentences:
            union |= lcs_members(masks, len(sentence), other)
        if union:
            used.update(token for token, bit in zip(sentence, bin(union)[:1:-1], strict=False) if bit == "1")
    available = predicted.unigrams
    hits = sum(min(count, available[token]) for token, count in used.items())
    return _score(hits, len(predicted.tokens), len(target.tokens))


def _score(hits: int, predicted: int, target: int) -> Score:
    precision, recall = hits / predicted, hits / target
    if not hits:
        return _NOTHING
    return Score(precision, recall, 2 * precision * recall / (precision + recall))
