"""How one peer of a training benchmark is measured in its own process. Imports nothing of ours or of a peer's: some
peers do not install beside the rest and run in another environment.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


class Turns:
    """Makes a training run wait for its turn after every optimizer step; the same hook serves every peer.

    A turn is everything from one update of the weights to the next: fetching data, logging, all of it.
    """

    def __init__(self, steps: int) -> None:
        self.left = steps
        self.began: float | None = None
        # Libraries print to stdout as they like; the turns are spoken on a descriptor of their own.
        self.out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        optimizer.register_step_post_hook(lambda *_: self._step_done())

    def loss(self, value: torch.Tensor) -> None:
        """Losses are compared in a run of their own."""

    def say(self, value: Any) -> None:
        print(json.dumps(value), file=self.out, flush=True)

    def _step_done(self) -> None:
        self.say(None if self.began is None else time.perf_counter() - self.began)
        self.left -= 1
        if self.left:
            sys.stdin.readline()
        self.began = time.perf_counter()


class Losses:
    """Keeps the loss of every step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        """Nothing to do after a step."""

    def loss(self, value: torch.Tensor) -> None:
        self.values.append(value.item())


Records = Turns | Losses
Runner = Callable[[Path, int, Records], None]
"""Folder with weights and batches, steps, and what watches the run."""


def measure(run: Runner, mode: str, folder: Path, steps: int) -> None:
    """Run a peer and print what was asked for as JSON.

    Args:
        run: the peer.
        mode: `check` (the losses of all steps), `memory` (the height of what torch's CPU allocator handed out, in
            bytes) or `turns` (one step a line of input, answered with its seconds; last the
            growth of resident memory).
        folder: weights and batches.
        steps: of the run.
    """
    if mode == "check":
        losses = Losses()
        run(folder, steps, losses)
        print(json.dumps(losses.values))
    elif mode == "memory":
        print(json.dumps(allocated_height(lambda: run(folder, steps, Losses()))))
    else:
        turns, before = Turns(steps), resident_peak()
        run(folder, steps, turns)
        turns.say(resident_peak() - before)


def allocated_height(run: Callable[[], None]) -> int:
    """Largest number of bytes torch's CPU allocator had handed out at once while `run` ran."""
    # `modelmill.components.training.memory_tracker.track` counts the same bytes, and would serve all peers but the
    # one that runs in an environment without modelmill: every peer must be measured by one piece of code.
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    held = height = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            height = max(height, held)
    return height


def resident_peak() -> int:
    """Most bytes this process has had in memory."""
    # Linux counts in KiB, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
