"""Products in 8 bits: against the same products of dequantised operands, and in a decoder that learns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from modelmill.components.core.errors import UserError
from modelmill.components.llama.config import LlamaConfig
from modelmill.components.llama.model import LlamaDecoder
from modelmill.components.training import activations
from modelmill.components.training.config import Precision
from modelmill.components.training.float8 import (
    FORWARD,
    GRADIENT,
    Float8Linear,
    convert_linears,
    float8_works,
    to_float8,
)
from modelmill.components.training.options import ActivationMemory
from modelmill.components.training.precision import autocast, set_precision
from tests.components.training.samples import MODEL, VOCAB

with_products = pytest.mark.skipif(not float8_works("cpu"), reason="this CPU's torch has no fp8 products")


def sample(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rounded(value: Tensor, dtype: torch.dtype) -> Tensor:
    """What `to_float8` stands for, in float64."""
    narrow, inverse = to_float8(value, dtype)
    return narrow.double() * inverse.double()


def decoder(**sizes: Any) -> LlamaDecoder:
    config = {**MODEL, "vocab_size": VOCAB, **sizes}
    return LlamaDecoder(LlamaConfig.model_validate(config))


@pytest.mark.parametrize(("dtype", "bits"), [(FORWARD, 3), (GRADIENT, 2)])
@pytest.mark.parametrize("factor", [1.0, 1e-6, 1e6])
def test_numbers_near_the_largest_keep_the_formats_bits(dtype: torch.dtype, bits: int, factor: float) -> None:
    value = sample(64, 64) * factor
    back = rounded(value, dtype)
    peak = value.abs().max().double()
    normal = value.abs() > peak * torch.finfo(dtype).smallest_normal / torch.finfo(dtype).max * 1.01
    relative = ((back - value.double()).abs() / value.double().abs())[normal]
    assert 2.0 ** -(bits + 2) < relative.max() <= 2.0 ** -(bits + 1) * (1 + 1e-6)
    torch.testing.assert_close(back.abs().max(), peak, rtol=2.0**-23, atol=0)


@pytest.mark.parametrize("dtype", [FORWARD, GRADIENT])
def test_zeros_stay_zeros_and_a_nan_stays_one(dtype: torch.dtype) -> None:
    assert torch.equal(rounded(torch.zeros(4, 4), dtype), torch.zeros(4, 4, dtype=torch.float64))
    assert rounded(torch.tensor([1.0, torch.nan]), dtype).isnan().any()
    assert rounded(torch.tensor([1.0, torch.inf]), dtype).isnan().any()


@with_products
@pytest.mark.parametrize("rows", [32, 21])  # 21 is no multiple of 16
@pytest.mark.parametrize("bias", [False, True])
def test_the_three_products_are_those_of_the_rounded_operands(rows: int, bias: bool) -> None:
    linear = Float8Linear(48, 64, bias=bias)
    with torch.no_grad():
        linear.weight.copy_(sample(64, 48, seed=1))
    inputs = sample(3, rows, 48, seed=2).requires_grad_()
    grad = sample(3, rows, 64, seed=3)
    output = linear(inputs)
    output.backward(grad)
    flat, flat_grad = rounded(inputs.detach().flatten(0, 1), FORWARD), rounded(grad.flatten(0, 1), GRADIENT)
    weight = rounded(linear.weight.detach(), FORWARD)
    expected = flat @ weight.t() + (linear.bias.detach().double() if bias else 0)
    for found, exact in (
        (output.flatten(0, 1), expected),
        (inputs.grad.flatten(0, 1), flat_grad @ weight),  # type: ignore[union-attr]
        (linear.weight.grad, flat_grad.t() @ flat),
    ):
        assert found is not None
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5 * exact.abs().max().item())
    if bias:
        torch.testing.assert_close(linear.bias.grad, grad.sum((0, 1)))
    # And they are the products, as well as 8 bits tell: an error of some percent in the norm.
    plain = inputs.detach() @ linear.weight.detach().t() + (linear.bias.detach() if bias else 0)
    error = (output.detach() - plain).norm() / plain.norm()
    assert 1e-3 < error < 5e-2


@with_products
def test_under_autocast_the_output_is_bf16_and_gradients_are_the_weights_dtype() -> None:
    linear = Float8Linear(32, 16, bias=False)
    inputs = sample(16, 32).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = linear(inputs)
    assert output.dtype == torch.bfloat16
    output.sum().backward()
    assert linear.weight.grad is not None
    assert inputs.grad is not None
    assert linear.weight.grad.dtype == inputs.grad.dtype == torch.float32


def test_the_blocks_projections_are_converted_and_nothing_else() -> None:
    model = decoder()
    names = list(model.state_dict())
    assert convert_linears(model) == 8  # four projections in each of two layers
    kinds = {name for name, module in model.named_modules() if isinstance(module, Float8Linear)}
    assert {name.split(".")[0] for name in kinds} == {"layers"}
    assert type(model.lm_head) is nn.Linear
    assert list(model.state_dict()) == names


def test_layers_of_other_sizes_stay_and_a_model_of_only_those_is_refused() -> None:
    some = decoder(intermediate_size=40)
    assert convert_linears(some) == 6  # gate_up is [80, 32], both multiples of 16; down is [32, 40]
    assert type(some.layers[0].feed_forward.down) is nn.Linear  # type: ignore[union-attr]
    none = decoder(hidden_size=24, intermediate_size=40, num_heads=2, num_kv_heads=1)
    with pytest.raises(UserError, match=r"training\.precision: 'fp8-mixed' needs .* multiples of 16.* use bf16-mixed"):
        set_precision(none, "fp8-mixed")
    assert not any(isinstance(module, Float8Linear) for module in none.modules())
    with pytest.raises(UserError, match="multiples of 64"):
        set_precision(decoder(), "fp8-mixed", tensor=4)


@with_products
def test_a_decoder_in_fp8_is_near_the_one_in_bf16_and_learns() -> None:
    rows = torch.randint(0, VOCAB, (4, 17), generator=torch.Generator().manual_seed(4))
    losses: dict[str, list[float]] = {}
    gradients: dict[str, Tensor] = {}
    for precision in ("fp32", "bf16-mixed", "fp8-mixed"):
        model = decoder()
        set_precision(model, precision)  # type: ignore[arg-type]
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        losses[precision] = []
        for step in range(12):
            with autocast(precision, "cpu"):  # type: ignore[arg-type]
                loss = model(rows[:, :-1], rows[:, 1:])
            loss.backward()
            if step == 0:
                gradients[precision] = torch.cat([p.grad.flatten() for p in model.layers.parameters()])  # type: ignore[union-attr]
            optimizer.step()
            optimizer.zero_grad()
            losses[precision].append(loss.item())
    exact = gradients["fp32"]
    errors = {name: ((found - exact).norm() / exact.norm()).item() for name, found in gradients.items()}
    assert errors["bf16-mixed"] < errors["fp8-mixed"] < 0.15  # so 8 bits were used, and used well
    assert losses["fp8-mixed"][-1] < losses["fp8-mixed"][0] - 0.5
    assert losses["fp8-mixed"][-1] == pytest.approx(losses["fp32"][-1], rel=0.02)


@with_products
@pytest.mark.parametrize("precision", ["fp32", "bf16-mixed"])  # of what surrounds the converted layers
def test_every_product_of_the_blocks_runs_in_8_bits(precision: Precision, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the decoder would fuse a plain layer with what comes before it."""
    calls: list[tuple[torch.dtype, torch.dtype]] = []
    product = torch._scaled_mm

    def count(left: Tensor, right: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        calls.append((left.dtype, right.dtype))
        return product(left, right, *args, **kwargs)

    monkeypatch.setattr(torch, "_scaled_mm", count)
    model = decoder()
    convert_linears(model)
    rows = torch.randint(0, VOCAB, (2, 9))
    with autocast(precision, "cpu"):
        loss = model(rows[:, :-1], rows[:, 1:])
    assert calls == [(FORWARD, FORWARD)] * 8
    loss.backward()
    assert calls[8:] == [(GRADIENT, FORWARD)] * 16


@with_products
@pytest.mark.parametrize("mode", ["full", "selective", "selective_matmul"])
def test_recomputing_activations_changes_no_bit(mode: ActivationMemory) -> None:
    rows = torch.randint(0, VOCAB, (2, 9))
    gradients = []
    for one in ("none", mode):
        model = decoder()
        set_precision(model, "fp8-mixed")
        activations.apply(model, one)
        with autocast("fp8-mixed", "cpu"):
            model(rows[:, :-1], rows[:, 1:]).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, again in zip(*gradients, strict=True):
        assert plain is not None
        assert again is not None
        assert torch.equal(plain, again)
