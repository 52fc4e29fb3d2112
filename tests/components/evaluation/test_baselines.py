"""The baselines are proper distributions and equal a naive implementation of the published formulas."""

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from modelmill.components.evaluation import baselines
from modelmill.components.evaluation.baselines import KneserNeyBigram, UnigramModel, count_pairs, row_losses

VOCABULARY = 7
shapes = st.tuples(st.integers(1, 6), st.integers(2, 12))
small_rows = arrays(np.uint16, shapes, elements=st.integers(0, VOCABULARY - 1))


def naive_discount(counts: list[int]) -> float:
    once, twice = counts.count(1), counts.count(2)
    return once / (once + 2 * twice) if once else 0.5


def naive_kneser_ney(rows: np.ndarray, context: int, target: int) -> float:
    """The formulas with dictionaries, one probability at a time."""
    pairs = Counter((int(a), int(b)) for row in rows for a, b in itertools.pairwise(row))
    before: dict[int, set[int]] = defaultdict(set)
    for first, second in pairs:
        before[second].add(first)
    spread = {token: len(contexts) for token, contexts in before.items()}
    low = naive_discount(list(spread.values()))
    lower = max(spread.get(target, 0) - low, 0) / len(pairs) + low * len(spread) / len(pairs) / VOCABULARY
    total = sum(count for (first, _), count in pairs.items() if first == context)
    if total == 0:
        return lower
    high = naive_discount(list(pairs.values()))
    followers = sum(1 for first, _ in pairs if first == context)
    return max(pairs[context, target] - high, 0) / total + high * followers / total * lower


@given(small_rows)
@settings(max_examples=60, deadline=None)
def test_bigram_equals_the_naive_formulas(rows: np.ndarray) -> None:
    model = KneserNeyBigram.fit(rows, VOCABULARY)
    contexts, targets = np.divmod(np.arange(VOCABULARY**2), VOCABULARY)
    expected = [math.log(naive_kneser_ney(rows, int(v), int(w))) for v, w in zip(contexts, targets, strict=True)]
    np.testing.assert_allclose(model.log_probability(contexts, targets), expected, rtol=1e-12)


@given(small_rows)
@settings(max_examples=60, deadline=None)
def test_every_context_gives_a_distribution(rows: np.ndarray) -> None:
    contexts, targets = np.divmod(np.arange(VOCABULARY**2), VOCABULARY)
    for model in (KneserNeyBigram.fit(rows, VOCABULARY), UnigramModel.fit(rows, VOCABULARY)):
        probability = np.exp(model.log_probability(contexts, targets)).reshape(VOCABULARY, VOCABULARY)
        assert (probability > 0).all()
        np.testing.assert_allclose(probability.sum(axis=1), 1, rtol=1e-12)


@given(small_rows)
@settings(max_examples=40, deadline=None)
def test_unigram_is_add_one(rows: np.ndarray) -> None:
    counts = Counter(rows[:, 1:].ravel().tolist())
    total = sum(counts.values())
    expected = [math.log((counts[token] + 1) / (total + VOCABULARY)) for token in range(VOCABULARY)]
    model = UnigramModel.fit(rows, VOCABULARY)
    np.testing.assert_allclose(model.log_probabilities, expected, rtol=1e-12)


@given(small_rows, st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_counting_does_not_depend_on_the_chunk_size(rows: np.ndarray, chunk: int) -> None:
    expected = Counter((rows[:, :-1].astype(int) * VOCABULARY + rows[:, 1:]).ravel().tolist())
    whole, baselines._CHUNK_TOKENS = baselines._CHUNK_TOKENS, chunk
    try:
        codes, counts = count_pairs(rows, VOCABULARY)
        losses = row_losses(KneserNeyBigram.fit(rows, VOCABULARY), rows)
    finally:
        baselines._CHUNK_TOKENS = whole
    assert dict(zip(codes.tolist(), counts.tolist(), strict=True)) == expected
    assert (np.diff(codes) > 0).all()
    np.testing.assert_allclose(losses, row_losses(KneserNeyBigram.fit(rows, VOCABULARY), rows), rtol=1e-12)


def test_bigram_beats_unigram_on_text_with_pairs_and_not_on_noise() -> None:
    generator = np.random.default_rng(0)
    chain = np.zeros((80, 65), dtype=np.uint16)
    for step in range(64):  # a Markov chain in which each token has three followers
        chain[:, step + 1] = (chain[:, step] * 3 + generator.integers(0, 3, 80)) % 50
    noise = generator.integers(0, 50, (80, 65)).astype(np.uint16)
    for rows, bigram_wins in ((chain, True), (noise, False)):
        train, test = rows[:60], rows[60:]
        bigram = row_losses(KneserNeyBigram.fit(train, 50), test).mean()
        unigram = row_losses(UnigramModel.fit(train, 50), test).mean()
        assert (bigram < unigram) == bigram_wins
    exact = row_losses(KneserNeyBigram.fit(chain, 50), chain).mean()
    assert exact == pytest.approx(math.log(3), abs=0.1), "the chain's entropy is log 3"


def test_a_large_vocabulary_needs_no_square_of_memory() -> None:
    """Codes beyond 32 bits, and work arrays that follow the tokens: V x V would be 137 GB here."""
    vocabulary = 131_072
    rows = np.random.default_rng(1).integers(vocabulary - 50, vocabulary, (20, 129)).astype(np.uint32)
    model = KneserNeyBigram.fit(rows, vocabulary)
    contexts = np.full(vocabulary, vocabulary - 1)
    assert np.exp(model.log_probability(contexts, np.arange(vocabulary))).sum() == pytest.approx(1)
    assert model.codes.max() > 2**32
    assert len(model.codes) <= 20 * 128
