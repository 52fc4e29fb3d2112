"""The norm of a gradient and clipping by it, on one rank; `test_layouts` compares the norms of all layouts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from modelmill.components.training.gradients import global_norm, scale_to_norm


def parameters(dtype: torch.dtype, scale: float) -> list[nn.Parameter]:
    torch.manual_seed(0)
    made = [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in ((50, 3), (7,), (), (0, 3))]
    for parameter in made:
        parameter.grad = torch.randn_like(parameter) * scale
    return made


def gradients(owners: list[nn.Parameter]) -> list[Tensor]:
    return [owner.grad for owner in owners if owner.grad is not None]


@pytest.mark.parametrize("scale", [0.01, 10.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_clipping_is_torchs(dtype: torch.dtype, scale: float) -> None:
    mine, theirs = parameters(dtype, scale), parameters(dtype, scale)
    norm = global_norm(gradients(mine), 1)
    scale_to_norm(gradients(mine), norm, 1.0)
    expected = nn.utils.clip_grad_norm_(theirs, 1.0)
    assert norm.dtype == dtype
    torch.testing.assert_close(norm, expected)
    for one, two in zip(gradients(mine), gradients(theirs), strict=True):
        torch.testing.assert_close(one, two)


def test_half_precision_is_summed_in_fp32() -> None:
    # 4096 ones: in bf16 the sum of squares would stay at 256, where adding 1 changes nothing.
    ones = [torch.ones(1, dtype=torch.bfloat16) for _ in range(4096)]
    norm = global_norm(ones, 1)
    assert norm.dtype == torch.float32
    assert norm.item() == 64.0
    scale_to_norm(ones, norm, 1.0)
    assert {value.item() for value in ones} == {1 / 64}


def test_dtypes_may_be_mixed() -> None:
    tensors = [torch.full((4,), 3.0), torch.full((7,), 4.0, dtype=torch.bfloat16)]
    assert global_norm(tensors, 1).item() == pytest.approx((4 * 9 + 7 * 16) ** 0.5)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_number_that_is_none_shows_in_the_norm(bad: float) -> None:
    assert not torch.isfinite(global_norm([torch.ones(3), torch.tensor([1.0, bad])], 1))


def test_without_gradients_the_norm_is_zero() -> None:
    norm = global_norm([], 1)
    scale_to_norm([], norm, 1.0)
    assert norm.item() == 0
