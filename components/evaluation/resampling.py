"""Confidence intervals and paired tests by resampling examples.

Efron, B. & Tibshirani, R. (1993): An Introduction to the Bootstrap (percentile intervals, chapter 13; permutation
tests, chapter 15). Smucker et al. (2007): both tests on paired scores of two systems. Phipson & Smyth (2010): p-values
count the observed arrangement as one of those drawn, so that they are never 0 and never too small.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]
_CHUNK = 1 << 22  # numbers drawn at a time: 32 MB


@dataclass(frozen=True)
class PairedComparison:
    """How paired differences lie to a value that they are tested against.

    Attributes:
        difference: their mean.
        lower: bound that the mean exceeds, by the bootstrap, with the stated confidence.
        upper: bound that it stays below with the same confidence.
        p_above: p-value of the hypothesis that the mean is at most the tested value.
        p_below: p-value of the hypothesis that the mean is at least the tested value.
    """

    difference: float
    lower: float
    upper: float
    p_above: float
    p_below: float


def bootstrap_interval(values: Values, *, confidence: float, resamples: int, seed: int) -> tuple[Values, Values]:
    """Two-sided percentile intervals of the means of columns.

    Args:
        values: [n, k], one row an example; all columns see the same resamples.
        confidence: share of the resampled means inside the interval.
        resamples: how many.
        seed: of the draws.

    Returns:
        Lower and upper bounds, [k] each.
    """
    means = _bootstrap_means(values, resamples, seed)
    tail = (1 - confidence) / 2
    lower, upper = np.quantile(means, [tail, 1 - tail], axis=0)
    return lower, upper


def bootstrap_ratio_interval(
    above: Values, below: Values, *, confidence: float, resamples: int, seed: int
) -> tuple[Values, Values]:
    """Two-sided percentile intervals of ratios of sums, such as a loss over all tokens of all examples.

    Args:
        above: what is summed above the line, [n, k], one row an example.
        below: the same below it, [n, k], positive.
        confidence: share of the resampled ratios inside the interval.
        resamples: how many.
        seed: of the draws.

    Returns:
        Lower and upper bounds, [k] each.
    """
    columns = above.shape[1]
    means = _bootstrap_means(np.concatenate([above, below], axis=1), resamples, seed)
    tail = (1 - confidence) / 2
    lower, upper = np.quantile(means[:, :columns] / means[:, columns:], [tail, 1 - tail], axis=0)
    return lower, upper


def compare_paired(
    differences: Values,
    *,
    against: float,
    test: Literal["bootstrap", "permutation"],
    confidence: float,
    resamples: int,
    seed: int,
) -> PairedComparison:
    """Test whether the mean of paired differences lies above or below a value.

    The permutation test draws the sign of every difference from `against`; it is exact where the two systems are
    interchangeable, however few examples there are. The bootstrap asks only that examples are drawn independently, but
    needs some dozens of them.

    Args:
        differences: [n], one system minus the other, example by example.
        against: the tested value.
        test: where the p-values come from; the bounds are the bootstrap's in both cases.
        confidence: of each bound taken alone.
        resamples: how many.
        seed: of the draws.
    """
    means = _bootstrap_means(differences[:, None], resamples, seed)[:, 0]
    lower, upper = np.quantile(means, [1 - confidence, confidence])
    if test == "bootstrap":
        above, below = int((means <= against).sum()), int((means >= against).sum())
    else:
        above, below = _permuted(differences - against, resamples, seed)
    return PairedComparison(
        difference=float(differences.mean()),
        lower=float(lower),
        upper=float(upper),
        p_above=(1 + above) / (1 + resamples),
        p_below=(1 + below) / (1 + resamples),
    )


def _bootstrap_means(values: Values, resamples: int, seed: int) -> Values:
    """Means of examples drawn with replacement: [resamples, k]."""
    generator = np.random.default_rng([seed, 0])
    count, columns = values.shape

    def draw(rows: int) -> Values:
        chosen = generator.integers(0, count, (rows, count))
        # Gathered and added up rather than multiplied: a matrix product's last digits depend on the machine.
        return np.stack([values[:, column][chosen].mean(axis=1) for column in range(columns)], axis=1)

    return np.concatenate(_in_chunks(draw, resamples, count))


def _permuted(differences: Values, resamples: int, seed: int) -> tuple[int, int]:
    """How often a sum with random signs is at least, and at most, the observed one."""
    generator = np.random.default_rng([seed, 1])
    count = len(differences)

    def draw(rows: int) -> Values:
        heads = generator.integers(0, 2, (rows, count), dtype=np.int8).astype(bool)
        return np.where(heads, differences, -differences).sum(axis=1)

    sums, observed = np.concatenate(_in_chunks(draw, resamples, count)), differences.sum()
    rounding = 1e-12 * np.abs(differences).sum()  # equal sums must not differ by the order of their terms
    return int(np.count_nonzero(sums >= observed - rounding)), int(np.count_nonzero(sums <= observed + rounding))


def _in_chunks(draw: Callable[[int], Values], resamples: int, count: int) -> list[Values]:
    rows = max(1, _CHUNK // count)
    return [draw(min(rows, resamples - begin)) for begin in range(0, resamples, rows)]
