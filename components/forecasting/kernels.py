"""KernelSynth: random series from Gaussian processes whose kernels are put together at random.

The kernel bank and the way of putting kernels together are those of Chronos (Ansari et al. 2024, arXiv:2403.07815,
section 4.2 and appendix A). Sampling differs: nothing is factorised for each series.

A composition ((k1 op k2) op k3) ... of `+` and `*` is a sum of products of kernels of the bank, and a draw of a sum is
the sum of independent draws of its terms. Each kernel of the bank is `F F'` with a thin factor `F` [length, rank] from
a pivoted Cholesky factorisation of its Gram matrix, made once (rank is at most 27 at 1024 points: these kernels are
smooth or periodic). A product of kernels is then the Gram matrix of the row-wise products of their factors'
columns, so a draw is the sum over a, b, ... of `F1[t, a] F2[t, b] ... z[a, b, ...]` with independent normal `z`. White
noise times anything is white noise with the other's variance. Only a product whose ranks multiply to more than a
Cholesky factorisation costs falls back to one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.linalg.lapack import dpstrf

# Steps of a period, for data of a quarter of an hour up to a year.
PERIODS = (24, 48, 96, 168, 336, 672, 7, 14, 30, 60, 365, 730, 4, 26, 52, 4, 6, 12, 4, 40, 10)
_TOLERANCE = 1e-9  # of a variance, relative to the largest
_LARGEST = 200_000  # product of ranks: beyond it, factorising the product is cheaper and takes less memory


@dataclass(frozen=True)
class BaseKernel:
    """A kernel of the bank on times `x` from 0 to 1; a periodic one's parameter counts steps.

    periodic: exp(-2 sin^2(pi |x - y| / p)), linear: sigma^2 + x y, rbf: exp(-|x - y|^2 / 2 l^2),
    quadratic (rational): (1 + |x - y|^2 / 2 alpha)^-alpha, white: level where x is y, constant: 1.
    """

    kind: Literal["periodic", "linear", "rbf", "quadratic", "white", "constant"]
    parameter: float = 1.0

    def __str__(self) -> str:
        return self.kind if self.kind == "constant" else f"{self.kind}({self.parameter:g})"

    def gram(self, length: int) -> np.ndarray:
        """Its Gram matrix at `length` times from 0 to 1, float64 [length, length]."""
        x = np.linspace(0.0, 1.0, length)
        if self.kind == "linear":
            return self.parameter**2 + np.outer(x, x)
        if self.kind == "white":
            return self.parameter * np.eye(length)
        if self.kind == "constant":
            return np.ones((length, length))
        apart = np.abs(x[:, None] - x[None, :])
        if self.kind == "periodic":
            return np.exp(-2.0 * np.sin(np.pi * apart * length / self.parameter) ** 2)
        if self.kind == "rbf":
            return np.exp(-0.5 * (apart / self.parameter) ** 2)
        return (1.0 + apart**2 / (2.0 * self.parameter)) ** -self.parameter


BANK = (
    *(BaseKernel("periodic", period) for period in PERIODS),
    *(BaseKernel("linear", sigma) for sigma in (0.0, 1.0, 10.0)),
    *(BaseKernel("rbf", scale) for scale in (0.1, 1.0, 10.0)),
    *(BaseKernel("quadratic", alpha) for alpha in (0.1, 1.0, 10.0)),
    *(BaseKernel("white", level) for level in (0.1, 1.0)),
    BaseKernel("constant"),
)


@dataclass(frozen=True)
class Composition:
    """Kernels of the bank by number, put together from the left: ((k0 op0 k1) op1 k2) ..."""

    kernels: tuple[int, ...]
    operators: str  # of `+` and `*`, one less than kernels

    def __str__(self) -> str:
        text, before = str(BANK[self.kernels[0]]), ""
        for operator, kernel in zip(self.operators, self.kernels[1:], strict=True):
            text = f"({text})" if (before, operator) == ("+", "*") else text
            text, before = f"{text} {operator} {BANK[kernel]}", operator
        return text

    def terms(self) -> list[tuple[int, ...]]:
        """The same as a sum of products."""
        terms = [self.kernels[:1]]
        for operator, kernel in zip(self.operators, self.kernels[1:], strict=True):
            terms = [*terms, (kernel,)] if operator == "+" else [(*term, kernel) for term in terms]
        return terms

    def gram(self, length: int) -> np.ndarray:
        """Covariance of a draw, float64 [length, length]."""
        whole = BANK[self.kernels[0]].gram(length)
        for operator, kernel in zip(self.operators, self.kernels[1:], strict=True):
            other = BANK[kernel].gram(length)
            whole = whole + other if operator == "+" else whole * other
        return whole


def draw_composition(random: np.random.Generator, max_kernels: int) -> Composition:
    """A random number of kernels from 1 to `max_kernels`, each any of the bank, and random operators, all evenly."""
    count = int(random.integers(1, max_kernels + 1))
    kernels = tuple(int(number) for number in random.integers(0, len(BANK), count))
    return Composition(kernels, "".join("+*"[number] for number in random.integers(0, 2, count - 1)))


def factorise(gram: np.ndarray) -> np.ndarray:
    """Thin factor `F` [n, rank] with `F F'` equal to a positive semidefinite matrix to within the tolerance."""
    limit = _TOLERANCE * float(np.diag(gram).max())
    lower, pivots, rank, _ = dpstrf(np.asfortranarray(gram), tol=limit, lower=1)
    factor = np.zeros((len(gram), rank))
    factor[pivots - 1] = np.tril(lower[:, :rank])
    return factor


class KernelSampler:
    """Draws of a length, with the factors of the bank made once."""

    def __init__(self, length: int) -> None:
        self.length = length
        # Several kernels of the bank are equal; white noise has no thin factor.
        thin = {kernel: factorise(kernel.gram(length)) for kernel in set(BANK) if kernel.kind != "white"}
        self._factors = [thin.get(kernel) for kernel in BANK]

    def sample(self, composition: Composition, random: np.random.Generator) -> np.ndarray:
        """One draw of a Gaussian process with mean zero, float64 [length]."""
        return np.sum([self._term(term, random) for term in composition.terms()], axis=0)

    def _term(self, term: tuple[int, ...], random: np.random.Generator) -> np.ndarray:
        factors = [factor for number in term if (factor := self._factors[number]) is not None]
        levels = [BANK[number].parameter for number in term if self._factors[number] is None]
        if levels:
            variance = math.prod(levels) * math.prod((np.square(factor).sum(axis=1) for factor in factors), start=1.0)
            return np.sqrt(variance) * random.standard_normal(self.length)
        factors.sort(key=lambda factor: -factor.shape[1])  # the widest first: what is left is smallest then
        if math.prod(factor.shape[1] for factor in factors) > _LARGEST:
            factors = [factorise(math.prod(factor @ factor.T for factor in factors))]
        draw = random.standard_normal([factor.shape[1] for factor in factors])
        rest = factors[0] @ draw.reshape(draw.shape[0], -1)
        for factor in factors[1:]:
            rest = np.einsum("ta,tab->tb", factor, rest.reshape(self.length, factor.shape[1], -1))
        return rest[:, 0]
