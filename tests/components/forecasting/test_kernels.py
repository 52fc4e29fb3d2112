"""KernelSynth: its kernels against scikit-learn's, its draws against their covariance and against the peer's draws."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy import stats
from sklearn.gaussian_process import kernels as sk

from modelmill.components.forecasting import kernels
from modelmill.components.forecasting.kernels import BANK, BaseKernel, Composition, KernelSampler, draw_composition
from tests.benchmarks import _kernel_synth_peer as peer


def theirs(kernel: BaseKernel, length: int) -> sk.Kernel:
    made: dict[str, Callable[[float], sk.Kernel]] = {
        "periodic": lambda period: sk.ExpSineSquared(periodicity=period / length),
        "linear": lambda sigma: sk.DotProduct(sigma_0=sigma),
        "rbf": lambda scale: sk.RBF(length_scale=scale),
        "quadratic": lambda alpha: sk.RationalQuadratic(alpha=alpha),
        "white": lambda level: sk.WhiteKernel(noise_level=level),
        "constant": lambda value: sk.ConstantKernel(value),
    }
    return made[kernel.kind](kernel.parameter)


def number(kind: str, parameter: float) -> int:
    return BANK.index(BaseKernel(kind, parameter))  # type: ignore[arg-type]


def test_the_bank_is_the_peers() -> None:
    assert sorted(str(theirs(kernel, 1024)) for kernel in BANK) == sorted(map(str, peer.bank(1024)))


@pytest.mark.parametrize("kernel", sorted(set(BANK), key=str), ids=str)
def test_gram_matrices_are_scikit_learns_and_factors_give_them_back(kernel: BaseKernel) -> None:
    length = 200
    gram = kernel.gram(length)
    expected = theirs(kernel, length)(np.linspace(0, 1, length)[:, None])
    np.testing.assert_allclose(gram, expected, rtol=0, atol=1e-10)
    if kernel.kind != "white":
        factor = kernels.factorise(gram)
        assert factor.shape[1] <= 30
        np.testing.assert_allclose(factor @ factor.T, gram, rtol=0, atol=1e-8 * gram.max())


P, L, R, Q, W, C = (
    number("periodic", 7),
    number("linear", 10.0),
    number("rbf", 0.1),
    number("quadratic", 1.0),
    number("white", 0.1),
    number("constant", 1.0),
)
COMPOSITIONS = {
    "periodic(7)": Composition((P,), ""),
    "white(0.1)": Composition((W,), ""),
    "periodic(7) + linear(10)": Composition((P, L), "+"),
    "rbf(0.1) * linear(10)": Composition((R, L), "*"),
    "(constant + rbf(0.1)) * quadratic(1)": Composition((C, R, Q), "+*"),
    "quadratic(1) * linear(10) + white(0.1)": Composition((Q, L, W), "*+"),
    "(quadratic(1) + linear(10)) * white(0.1)": Composition((Q, L, W), "+*"),
    "((quadratic(1) + linear(10)) * rbf(0.1) + constant) * linear(10)": Composition((Q, L, R, C, L), "+*+*"),
}


class OneAtATime:
    """Stands for a generator: all normal numbers are 0 but one, which is 1."""

    def __init__(self, chosen: int) -> None:
        self.chosen, self.drawn = chosen, 0

    def standard_normal(self, shape: Any) -> np.ndarray:
        values = np.zeros(shape)
        if 0 <= self.chosen - self.drawn < values.size:
            values.flat[self.chosen - self.drawn] = 1.0
        self.drawn += values.size
        return values


@pytest.mark.parametrize("fallback", [False, True], ids=["products", "cholesky"])
@pytest.mark.parametrize("text", COMPOSITIONS)
def test_draws_have_exactly_the_covariance_of_their_kernel(
    text: str, fallback: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A draw is linear in the normal numbers, so the outer products of what each contributes sum to the covariance."""
    if fallback:
        monkeypatch.setattr(kernels, "_LARGEST", 0)
    composition = COMPOSITIONS[text]
    assert str(composition) == text
    length = 12
    sampler = KernelSampler(length)
    count = OneAtATime(-1)
    sampler.sample(composition, count)  # type: ignore[arg-type]
    parts = [sampler.sample(composition, OneAtATime(chosen)) for chosen in range(count.drawn)]  # type: ignore[arg-type]
    gram = composition.gram(length)
    np.testing.assert_allclose(sum(np.outer(part, part) for part in parts), gram, rtol=0, atol=1e-8 * gram.max())


def test_terms_are_the_composition_multiplied_out() -> None:
    assert Composition((1, 2, 3, 4, 5), "+*+*").terms() == [(1, 3, 5), (2, 3, 5), (4, 5)]


LENGTH, COUNT = 64, 500
MEASURES: dict[str, Callable[[np.ndarray], float]] = {
    "variance": lambda x: float(np.log(x.var() + 1e-9)),
    "mean": lambda x: float(np.arcsinh(x.mean())),
    "lag 1": lambda x: _correlation(x, 1),
    "lag 7": lambda x: _correlation(x, 7),
    "lag 24": lambda x: _correlation(x, 24),
    "kurtosis": lambda x: float((((x - x.mean()) / x.std()) ** 4).mean()) if x.std() > 1e-6 else 0.0,
}


def _correlation(x: np.ndarray, lag: int) -> float:
    if x.std() < 1e-6:
        return 2.0  # a constant series
    y = x - x.mean()
    return float((y[lag:] * y[:-lag]).sum() / (y * y).sum())


def ours(count: int, max_kernels: int = 5) -> tuple[list[np.ndarray], list[int]]:
    sampler, random = KernelSampler(LENGTH), np.random.default_rng(5)
    compositions = [draw_composition(random, max_kernels) for _ in range(count)]
    sizes = [len(composition.kernels) for composition in compositions]
    return [sampler.sample(composition, random) for composition in compositions], sizes


@pytest.fixture(scope="module")
def peers() -> tuple[list[np.ndarray], list[int]]:
    random = np.random.RandomState(6)
    drawn = [peer.generate(random, LENGTH) for _ in range(COUNT)]
    return [series.values for series in drawn], [series.kernels for series in drawn]


@pytest.fixture(scope="module")
def own() -> tuple[list[np.ndarray], list[int]]:
    return ours(2 * COUNT)


@pytest.mark.parametrize("measure", MEASURES)
def test_series_are_distributed_as_the_peers(
    measure: str, own: tuple[list[np.ndarray], Any], peers: tuple[list[np.ndarray], Any]
) -> None:
    """Two samples from one distribution are this far apart once in a thousand times; the draws here are fixed."""
    found, expected = ([MEASURES[measure](x) for x in series] for series in (own[0], peers[0]))
    assert stats.ks_2samp(found, expected).pvalue > 1e-3


def test_the_number_of_kernels_is_even(own: tuple[Any, list[int]], peers: tuple[Any, list[int]]) -> None:
    for _, sizes in (own, peers):
        assert stats.chisquare(np.bincount(sizes, minlength=6)[1:]).pvalue > 1e-3


def test_the_comparison_would_see_fewer_kernels(peers: tuple[list[np.ndarray], Any]) -> None:
    few, _ = ours(COUNT, max_kernels=2)
    values = [[MEASURES["variance"](x) for x in series] for series in (few, peers[0])]
    assert stats.ks_2samp(*values).pvalue < 1e-3
