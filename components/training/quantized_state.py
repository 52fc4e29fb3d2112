"""Tensors kept in 8 bits: blocks of 256 numbers, each block with a scale of its own, each number one of 256 codes.

Block-wise dynamic quantisation of optimizer states (Dettmers et al. 2022, arXiv:2110.02861). The codes stand closer
together the smaller they are: a run of zero bits is a decimal exponent, the bits behind it are a linear fraction
(dynamic tree, Dettmers 2016, arXiv:1511.04561), so a block spans seven orders of magnitude. A scale for every 256
numbers keeps an outlier from spoiling the rest of the tensor.

Two details differ from the paper, so that what was quantised once is not changed by being quantised again (a run that
goes on from a checkpoint does so), and so that an update stays bounded:

- A block's scale is its number of largest magnitude with its sign, which the code +1 then gives back exactly. Scaled
  by the magnitude alone a negative one would shrink each time: there is no code -1.
- Of a second moment, only zero becomes zero. One rounded to zero would leave eps as the whole denominator.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK = 256
_SMALLEST_SCALE = 2.0**-100  # below it products with the smallest code would leave the normal floats


@dataclass(frozen=True)
class Codebook:
    """The 256 codes and what finding the nearest one needs.

    Attributes:
        values: float32 [256], rising, 0 and 1 among them.
        bounds: float32 [256], a number above `bounds[i]` is nearer to code i + 1 than to i; the last is infinite.
        first: uint8 [65536], by the upper half of a float32's bits the lowest code for such numbers. The codes are
            far enough apart that the number belongs to this one or to the next.
    """

    values: Tensor
    bounds: Tensor
    first: Tensor


@lru_cache(maxsize=8)
def codebook(signed: bool, device: torch.device) -> Codebook:
    """Codes in (-1, 1] for first moments, or in [0, 1] for second ones, whose sign bit is one more of the fraction."""
    magnitudes = []
    for exponent in range(7):  # 10^-6 to 10^0; a short run of zeros leaves more bits for the fraction
        edges = torch.linspace(0.1, 1.0, 2 ** (exponent + (0 if signed else 1)) + 1, dtype=torch.float64)
        magnitudes.append((edges[:-1] + edges[1:]) / 2 * 10.0 ** (exponent - 6))
    positive = torch.cat([*magnitudes, torch.ones(1, dtype=torch.float64)])
    negative = -positive[:-1].flip(0) if signed else positive[:0]
    values = torch.cat([negative, torch.zeros(1, dtype=torch.float64), positive]).float()
    bounds = torch.cat([(values[:-1] + values[1:]) / 2, torch.full((1,), torch.inf)])
    if not signed:
        bounds[0] = 0.0
    # The smallest number whose bits begin with each upper half: of a negative one the largest magnitude.
    upper = torch.arange(2**16, dtype=torch.int32)
    lowest = torch.where(upper < 2**15, upper << 16, (upper << 16) | 0xFFFF).view(torch.float32)
    first = torch.bucketize(lowest.nan_to_num(posinf=2.0, neginf=-2.0), bounds[:-1]).to(torch.uint8)
    return Codebook(values.to(device), bounds.to(device), first.to(device))


def quantize(value: Tensor, *, signed: bool) -> tuple[Tensor, Tensor]:
    """The nearest codes of a tensor.

    `quantize(dequantize(codes, scales))` gives the same codes and scales again, bit for bit.

    Args:
        value: float32 [n]; non-negative unless signed. A block with a nan or infinity becomes nan.
        signed: whether it may be negative.

    Returns:
        Codes, uint8 [n], and scales, float32 [ceil(n / 256)]. A block whose numbers are all below 2^-100 in magnitude
        has scale 0.
    """
    book = codebook(signed, value.device)
    blocks = _blocks(value)
    scales = blocks.gather(1, blocks.abs().argmax(1, keepdim=True))
    scales = torch.where(scales.abs() < _SMALLEST_SCALE, 0.0, scales)
    # Where the scale is 0 nothing must be divided by it; the block is all zeros.
    scaled = torch.where(scales == 0, 0.0, blocks / scales).flatten()[: value.numel()]
    upper = (scaled.view(torch.int32) >> 16).bitwise_and_(0xFFFF)
    first = book.first.index_select(0, upper).to(torch.int32)
    codes = first + (scaled > book.bounds.index_select(0, first))
    return codes.to(torch.uint8), scales.flatten()


def dequantize(codes: Tensor, scales: Tensor, *, signed: bool) -> Tensor:
    """The numbers that codes [n] and scales [ceil(n / 256)] stand for, float32 [n]."""
    values = codebook(signed, codes.device).values.index_select(0, codes.to(torch.int32))
    return (_blocks(values) * scales.unsqueeze(1)).flatten()[: codes.numel()]


def quantized_zeros(number: int, *, signed: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """What `quantize` gives for that many zeros."""
    code = 127 if signed else 0
    codes = torch.full((number,), code, dtype=torch.uint8, device=device)
    return codes, torch.zeros(-(-number // BLOCK), dtype=torch.float32, device=device)


def _blocks(value: Tensor) -> Tensor:
    """[n] as [ceil(n / 256), 256], the last row filled up with zeros."""
    number = -(-value.numel() // BLOCK)
    return F.pad(value, (0, number * BLOCK - value.numel())).view(number, BLOCK)
