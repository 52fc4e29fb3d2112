"""Incoherent processing of queries and keys for attention in fp8, measured by emulation on any device.

A few large entries set the scale of a whole tensor in fp8 and leave the others few bits. FlashAttention-3 (Shah et al.
2024, arXiv:2407.08608, section 3.3) multiplies queries and keys by one random orthogonal matrix, which leaves their
products as they are and spreads the outliers over a head's dimensions; with signs and a Hadamard matrix that takes
Dh log Dh operations a head (the idea is that of QuIP, arXiv:2307.13304).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_E4M3_MAX = 448.0


def hadamard(heads: Tensor) -> Tensor:
    """Multiply the last axis, a power of two, by the orthonormal Hadamard matrix of Sylvester's order.

    Args:
        heads: [..., Dh].

    Raises:
        ValueError: Dh is no power of two.
    """
    size = heads.shape[-1]
    if size & (size - 1) or not size:
        raise ValueError(f"a Hadamard matrix of Sylvester's kind needs a power of two, not {size}")
    width = 1
    while width < size:
        first, second = heads.unflatten(-1, (-1, 2, width)).unbind(-2)
        heads = torch.stack([first + second, first - second], -2).flatten(-3)
        width *= 2
    return heads / size**0.5


def rotate(heads: Tensor, signs: Tensor) -> Tensor:
    """`H diag(signs) x` for each head vector x of [..., Dh]; orthogonal, so products of rotated heads are unchanged.

    Args:
        heads: [..., Dh].
        signs: [Dh] of 1 and -1, the same for queries and keys.
    """
    return hadamard(heads * signs)


def through_e4m3(tensor: Tensor) -> Tensor:
    """Values as fp8 e4m3 holds them with one scale for the tensor: its largest magnitude becomes 448."""
    largest = tensor.abs().amax()
    scale = torch.where(largest > 0, _E4M3_MAX / largest, 1.0)
    return (tensor * scale).to(torch.float8_e4m3fn).to(tensor.dtype) / scale


def with_outliers(shape: tuple[int, ...], share: float, std: float, generator: torch.Generator) -> Tensor:
    """Standard normal float64 values to a share of which normal values of another deviation are added.

    The distribution of FlashAttention-3's experiment: N(0, 1) + N(0, std^2) Bernoulli(share).
    """
    values, large = (torch.randn(shape, dtype=torch.float64, generator=generator) for _ in range(2))
    return values + std * large * (torch.rand(shape, generator=generator) < share)


@dataclass(frozen=True)
class Fp8Errors:
    """Root mean square error of attention's output with queries and keys in e4m3, as they are and rotated."""

    plain: float
    rotated: float

    @property
    def ratio(self) -> float:
        """How many times smaller the error is with incoherent processing."""
        return self.plain / self.rotated


def fp8_errors(length: int, head_dim: int, share: float, std: float, seed: int) -> Fp8Errors:
    """Error of one head's attention, every position seeing every other, against the same in float64.

    Queries, keys and values have outliers; queries and keys go through e4m3, with and without rotation. Softmax and
    values stay exact, so that only what the rotation can change is measured.
    """
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (with_outliers((length, head_dim), share, std, generator) for _ in range(3))
    signs = torch.randint(2, (head_dim,), generator=generator).double() * 2 - 1

    def output(left: Tensor, right: Tensor) -> Tensor:
        return (left @ right.T / head_dim**0.5).softmax(-1) @ value

    exact = output(query, key)
    rotated = [through_e4m3(rotate(heads, signs)) for heads in (query, key)]
    errors = [found - exact for found in (output(through_e4m3(query), through_e4m3(key)), output(*rotated))]
    return Fp8Errors(*(error.square().mean().sqrt().item() for error in errors))
