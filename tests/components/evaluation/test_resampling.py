"""Intervals cover what they promise, p-values are uniform where nothing differs, and seeds decide everything."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest

from modelmill.components.evaluation import resampling
from modelmill.components.evaluation.resampling import bootstrap_interval, compare_paired

TESTS = ("bootstrap", "permutation")


def test_interval_is_the_percentiles_of_resampled_means() -> None:
    values = np.random.default_rng(0).gamma(2.0, size=(40, 3))
    lower, upper = bootstrap_interval(values, confidence=0.9, resamples=3000, seed=5)
    generator = np.random.default_rng(17)
    means = np.array([generator.choice(values, 40).mean(axis=0) for _ in range(3000)])
    error = values.std(axis=0) / math.sqrt(40)
    assert lower == pytest.approx(np.quantile(means, 0.05, axis=0), abs=0.15 * error.max())
    assert upper == pytest.approx(np.quantile(means, 0.95, axis=0), abs=0.15 * error.max())
    again = bootstrap_interval(values, confidence=0.9, resamples=3000, seed=5)
    assert (again[0] == lower).all()
    alone = bootstrap_interval(values[:, 1:2], confidence=0.9, resamples=3000, seed=5)
    assert alone[0][0] == lower[1], "every column sees the same resamples"
    assert (bootstrap_interval(values, confidence=0.9, resamples=3000, seed=6)[0] != lower).all()


def test_intervals_cover_the_mean_as_often_as_stated() -> None:
    generator = np.random.default_rng(1)
    values = generator.normal(0.3, 1.0, size=(80, 500))  # 500 experiments of 80 examples
    lower, upper = bootstrap_interval(values, confidence=0.9, resamples=400, seed=0)
    covered = ((lower <= 0.3) & (upper >= 0.3)).mean()
    assert 0.90 - 4 * math.sqrt(0.09 / 500) <= covered <= 0.90 + 4 * math.sqrt(0.09 / 500)


@pytest.mark.parametrize("test", TESTS)
def test_p_values_are_uniform_where_nothing_differs(test: str) -> None:
    """Kolmogorov's distance of 400 p-values from the uniform distribution, at a level of about 0.001."""
    generator, both = np.random.default_rng(2), []
    for seed in range(400):
        first, second = generator.beta(2, 5, size=(2, 120))
        found = compare_paired(first - second, against=0.0, test=test, confidence=0.95, resamples=499, seed=seed)  # type: ignore[arg-type]
        both.append((found.p_above, found.p_below))
    for p_values in np.sort(np.array(both), axis=0).T:
        steps = np.arange(401) / 400
        distance = max(np.abs(p_values - steps[1:]).max(), np.abs(p_values - steps[:-1]).max())
        assert distance < 1.95 / math.sqrt(400)


def test_permutation_p_value_is_that_of_all_signs() -> None:
    differences = np.array([0.3, 0.1, 0.25, -0.05, 0.2, 0.15, 0.0, 0.4])
    sums = np.array([np.dot(signs, differences) for signs in product((-1, 1), repeat=len(differences))])
    exact = (sums >= differences.sum() - 1e-12).mean()
    found = compare_paired(differences, against=0.0, test="permutation", confidence=0.95, resamples=40_000, seed=0)
    assert found.p_above == pytest.approx(exact, abs=4 * math.sqrt(exact / 40_000))
    assert found.p_below == pytest.approx((sums <= differences.sum() + 1e-12).mean(), abs=0.005)


@pytest.mark.parametrize("test", TESTS)
def test_bounds_and_p_values_say_the_same(test: str) -> None:
    generator = np.random.default_rng(3)
    for shift in (-0.3, -0.1, 0.0, 0.1, 0.3):
        differences = generator.normal(shift, 1.0, 300)
        for against in (-0.2, 0.0, 0.2):
            found = compare_paired(
                differences,
                against=against,
                test=test,  # type: ignore[arg-type]
                confidence=0.95,
                resamples=4000,
                seed=0,
            )
            assert found.difference == differences.mean()
            assert found.lower < found.difference < found.upper
            if abs(found.lower - against) > 0.02:
                assert (found.lower > against) == (found.p_above <= 0.05)
            if abs(found.upper - against) > 0.02:
                assert (found.upper < against) == (found.p_below <= 0.05)


@pytest.mark.parametrize("test", TESTS)
def test_no_difference_at_all_is_no_evidence(test: str) -> None:
    found = compare_paired(np.zeros(50), against=0.0, test=test, confidence=0.95, resamples=999, seed=0)  # type: ignore[arg-type]
    assert (found.difference, found.lower, found.upper, found.p_above, found.p_below) == (0.0, 0.0, 0.0, 1.0, 1.0)


@pytest.mark.parametrize("test", TESTS)
def test_no_p_value_is_zero(test: str) -> None:
    found = compare_paired(np.full(50, 2.0), against=0.0, test=test, confidence=0.95, resamples=999, seed=0)  # type: ignore[arg-type]
    assert (found.p_above, found.p_below) == (1 / 1000, 1.0)


def test_large_sets_are_drawn_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(4).normal(size=(100, 2))
    whole = bootstrap_interval(values, confidence=0.95, resamples=500, seed=0)
    monkeypatch.setattr(resampling, "_CHUNK", 700)
    parts = bootstrap_interval(values, confidence=0.95, resamples=500, seed=0)
    assert (whole[0] == parts[0]).all()
    assert (whole[1] == parts[1]).all()
