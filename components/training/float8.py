"""Linear layers whose products are computed in 8-bit floating point, with one scale for each tensor.

Forward operands are e4m3 (3 bits of mantissa, up to 448), gradients e5m2 (up to 57344), as Micikevicius et al. 2022
(arXiv:2209.05433) recommend for training. Scales are dynamic: the largest magnitude of each tensor, found anew in each
product, becomes the largest number of the format. Weights, their gradients and what lies between the layers keep
their precision; only `torch._scaled_mm` sees 8 bits, and it adds up in fp32.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from modelmill.components.core.errors import UserError
from modelmill.components.training.blocks import blocks
from modelmill.components.training.collectives import local

FORWARD, GRADIENT = torch.float8_e4m3fn, torch.float8_e5m2
MULTIPLE = 16  # what the kernels ask of both dimensions of a weight, and of the rows of a gradient
_SMALLEST_PEAK = 1e-12  # of a tensor of zeros, so that nothing is divided by zero


@lru_cache
def float8_works(device_type: str) -> bool:
    """Whether this machine's device computes all products that training needs, found by trying tiny ones.

    NVIDIA GPUs do from compute capability 8.9 on; a CPU does where torch was built with the kernels.
    """
    if device_type == "cuda" and (not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9)):
        return False
    small = torch.ones(MULTIPLE, MULTIPLE, device=device_type)
    one = torch.ones((), device=device_type)
    try:
        for left in (FORWARD, GRADIENT):
            args = (small.to(left), small.to(FORWARD).t(), one, one)
            found = torch._scaled_mm(*args, out_dtype=torch.bfloat16)
            if not bool((found == MULTIPLE).all()):
                return False
    except (RuntimeError, NotImplementedError, AttributeError):
        return False
    return True


class Float8Linear(nn.Linear):
    """A linear layer that computes its three products in 8 bits; `convert_linears` makes it of an `nn.Linear`.

    Split over tensor-parallel ranks it computes with this rank's part, and a part has a scale of its own.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Map [..., I] to [..., O], in the autocast dtype or that of the input."""
        device = input.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else input.dtype
        with torch.autocast(device, enabled=False):
            output = _Float8Product.apply(input.flatten(0, -2), local(self.weight), dtype)
            output = output.view(*input.shape[:-1], -1)
            return output if self.bias is None else output + self.bias.to(dtype)


def convert_linears(model: nn.Module, tensor: int = 1) -> int:
    """Turn the plain linear layers of a model's blocks into `Float8Linear`, keeping parameters and their names.

    The head and the embedding lie outside the blocks: their inputs or outputs span too wide a range, and most of the
    loss in quality comes from them. Layers with a dimension that is no multiple of 16 on each rank stay as they are.

    Args:
        model: before it is sharded; any device, meta too.
        tensor: ranks that the layers' rows or columns will be split over.

    Returns:
        The number of layers converted.

    Raises:
        UserError: there is no such layer.
    """
    inside = [module for block in blocks(model) for module in block.modules() if type(module) is nn.Linear]
    size = MULTIPLE * tensor
    chosen = [linear for linear in inside if not linear.in_features % size and not linear.out_features % size]
    if not chosen:
        raise UserError(
            "training.precision: 'fp8-mixed' needs linear layers in the model's blocks with dimensions that are"
            f" multiples of {size}, and there are none among {len(inside)}; use bf16-mixed or other sizes"
        )
    for linear in chosen:
        linear.__class__ = Float8Linear
    return len(chosen)


def to_float8(value: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scale a tensor to the range of an 8-bit format and round it to nearest.

    Args:
        value: floating point, of any shape.
        dtype: `FORWARD` or `GRADIENT`.

    Returns:
        The scaled tensor in that format, and the float32 scalar that it times gives the value back.
    """
    largest = torch.finfo(dtype).max
    peak = value.abs().amax().float().clamp(min=_SMALLEST_PEAK)
    inverse = peak / largest
    # A quotient may round to just above the largest number, which e4m3 has no infinity for: it would be nan.
    return (value.float() / inverse).clamp(-largest, largest).to(dtype), inverse


class _Float8Product(torch.autograd.Function):
    """`input @ weight.T` for input [N, I] and weight [O, I]."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        narrow, scale = to_float8(input, FORWARD)
        # The weight is rounded again in the backward pass: kept in 8 bits it would outlive its gathering by FSDP.
        ctx.save_for_backward(narrow, scale, weight)
        ctx.dtypes = (input.dtype, weight.dtype, dtype)
        weight_narrow, weight_scale = to_float8(weight, FORWARD)
        return _product(narrow, weight_narrow.t(), scale, weight_scale, dtype, fast=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        narrow, scale, weight = ctx.saved_tensors
        input_dtype, weight_dtype, dtype = ctx.dtypes
        grad_narrow, grad_scale = to_float8(grad, GRADIENT)
        grad_input = grad_weight = None
        if ctx.needs_input_grad[0]:
            weight_narrow, weight_scale = to_float8(weight, FORWARD)
            grad_input = _product(grad_narrow, _by_columns(weight_narrow), grad_scale, weight_scale, dtype)
            grad_input = grad_input.to(input_dtype)
        if ctx.needs_input_grad[1]:
            missing = (0, 0, 0, -narrow.shape[0] % MULTIPLE)  # rows of zeros add nothing to the sum over rows
            left, right = (_pad(matrix, missing) for matrix in (grad_narrow, narrow))
            grad_weight = _product(left.t().contiguous(), _by_columns(right), grad_scale, scale, dtype)
            grad_weight = grad_weight.to(weight_dtype)
        return grad_input, grad_weight, None


def _pad(matrix: Tensor, missing: tuple[int, int, int, int]) -> Tensor:
    # Padded as bytes: not every device pads 8-bit floats. A byte of zeros is zero in both formats.
    return F.pad(matrix.view(torch.uint8), missing).view(matrix.dtype) if any(missing) else matrix


def _by_columns(matrix: Tensor) -> Tensor:
    """The same matrix laid out by columns, as the kernels want their second operand."""
    return matrix.t().contiguous().t()


def _product(
    left: Tensor, right: Tensor, left_scale: Tensor, right_scale: Tensor, dtype: torch.dtype, *, fast: bool = False
) -> Tensor:
    """`left @ right`, scaled back. `fast` lets a GPU add up in less than fp32, which gradients would suffer from."""
    return torch._scaled_mm(left, right, left_scale, right_scale, out_dtype=dtype, use_fast_accum=fast)
