"""Stochastic rounding: exact where bfloat16 is, unbiased between, and what it is for: small updates add up."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modelmill.components.training.rounding import round_stochastic

TRIALS = 1_000_000
EPS = 2.0**-8  # half the spacing of bfloat16 in [1, 2)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def neighbours(value: float) -> tuple[float, float]:
    """The bfloat16 numbers around a float32, the one nearer to zero first."""
    bits = torch.tensor(value).view(torch.int32) & ~0xFFFF
    return bits.view(torch.float32).item(), (bits + 0x10000).view(torch.float32).item()


@pytest.mark.parametrize(
    "value", [1.001, -1.001, 1.0 + EPS / 3, 3.14159e-5, -2.71828e-20, 1.2345e30, 255.3, 1.0 + 2.0**-23, 1.9999999]
)
def test_a_million_roundings_are_unbiased(value: float) -> None:
    """Each rounding is a Bernoulli trial with a known probability: the count lies within 5 standard deviations."""
    number = torch.tensor(value).item()  # as float32
    low, high = neighbours(number)
    probability = (number - low) / (high - low)
    rounded = round_stochastic(torch.full((TRIALS,), number), generator(7)).float()
    up = int((rounded == high).sum())
    assert up + int((rounded == low).sum()) == TRIALS
    sigma = math.sqrt(TRIALS * probability * (1 - probability))
    assert abs(up - TRIALS * probability) <= 5 * sigma
    # The same as a bound on the mean: 5 sigma of a trial are at most 2.5 spacings, over the root of 1e6 trials.
    assert abs(rounded.double().mean().item() - number) <= 2.5e-3 * abs(high - low)


def test_bits_of_one_draw_are_independent_and_uniform() -> None:
    """Four roundings share a 64-bit draw: neither lanes nor neighbours may be correlated."""
    rounded = round_stochastic(torch.full((4 * 250_000,), 1.0 + EPS), generator(3)).float()
    up = (rounded > 1.0).view(-1, 4).double()
    assert up.mean(0).sub(0.5).abs().max() < 5 * 0.5 / math.sqrt(250_000)
    correlation = torch.corrcoef(up.t()) - torch.eye(4)
    assert correlation.abs().max() < 5 / math.sqrt(250_000)
    one = up.flatten()
    assert torch.corrcoef(torch.stack([one[:-1], one[1:]]))[0, 1].abs() < 5 / math.sqrt(1_000_000)


def test_what_bfloat16_represents_stays() -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    for seed in range(4):
        rounded = round_stochastic(every.float(), generator(seed))
        number = ~every.isnan()
        assert torch.equal(rounded[number].view(torch.int16), every[number].view(torch.int16))  # signs of zeros too
        assert rounded[~number].isnan().all()


def test_nan_with_all_bits_set_stays_nan() -> None:
    value = torch.tensor([0x7FFFFFFF, -1, 0x7F800001], dtype=torch.int32).view(torch.float32)
    assert round_stochastic(value, generator()).isnan().all()


@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=9), st.integers(0, 99)
)
def test_the_result_is_one_of_the_neighbours(values: list[float], seed: int) -> None:
    rounded = round_stochastic(torch.tensor(values), generator(seed)).float().tolist()
    for value, result in zip(values, rounded, strict=True):
        assert result in neighbours(value)


def test_the_same_generator_gives_the_same_bits_and_another_gives_others() -> None:
    value = torch.randn(1001, generator=generator(1)).view(7, 11, 13)
    first, again, other = (round_stochastic(value, generator(seed)) for seed in (5, 5, 6))
    assert first.shape == value.shape
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_default_generator_is_used_without_one() -> None:
    value = torch.full((1000,), 1.0 + EPS)
    torch.manual_seed(11)
    first = round_stochastic(value, None)
    torch.manual_seed(11)
    assert torch.equal(first, round_stochastic(value, None))


def test_only_float32_is_rounded() -> None:
    with pytest.raises(TypeError, match="float64"):
        round_stochastic(torch.zeros(1, dtype=torch.float64), generator())


def test_updates_below_half_a_spacing_are_lost_to_nearest_and_kept_in_the_mean() -> None:
    """1000 updates of a 16th of the spacing at 1: nearest stays at 1, the mean of stochastic reaches the sum."""
    update, steps, copies = EPS / 8, 1000, 4096
    nearest = torch.ones(copies, dtype=torch.bfloat16)
    stochastic = nearest.clone()
    source = generator(2)
    for _ in range(steps):
        nearest = (nearest.float() + update).to(torch.bfloat16)
        stochastic = round_stochastic(stochastic.float() + update, source)
    assert torch.equal(nearest, torch.ones_like(nearest))
    # Each step's error has variance below (2 EPS)^2 / 4 (the spacing below 2), independent of the others in the mean.
    bound = 5 * math.sqrt(steps) * 2 * EPS / 2 / math.sqrt(copies)
    assert abs(stochastic.double().mean().item() - (1 + steps * update)) < bound < 0.1 * steps * update
