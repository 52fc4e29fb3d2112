"""KernelSynth on several processes. A process that only does this loads numpy and scipy and nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from multiprocessing import get_context

import numpy as np
from threadpoolctl import threadpool_limits

from modelmill.components.forecasting.kernels import KernelSampler, draw_composition

_KERNEL = 0  # keeps the random numbers apart from those of other methods

Made = list[tuple[np.ndarray, str]]  # values of a series, and what it is made of


@dataclass(frozen=True)
class KernelWorker:
    """Makes series by their numbers; the same number gives the same series in any process.

    Attributes:
        length: points of a series.
        max_kernels: combined in a series at most.
        seed: of all random numbers.
    """

    length: int
    max_kernels: int
    seed: int

    @cached_property
    def _sampler(self) -> KernelSampler:
        return KernelSampler(self.length)

    def make(self, numbers: range) -> Made:
        made = []
        for number in numbers:
            random = np.random.default_rng((self.seed, _KERNEL, number))
            composition = draw_composition(random, self.max_kernels)
            made.append((self._sampler.sample(composition, random), str(composition)))
        return made


_worker: KernelWorker | None = None


def _start(worker: KernelWorker) -> None:
    """Set up a process of the pool: BLAS on one thread, as several would only get in each other's way."""
    global _worker
    threadpool_limits(1)
    _worker = worker


def _work(numbers: range) -> Made:
    assert _worker is not None
    return _worker.make(numbers)


def map_chunks(worker: KernelWorker, chunks: Sequence[range], processes: int) -> Iterator[Made]:
    """Make chunks of series, in their order, in this process if `processes` is 1."""
    if processes == 1:
        yield from map(worker.make, chunks)
        return
    with ProcessPoolExecutor(processes, get_context("spawn"), _start, (worker,)) as pool:
        yield from pool.map(_work, chunks)
