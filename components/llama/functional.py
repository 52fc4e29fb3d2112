"""The decoder's elementwise operations with hand-written gradients.

Composed from torch primitives these save several full-size intermediates each for the backward pass, which on
a CPU is where the memory and much of the elementwise time of a small model goes. Each `autograd.Function` here
saves only its inputs (or nothing) and writes its gradient into one buffer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

# What the hand-written gradients are used for: float32, and float64 so that exact tests run the same code.
_WIDE = (torch.float32, torch.float64)


def rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`hidden / sqrt(mean(hidden^2) + eps) * weight` (Zhang & Sennrich 2019, arXiv:1910.07467).

    torch's own `rms_norm` is one fused kernel on accelerators; on a CPU it is composed of primitives, and for
    float32 the hand-written gradient takes about half the time forward and backward.

    Args:
        hidden: [..., D].
        weight: [D].
        eps: added to the mean square.

    Returns:
        [..., D] in the dtype of `hidden`.
    """
    plain = hidden.dtype == weight.dtype and hidden.dtype in _WIDE
    if plain and hidden.device.type == "cpu" and not torch.compiler.is_compiling():
        return _RMSNorm.apply(hidden, weight, eps)
    return F.rms_norm(hidden, weight.shape, weight, eps).to(hidden.dtype)


def norm_linear(hidden: Tensor, norm: nn.Module, linear: nn.Module) -> Tensor:
    """`linear(norm(hidden))` for an RMS norm, recomputing the normalised input in the backward pass.

    The gradient of the norm needs the normalised values anyway, so recomputing them costs one product per
    element and saves a [..., D] tensor. Only for float32 on a CPU; elsewhere, under autocast, and when either
    module is not plain (an adapter, a hook), the modules are called one after the other.

    Args:
        hidden: [..., D].
        norm: has `weight` [D] and `eps`.
        linear: has `weight` [O, D].

    Returns:
        [..., O].
    """
    if _fusible(hidden, linear) and not has_hooks(norm) and hidden.device.type == "cpu":
        return _NormLinear.apply(hidden, norm.weight, norm.eps, linear.weight)
    return linear(norm(hidden))


def swiglu_linear(gate_up: Tensor, linear: nn.Module, groups: int = 1) -> Tensor:
    """`linear(silu(gate) * up)`, recomputing the linear's input in the backward pass.

    The gradient of SwiGLU (Shazeer 2020, arXiv:2002.05202) evaluates `silu(gate)` anyway, so this saves a
    [..., I] tensor for one product per element. Under autocast, in half precision, and when `linear` is not
    plain (an adapter, a hook), it is called on the product as usual.

    Args:
        gate_up: [..., 2 * I]: in each of `groups` equal parts the gate first, as a fused projection makes them.
        linear: has `weight` [D, I].
        groups: divides I.

    Returns:
        [..., D].
    """
    if _fusible(gate_up, linear):
        return _SwiGLULinear.apply(gate_up, linear.weight, groups)
    gate, up = _gate_and_up(gate_up, groups)
    return linear((F.silu(gate) * up).flatten(-2))


def _gate_and_up(gate_up: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Views [..., groups, I / groups] of the two halves of each group."""
    gate, up = gate_up.unflatten(-1, (groups, 2, -1)).unbind(-2)
    return gate, up


def has_hooks(module: nn.Module) -> bool:
    """Whether something wants to see calls of the module, so that it must be called."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _fusible(inputs: Tensor, linear: nn.Module) -> bool:
    return (
        type(linear) is nn.Linear
        and linear.bias is None
        and not has_hooks(linear)
        and inputs.dtype == linear.weight.dtype
        and inputs.dtype in _WIDE
        and not torch.is_autocast_enabled(inputs.device.type)
        and not torch.compiler.is_compiling()
    )


def _inverse_rms(hidden: Tensor, eps: float) -> Tensor:
    norm = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True)
    return norm.square_().div_(hidden.shape[-1]).add_(eps).rsqrt_()


def _rms_norm_backward(grad: Tensor, normalized: Tensor, inverse: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of hidden [N, D] and weight [D]; `grad` and `normalized` are [N, D], `inverse` [N, 1]."""
    product = grad * normalized
    grad_weight = product.sum(0)
    projection = torch.mv(product, weight).div_(weight.numel()).unsqueeze(1)
    grad_hidden = torch.mul(grad, weight, out=product).addcmul_(normalized, projection, value=-1)
    return grad_hidden.mul_(inverse), grad_weight


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
        inverse = _inverse_rms(hidden, eps)
        ctx.save_for_backward(hidden, weight, inverse)
        return torch.mul(hidden, inverse).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        hidden, weight, inverse = ctx.saved_tensors
        normalized = (hidden * inverse).flatten(0, -2)
        grad_hidden, grad_weight = _rms_norm_backward(grad.flatten(0, -2), normalized, inverse.view(-1, 1), weight)
        return grad_hidden.view_as(hidden), grad_weight, None


class _NormLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, norm_weight: Tensor, eps: float, weight: Tensor) -> Tensor:
        inverse = _inverse_rms(hidden, eps)
        ctx.save_for_backward(hidden, norm_weight, inverse, weight)
        return F.linear(torch.mul(hidden, inverse).mul_(norm_weight), weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, Tensor]:
        hidden, norm_weight, inverse, weight = ctx.saved_tensors
        grad = grad.flatten(0, -2)
        normalized = (hidden * inverse).flatten(0, -2)
        inputs = normalized * norm_weight
        grad_weight = grad.t() @ inputs
        grad_inputs = torch.mm(grad, weight, out=inputs)
        grad_hidden, grad_norm_weight = _rms_norm_backward(grad_inputs, normalized, inverse.view(-1, 1), norm_weight)
        return grad_hidden.view_as(hidden), grad_norm_weight, None, grad_weight


class _SwiGLULinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, weight: Tensor, groups: int) -> Tensor:
        ctx.save_for_backward(gate_up, weight)
        ctx.groups = groups
        gate, up = _gate_and_up(gate_up, groups)
        return F.linear(F.silu(gate).mul_(up).flatten(-2), weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        gate_up, weight = ctx.saved_tensors
        gate, up = _gate_and_up(gate_up.flatten(0, -2), ctx.groups)
        grad = grad.flatten(0, -2)
        activated = F.silu(gate)
        inputs = activated * up
        grad_weight = grad.t() @ inputs.flatten(1)
        grad_inputs = torch.mm(grad, weight, out=inputs.view(-1, weight.shape[1])).view_as(inputs)
        result = torch.empty_like(gate_up)
        grad_gate, grad_up = _gate_and_up(result.flatten(0, -2), ctx.groups)
        torch.mul(activated, grad_inputs, out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad_inputs.mul_(up), gate, grad_input=grad_gate)
        return result, grad_weight, None


def rotate_and_split(
    qkv: Tensor, cos: Tensor, sin: Tensor, num_heads: int, num_kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Split a fused projection into heads and apply rotary embeddings to queries and keys.

    Rotary embeddings (Su et al. 2021, arXiv:2104.09864) in Hugging Face's "rotate half" convention: dimension i
    of a head is paired with dimension i + Dh/2, so checkpoints need no permutation.

    Args:
        qkv: [B, T, (H + 2 * K) * Dh] in K groups: the H / K query heads of a group, its key head, its value head.
        cos: [T, Dh / 2], cosine of position times inverse frequency.
        sin: [T, Dh / 2], its sine.
        num_heads: H.
        num_kv_heads: K.

    Returns:
        Queries [B, H, T, Dh], keys [B, K, T, Dh] and values [B, K, T, Dh], views of one buffer.
    """
    if torch.compiler.is_compiling():
        return _traceable_rotate_and_split(qkv, cos, sin, num_heads, num_kv_heads)
    return _RotateAndSplit.apply(qkv, cos, sin, num_heads, num_kv_heads)


def _rotate(source: Tensor, target: Tensor, cos: Tensor, sin: Tensor, direction: int) -> None:
    """Rotate heads [B, T, ..., Dh] by `direction` times the angle; `cos` and `sin` are [T, 1.., Dh / 2]."""
    first, second = source.chunk(2, dim=-1)
    target_first, target_second = target.chunk(2, dim=-1)
    torch.mul(first, cos, out=target_first)
    target_first.addcmul_(second, sin, value=-direction)
    torch.mul(second, cos, out=target_second)
    target_second.addcmul_(first, sin, value=direction)


def _traceable_rotate_and_split(
    qkv: Tensor, cos: Tensor, sin: Tensor, num_heads: int, num_kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`rotate_and_split` of primitives, which a compiler fuses itself; writing into views would break its graph."""
    grouped = qkv.unflatten(-1, (num_kv_heads, num_heads // num_kv_heads + 2, -1))
    cos, sin = (table.to(qkv.dtype)[:, None, None] for table in (cos, sin))
    first, second = grouped[..., :-1, :].chunk(2, dim=-1)
    rotated = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    query, key, value = rotated[..., :-1, :].flatten(2, 3), rotated[..., -1, :], grouped[..., -1, :]
    return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)


class _RotateAndSplit(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor, num_heads: int, num_kv_heads: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        batch, length, _ = qkv.shape
        grouped = qkv.unflatten(-1, (num_kv_heads, num_heads // num_kv_heads + 2, -1))
        # A copy, not in place: the projection's output may be held by a hook or an adapter. Queries, keys and values
        # each lie together in it, which attention asks for.
        out = qkv.new_empty(batch, length, num_heads + 2 * num_kv_heads, grouped.shape[-1])
        query, key, value = out.split([num_heads, num_kv_heads, num_kv_heads], dim=2)
        cos, sin = cos.unsqueeze(1).to(qkv.dtype), sin.unsqueeze(1).to(qkv.dtype)
        _rotate(grouped[..., :-2, :], query.unflatten(2, (num_kv_heads, -1)), cos.unsqueeze(1), sin.unsqueeze(1), 1)
        _rotate(grouped[..., -2, :], key, cos, sin, 1)
        value.copy_(grouped[..., -1, :])
        ctx.save_for_backward(cos, sin)
        return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_query: Tensor, grad_key: Tensor, grad_value: Tensor
    ) -> tuple[Tensor, None, None, None, None]:
        cos, sin = ctx.saved_tensors
        batch, num_heads, length, head_dim = grad_query.shape
        num_kv_heads = grad_key.shape[1]
        grad = grad_query.new_empty(batch, length, num_kv_heads, num_heads // num_kv_heads + 2, head_dim)
        query = grad_query.transpose(1, 2).unflatten(2, (num_kv_heads, -1))
        _rotate(query, grad[..., :-2, :], cos.unsqueeze(1), sin.unsqueeze(1), -1)
        _rotate(grad_key.transpose(1, 2), grad[..., -2, :], cos, sin, -1)
        grad[..., -1, :].copy_(grad_value.transpose(1, 2))
        return grad.flatten(2), None, None, None, None
