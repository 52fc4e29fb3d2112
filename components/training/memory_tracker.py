"""What tensors hold: the bytes kept for the backward pass, and the height during a step. Two metrics, never one.

The saved bytes are what activation checkpointing changes; the height contains them and whatever else a step needs at
once. Both are counted where memory is handed out, so that nothing is missed: saved tensors, what a checkpoint
policy keeps beside them, gradients an autograd function prepared, buffers of compiled code.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch

Result = TypeVar("Result")


@dataclass
class MemoryUse:
    """Bytes of a device's tensors, relative to the beginning of a `track` block; filled in at its end.

    Attributes:
        held: at the end.
        peak: at the height, at least 0.
    """

    held: int = 0
    peak: int = 0


@contextmanager
def track(device: torch.device | str = "cpu") -> Iterator[MemoryUse]:
    """Measure the tensor memory of a block of code.

    On a CPU from the records of torch's allocator, exact to the byte; what libraries allocate past it is not seen. On
    an accelerator from its caching allocator, which rounds each tensor up (CUDA: to 512 bytes) and whose peak
    statistics this resets. Costs time on a CPU: do not time the same pass.

    Args:
        device: whose memory counts.
    """
    use, kind = MemoryUse(), torch.device(device).type
    if kind == "cpu":
        yield from _track_cpu(use)
    else:
        torch.accelerator.synchronize()
        torch.accelerator.reset_peak_memory_stats()
        before = torch.accelerator.memory_allocated()
        yield use
        torch.accelerator.synchronize()
        use.held = torch.accelerator.memory_allocated() - before
        use.peak = torch.accelerator.max_memory_allocated() - before


def _track_cpu(use: MemoryUse) -> Iterator[MemoryUse]:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler announces each start and stop on stderr
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        yield use
    records = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    for record in records:
        if record.name() == "[memory]" and record.device_type() == torch._C._autograd.DeviceType.CPU:
            use.held += record.nbytes()
            use.peak = max(use.peak, use.held)


def saved_for_backward(forward: Callable[[], Result], device: torch.device | str = "cpu") -> tuple[Result, int]:
    """Run a forward pass and count what it leaves behind.

    Args:
        forward: returns what the backward pass starts from, such as the loss. Weights and inputs exist before and do
            not count; a cast copy of a weight that is kept does.
        device: whose memory counts.

    Returns:
        What `forward` returned, and the bytes held for it and its backward pass.
    """
    with track(device) as use:
        result = forward()
    return result, use.held
