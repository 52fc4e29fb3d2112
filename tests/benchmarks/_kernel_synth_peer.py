"""KernelSynth as Chronos describes it (Ansari et al. 2024, arXiv:2403.07815), with scikit-learn's kernels and sampler.

The peer of `modelmill.components.forecasting.kernels`: for every series it evaluates the composed kernel and lets
`GaussianProcessRegressor.sample_y` factorise it by singular values, which is what the published script does.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process import kernels as sk

PERIODS_OF = {
    "quarter hour": (96, 96 * 7),
    "half hour": (48, 48 * 7),
    "hour": (24, 24 * 7),
    "half day": (14, 60, 365 * 2),
    "day": (7, 30, 365),
    "week": (4, 26, 52),
    "month": (4, 6, 12),
    "quarter": (4, 40),
    "year": (10,),
}


@dataclass(frozen=True)
class PeerSeries:
    """A series with the number of kernels it was drawn from."""

    values: np.ndarray
    kernels: int


def bank(length: int) -> list[sk.Kernel]:
    """scikit-learn's kernels for series of a length on times from 0 to 1."""
    periods = [period for group in PERIODS_OF.values() for period in group]
    return [
        *(sk.ExpSineSquared(length_scale=1.0, periodicity=period / length) for period in periods),
        *(sk.DotProduct(sigma_0=sigma) for sigma in (0.0, 1.0, 10.0)),
        *(sk.RBF(length_scale=scale) for scale in (0.1, 1.0, 10.0)),
        *(sk.RationalQuadratic(length_scale=1.0, alpha=alpha) for alpha in (0.1, 1.0, 10.0)),
        *(sk.WhiteKernel(noise_level=level) for level in (0.1, 1.0)),
        sk.ConstantKernel(1.0),
    ]


def generate(random: np.random.RandomState, length: int = 1024, max_kernels: int = 5) -> PeerSeries:
    """One series; a kernel whose factorisation fails is drawn again."""
    kernels, times = bank(length), np.linspace(0.0, 1.0, length)[:, None]
    while True:
        count = int(random.randint(1, max_kernels + 1))
        chosen = [kernels[number] for number in random.randint(0, len(kernels), count)]
        plus = iter(random.randint(0, 2, count))
        kernel = functools.reduce(lambda left, right: left + right if next(plus) else left * right, chosen)
        try:
            draw = GaussianProcessRegressor(kernel=kernel).sample_y(times, random_state=random.randint(2**31 - 1))
        except np.linalg.LinAlgError:
            continue
        return PeerSeries(draw[:, 0], count)
