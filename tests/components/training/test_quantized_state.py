"""Block-wise 8-bit codes: the nearest ones, stable under being taken up again, and bounded in their error."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from modelmill.components.training.quantized_state import (
    BLOCK,
    codebook,
    dequantize,
    quantize,
    quantized_zeros,
)

CPU = torch.device("cpu")
SIGNS = pytest.mark.parametrize("signed", [True, False])


def sample(number: int, signed: bool, spread: float = 4.0) -> Tensor:
    """Numbers over many orders of magnitude, as moments are."""
    source = torch.Generator().manual_seed(number)
    value = torch.randn(number, generator=source) * torch.exp(spread * torch.randn(number, generator=source))
    return value if signed else value.square()


@SIGNS
def test_the_codebook_is_the_dynamic_tree_of_the_paper(signed: bool) -> None:
    """Counted and placed by the definition: k zero bits, the indicator, and what is left as a linear fraction."""
    bits = 7 if signed else 8
    magnitudes = {0.0, 1.0}
    for zeros in range(7):
        parts = 2 ** (bits - 1 - zeros)
        magnitudes |= {10.0**-zeros * (0.1 + 0.9 * (part + 0.5) / parts) for part in range(parts)}
    expected = sorted(magnitudes | ({-m for m in magnitudes if m not in (0.0, 1.0)} if signed else set()))
    values = codebook(signed, CPU).values
    assert values.shape == (256,)
    torch.testing.assert_close(values, torch.tensor(expected), rtol=1e-6, atol=0)


@SIGNS
def test_codes_are_the_nearest(signed: bool) -> None:
    value = sample(5 * BLOCK, signed)
    codes, scales = quantize(value, signed=signed)
    scaled = (value.view(-1, BLOCK).double() / scales.double().unsqueeze(1)).flatten()
    values = codebook(signed, CPU).values.double()
    if not signed:
        values = values[1:]  # zero is for zero only
    nearest = (scaled.unsqueeze(1) - values).abs().min(1).values
    chosen = (scaled - codebook(signed, CPU).values.double()[codes.long()]).abs()
    torch.testing.assert_close(chosen, nearest, rtol=0, atol=1e-7)


@SIGNS
def test_the_table_finds_the_code_that_a_search_finds(signed: bool) -> None:
    """At every bound, just beside it, and at every number whose lower bits are zero."""
    book = codebook(signed, CPU)
    bounds = book.bounds[:-1]
    every = (torch.arange(2**16, dtype=torch.int32) << 16).view(torch.float32)
    every = every[every.isfinite() & (every.abs() < 1)]
    beside = [torch.nextafter(bounds, torch.full_like(bounds, end)) for end in (-2.0, 2.0)]
    for value in (bounds, *beside, every):
        if not signed:
            value = value[value >= 0]
        # A first number of 1 in each block makes the scale 1.
        blocks = torch.cat([torch.ones(len(value), 1), value.unsqueeze(1), torch.zeros(len(value), BLOCK - 2)], dim=1)
        codes, scales = quantize(blocks.flatten(), signed=signed)
        assert torch.equal(scales, torch.ones_like(scales))
        assert torch.equal(codes.view(-1, BLOCK)[:, 1].long(), torch.bucketize(value, bounds))


@SIGNS
@pytest.mark.parametrize("number", [1, 100, BLOCK, BLOCK + 1, 7 * BLOCK + 13])
@pytest.mark.parametrize("factor", [1.0, 1e-20, 1e25])
def test_quantising_again_changes_no_bit(signed: bool, number: int, factor: float) -> None:
    value = sample(number, signed, spread=3.0) * factor
    codes, scales = quantize(value, signed=signed)
    assert (codes.shape, scales.shape) == ((number,), (-(-number // BLOCK),))
    back = dequantize(codes, scales, signed=signed)
    again = quantize(back, signed=signed)
    assert torch.equal(again[0], codes)
    assert torch.equal(again[1].view(torch.int32), scales.view(torch.int32))
    assert torch.equal(dequantize(*again, signed=signed), back)


def test_a_block_led_by_a_negative_number_does_not_shrink() -> None:
    value = torch.linspace(-3.0, 2.0, BLOCK)
    for _ in range(50):
        value = dequantize(*quantize(value, signed=True), signed=True)
    assert value.min().item() == -3.0


@SIGNS
def test_the_error_is_bounded(signed: bool) -> None:
    """At most half the widest distance of codes in its block's scale; relative to itself a few percent when large."""
    value = sample(64 * BLOCK, signed, spread=1.0)
    back = dequantize(*quantize(value, signed=signed), signed=signed)
    peak = value.view(-1, BLOCK).abs().amax(1).repeat_interleave(BLOCK)
    step = 0.9 / (64 if signed else 128)
    assert ((back - value).abs() <= step / 2 * peak * (1 + 1e-6)).all()
    # From a hundredth of the peak on, 32 (signed) or 64 codes a decade.
    large = value.abs() >= 1e-2 * peak
    relative = ((back - value).abs() / value.abs())[large]
    assert relative.max() <= 0.9 / (32 if signed else 64) / 2 / 0.1 * (1 + 1e-5)


def test_a_positive_second_moment_never_becomes_zero() -> None:
    value = torch.full((BLOCK,), 1e-12)
    value[0], value[1] = 1.0, 0.0
    back = dequantize(*quantize(value, signed=False), signed=False)
    assert (back[2:] > 0).all()
    assert back[1] == 0


@SIGNS
def test_zeros_and_tiny_blocks_are_zero(signed: bool) -> None:
    zeros = quantize(torch.zeros(BLOCK + 5), signed=signed)
    for found, made in zip(zeros, quantized_zeros(BLOCK + 5, signed=signed, device=CPU), strict=True):
        assert found.dtype == made.dtype
        assert torch.equal(found, made)
    tiny = quantize(torch.full((BLOCK,), 1e-38), signed=signed)
    assert torch.equal(dequantize(*tiny, signed=signed), torch.zeros(BLOCK))


@SIGNS
def test_nan_and_infinity_are_not_hidden(signed: bool) -> None:
    for bad in (torch.nan, torch.inf):
        value = torch.ones(2 * BLOCK)
        value[3] = bad
        back = dequantize(*quantize(value, signed=signed), signed=signed)
        assert not back[3].isfinite()
        assert torch.equal(back[BLOCK:], torch.ones(BLOCK))
