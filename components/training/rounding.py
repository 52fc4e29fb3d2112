"""Stochastic rounding of float32 to bfloat16.

A bfloat16 number has 8 significant bits: rounded to nearest, an update below 1/512 of a weight is lost, and the same
small update is lost at every step. Rounded up or down at random, with a probability that makes the mean right, updates
add up (Gupta et al. 2015, arXiv:1502.02551; for training in bfloat16 alone, Zamirai et al. 2020, arXiv:2010.06192).
"""

from __future__ import annotations

import torch
from torch import Tensor

_DROPPED_BITS = 16  # of a float32's mantissa
_LOW_BITS = (1 << _DROPPED_BITS) - 1


def round_stochastic(value: Tensor, generator: torch.Generator | None) -> Tensor:
    """Round to bfloat16, to either neighbour with the probability that makes the mean the value itself.

    bfloat16 is the upper half of a float32. Adding 16 uniform random bits to the lower half carries into the upper
    one with probability (lower half) / 2^16, which is where the value lies between its neighbours; then the lower half
    is cut off. Sign and magnitude are apart in the format, so negative numbers mirror positive ones. What bfloat16
    represents stays as it is: zeros with their sign and infinities too. Nan stays nan. A finite value beyond the
    largest bfloat16, 3.39e38, may become infinite, as it does when rounded to nearest.

    Nothing waits for the device. On the device "neuron" the hardware rounds each cast this way when
    NEURON_RT_STOCHASTIC_ROUNDING_EN is 1, which the launcher sets.

    Args:
        value: float32, of any shape.
        generator: on the device of `value`; the same state gives the same bits. None: the device's default one.

    Returns:
        bfloat16, of the shape of `value`.

    Raises:
        TypeError: `value` is not float32.
    """
    if value.dtype != torch.float32:
        raise TypeError(f"stochastic rounding takes float32, got {value.dtype}")
    if value.device.type == "neuron":
        return value.to(torch.bfloat16)
    carried = value.view(torch.int32) + _random_bits(value, generator)
    rounded = carried.bitwise_and_(~_LOW_BITS).view(torch.float32)
    # A nan whose bits are all ones would wrap around to zero.
    return torch.where(value.isnan(), value, rounded).to(torch.bfloat16)


def _random_bits(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Integers in [0, 2^16), uniform and independent, int32 of the shape of `like`."""
    # Four of them from each 64-bit draw: on a CPU the draws are most of the time of rounding.
    words = torch.empty((like.numel() + 3) // 4, dtype=torch.int64, device=like.device)
    words.random_(-(2**63), None, generator=generator)
    return words.view(torch.int16)[: like.numel()].view(like.shape).to(torch.int32).bitwise_and_(_LOW_BITS)
