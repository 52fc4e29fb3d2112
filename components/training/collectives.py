"""Collectives of tensor and sequence parallelism that autograd sees through.

The scheme of Megatron-LM (Shoeybi et al. 2019, arXiv:1909.08053) and its sequence parallelism (Korthikanti et al.
2022, arXiv:2205.05198): what is an identity in one direction is a sum over the ranks in the other, and a gather in one
is a sum that is scattered in the other. They are torch's functional collectives, which gloo and nccl both serve, a
compiler can trace, and a checkpoint policy can name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

_SEQUENCE = 1  # of hidden states [B, T, D]
_ops = torch.ops._c10d_functional


class RankGroup(NamedTuple):
    """Ranks that take part in a collective, described by plain values, which compilers take for constants.

    Attributes:
        name: of the process group, as torch knows it.
        size: ranks in it.
        rank: this rank's place among them.
    """

    name: str
    size: int
    rank: int

    @classmethod
    def of(cls, group: ProcessGroup) -> RankGroup:
        """Describe a process group that this rank belongs to."""
        return cls(group.group_name, group.size(), group.rank())


@dataclass(frozen=True)
class TensorParallel:
    """How the ranks that share a layer's matrices pass hidden states to one another.

    Between the matrices the hidden states are whole and the same on every rank, or with `sequence_parallel` each rank
    holds the positions of its own, [B, T / size, D]: norms are then computed once and not on every rank.

    Attributes:
        group: the ranks.
        sequence_parallel: whether they split the positions too.
    """

    group: RankGroup
    sequence_parallel: bool

    def enter(self, hidden: Tensor) -> Tensor:
        """What matrices cut by rows read: [B, T / size, D] or [B, T, D] to [B, T, D], its gradient summed."""
        return gather(hidden, _SEQUENCE, self.group) if self.sequence_parallel else copy(hidden, self.group)

    def leave(self, partial: Tensor) -> Tensor:
        """Sum what matrices cut by columns made: [B, T, D] to [B, T / size, D] or [B, T, D]."""
        if self.sequence_parallel:
            return reduce_scatter(partial, _SEQUENCE, self.group)
        return reduce(partial, self.group)

    def whole(self, hidden: Tensor) -> Tensor:
        """What lies between the matrices as [B, T, D], to be used in the same way on every rank."""
        return gather_replicated(hidden, _SEQUENCE, self.group) if self.sequence_parallel else hidden


def local(parameter: Tensor) -> Tensor:
    """This rank's part of a distributed parameter, its gradient having the same placements; a plain one itself."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def all_reduce(tensor: Tensor, group: RankGroup, operation: str = "sum") -> Tensor:
    """The sum (or "max") over the ranks, as a new tensor of the same shape; without a gradient."""
    return _ops.wait_tensor(_ops.all_reduce(tensor.contiguous(), operation, group.name))


def copy(tensor: Tensor, group: RankGroup) -> Tensor:
    """The tensor itself, the same on every rank; its gradient is summed over the ranks."""
    return _Copy.apply(tensor, group)


def reduce(partial: Tensor, group: RankGroup) -> Tensor:
    """The sum over the ranks; every addend gets the whole gradient, which must be the same on every rank."""
    return _Reduce.apply(partial, group)


def gather(part: Tensor, dim: int, group: RankGroup) -> Tensor:
    """The ranks' parts joined along `dim` in rank order, for use in ways that differ between the ranks.

    Args:
        part: [..., n, ...], as large on every rank.
        dim: not negative.
        group: the ranks.

    Returns:
        [..., size * n, ...]; its gradient is summed over the ranks, and each takes its part.
    """
    return _Gather.apply(part, dim, group)


def gather_replicated(part: Tensor, dim: int, group: RankGroup) -> Tensor:
    """`gather` for what every rank goes on to use in the same way: the gradient, equal everywhere, is not summed."""
    return _GatherReplicated.apply(part, dim, group)


def reduce_scatter(partial: Tensor, dim: int, group: RankGroup) -> Tensor:
    """This rank's part along `dim` of the sum over the ranks.

    Args:
        partial: [..., size * n, ...].
        dim: not negative.
        group: the ranks.

    Returns:
        [..., n, ...]; the addends' gradient is the ranks' gradients joined.
    """
    return _ReduceScatter.apply(partial, dim, group)


def gather_linear(part: Tensor, weight: Tensor, group: RankGroup) -> Tensor:
    """`F.linear(gather(part, 1, group), weight)`, of which only the part is kept for the backward pass.

    That gathers it a second time, beside its first product (Korthikanti et al. 2022, section 4.2.2): the gathered
    inputs of a layer's projections would take as much memory as all that it keeps otherwise. Under autocast the
    ranks exchange the narrow type.

    Args:
        part: [B, T / size, D], this rank's positions.
        weight: [O, D], this rank's rows.
        group: the ranks.

    Returns:
        [B, T, O].
    """
    device = part.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        part, weight = part.to(dtype), weight.to(dtype)
    with torch.autocast(device, enabled=False):
        return _GatherLinear.apply(part, weight, group)


def _all_gather(part: Tensor, dim: int, group: RankGroup) -> Tensor:
    return _joined(_start_gather(part, group), dim, group)


def _start_gather(part: Tensor, group: RankGroup) -> Tensor:
    """Parts on their way, to be used after `_joined` only."""
    return _ops.all_gather_into_tensor(part.contiguous(), group.size, group.name)


def _joined(parts: Tensor, dim: int, group: RankGroup) -> Tensor:
    parts = _ops.wait_tensor(parts)
    if dim == 0:
        return parts
    # The parts lie one after the other; joining them along `dim` is a copy, unless all dimensions before it are 1.
    return parts.unflatten(0, (group.size, -1)).movedim(0, dim).flatten(dim, dim + 1)


def _reduce_scatter(whole: Tensor, dim: int, group: RankGroup) -> Tensor:
    parts = whole.unflatten(dim, (group.size, -1)).movedim(dim, 0).flatten(0, 1) if dim else whole
    return _ops.wait_tensor(_ops.reduce_scatter_tensor(parts.contiguous(), "sum", group.size, group.name))


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: RankGroup) -> Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return all_reduce(grad, ctx.group), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, partial: Tensor, group: RankGroup) -> Tensor:
        return all_reduce(partial, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, dim: int, group: RankGroup) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return _all_gather(part, dim, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _reduce_scatter(grad, ctx.dim, ctx.group), None, None


class _GatherReplicated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, dim: int, group: RankGroup) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return _all_gather(part, dim, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.chunk(ctx.group.size, ctx.dim)[ctx.group.rank], None, None


class _GatherLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, weight: Tensor, group: RankGroup) -> Tensor:
        ctx.save_for_backward(part, weight)
        ctx.group = group
        return F.linear(_all_gather(part, _SEQUENCE, group), weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        part, weight = ctx.saved_tensors
        grad_part = grad_weight = None
        parts = _start_gather(part, ctx.group) if ctx.needs_input_grad[1] else None
        if ctx.needs_input_grad[0]:
            grad_part = _reduce_scatter(grad @ weight, _SEQUENCE, ctx.group)
        if parts is not None:
            whole = _joined(parts, _SEQUENCE, ctx.group)
            grad_weight = grad.flatten(0, -2).t() @ whole.flatten(0, -2)
        return grad_part, grad_weight, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, partial: Tensor, dim: int, group: RankGroup) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return _reduce_scatter(partial, dim, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _all_gather(grad, ctx.dim, ctx.group), None, None
