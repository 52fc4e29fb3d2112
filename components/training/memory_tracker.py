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
    """Bytes of tensors that were made in a `track` block; filled in at its end.

    Attributes:
        held: of those alive at the end.
        peak: of those alive at once at the height.
    """

    held: int = 0
    peak: int = 0


@contextmanager
def track(device: torch.device | str = "cpu") -> Iterator[MemoryUse]:
    """Measure the tensor memory of a block of code.

    On a CPU from the records of torch's allocator, exact to the byte; what libraries allocate past it is not seen. On
    an accelerator from its caching allocator, which rounds each tensor up (CUDA: to 512 bytes), whose peak statistics
    this resets, and where what was there before counts negative when it goes. Costs time on a CPU: do not time the
    same pass.

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

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        yield use
    # The records hang in the tree of the operators that made them.
    waiting = list(profiler.profiler.kineto_results.experimental_event_tree())
    records = []
    while waiting:
        event = waiting.pop()
        waiting.extend(event.children)
        if event.tag.name == "Allocation" and event.extra_fields.device.type == "cpu":
            records.append((event.start_time_ns, event.id, event.extra_fields.ptr, event.extra_fields.alloc_size))
    live: dict[int, int] = {}
    for _, _, address, size in sorted(records):
        if size > 0:
            live[address] = size
            use.held += size
            use.peak = max(use.peak, use.held)
        else:  # of what was there before, torch does not know the size
            use.held -= live.pop(address, 0)


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
