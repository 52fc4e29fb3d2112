"""The norm of a gradient that lies in pieces on many ranks, and clipping by it, without waiting for the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from modelmill.components.training.shards import copies, local_part


@torch.no_grad()
def global_norm(tensors: Sequence[Tensor], world_size: int) -> Tensor:
    """L2 norm of all tensors together, the same on every rank: of gradients, or of weights.

    Each rank sums the squares of what it holds, divided by the number of ranks that hold the same, and one
    all-reduce adds them up; tensors that every rank holds whole need none. Half precision is squared in fp32.

    Args:
        tensors: plain ones are the same on all ranks, distributed ones span all ranks; called by all with the same.
        world_size: ranks of the process group.

    Returns:
        A scalar on the tensors' device, fp32, or fp64 when one of them is; 0 of no tensors.

    Raises:
        RuntimeError: a tensor spans some ranks only, or holds sums that are still to be added up.
    """
    by_copies: dict[int, list[Tensor]] = {}
    for tensor in tensors:
        by_copies.setdefault(copies(tensor, world_size), []).append(local_part(tensor))
    if not by_copies:
        return torch.zeros(())
    # Decided by the placements, not by what is left on this rank: all ranks must take the same way.
    if set(by_copies) == {world_size}:
        return _local_norm(by_copies[world_size])
    total = torch.stack([_local_norm(group).square() / number for number, group in by_copies.items()]).sum()
    dist.all_reduce(total)
    return total.sqrt()


@torch.no_grad()
def scale_to_norm(gradients: Sequence[Tensor], norm: Tensor, limit: float) -> None:
    """Scale gradients down to a norm of `limit` where theirs is above it, as `nn.utils.clip_grad_norm_` does.

    Args:
        gradients: changed in place.
        norm: of all of them, from `global_norm`; stays on the device.
        limit: largest norm.
    """
    if gradients:
        torch._foreach_mul_([local_part(gradient) for gradient in gradients], (limit / (norm + 1e-6)).clamp(max=1.0))


def _local_norm(tensors: list[Tensor]) -> Tensor:
    """Norm of some of this rank's tensors, whose dtypes may differ."""
    precise = torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
    norms = torch._foreach_norm(tensors, 2, dtype=precise)
    return torch.linalg.vector_norm(torch.stack(norms))
