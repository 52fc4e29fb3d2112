"""Our AdamW: torch's to rounding, in bf16 with stochastic rounding, with moments in 8 bits; and steps left out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from modelmill.components.training import adamw
from modelmill.components.training.adamw import AdamW
from modelmill.components.training.checkpoint import Checkpoints, PortableOptimizer, Progress
from modelmill.components.training.optimizer import set_found_inf, start_step

OPTIONS: dict[str, Any] = {"lr": 3e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
MODES: dict[str, dict[str, Any]] = {
    "fp32": {},
    "stochastic": {"stochastic_rounding": True},
    "8bit": {"state": "8bit"},
    "8bit stochastic": {"state": "8bit", "stochastic_rounding": True},
}


def parameters(dtype: torch.dtype = torch.float32, seed: int = 0) -> list[nn.Parameter]:
    """A matrix that is quantised, a small one, a vector, and one whose numbers do not lie in order."""
    source = torch.Generator().manual_seed(seed)
    shapes = ((70, 64), (5, 7), (33,))
    made = [torch.randn(shape, generator=source).to(dtype) for shape in shapes]
    made.append(torch.randn(64, 80, generator=source).to(dtype).t())
    return [nn.Parameter(tensor) for tensor in made]


def give_gradients(params: list[nn.Parameter], step: int) -> None:
    source = torch.Generator().manual_seed(100 + step)
    for parameter in params:
        gradient = torch.randn(parameter.shape, generator=source, dtype=torch.float64)
        parameter.grad = (gradient * torch.exp(torch.tensor(0.3 * step))).to(parameter.dtype)


def make(mode: str, params: list[nn.Parameter], **options: Any) -> AdamW:
    return AdamW(params, **{**OPTIONS, **MODES[mode], **options})


def train(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        give_gradients(params, step)
        start_step(optimizer, step, OPTIONS["lr"] / (1 + step))
        optimizer.step()


def bits(optimizer: torch.optim.Optimizer, params: list[nn.Parameter]) -> list[Tensor]:
    """Weights and state, copied."""
    states = [value for parameter in params for value in optimizer.state[parameter].values()]
    return [tensor.detach().clone() for tensor in (*params, *states)]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    def raw(tensor: Tensor) -> bytes:
        return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()

    return all(a.dtype == b.dtype and raw(a) == raw(b) for a, b in zip(first, second, strict=True))


def dtype_of(mode: str) -> torch.dtype:
    return torch.bfloat16 if "stochastic" in mode else torch.float32


@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.0, 0.9999), (0.9, 0.0)])
def test_it_is_torchs_adamw(betas: tuple[float, float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(adamw._PIECE, "cpu", 1024)  # several pieces, the last one not whole
    own, theirs = parameters(torch.float64), parameters(torch.float64)
    options = {**OPTIONS, "betas": betas}
    train(AdamW(own, **options), own, range(20))
    train(torch.optim.AdamW(theirs, **options), theirs, range(20))
    for mine, other in zip(own, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-11, atol=1e-13)


def test_in_fp32_it_stays_within_rounding_of_float64() -> None:
    own, exact = parameters(), parameters(torch.float64)
    with torch.no_grad():
        for mine, other in zip(own, exact, strict=True):
            other.copy_(mine)
    optimizer = make("fp32", own)
    train(optimizer, own, range(20))
    train(torch.optim.AdamW(exact, **OPTIONS), exact, range(20))
    for mine, other in zip(own, exact, strict=True):
        torch.testing.assert_close(mine.double(), other, rtol=2e-6, atol=2e-7)
    assert {value.dtype for state in optimizer.state.values() for value in state.values()} == {torch.float32}


@pytest.mark.parametrize("mode", list(MODES))
def test_what_is_kept_for_a_parameter(mode: str) -> None:
    params = parameters(dtype_of(mode))
    optimizer = make(mode, params)
    train(optimizer, params, range(1))
    large, small, vector, _ = (optimizer.state[parameter] for parameter in params)
    if "8bit" in mode:
        assert large["exp_avg"].dtype == large["exp_avg_sq"].dtype == torch.uint8
        assert large["exp_avg_scale"].shape == (18,)  # 4480 numbers in blocks of 256
        kept = sum(value.numel() * value.itemsize for value in large.values())
        assert kept == 2 * (4480 + 18 * 4) + 4
    for state in (small, vector) if "8bit" in mode else (large, small, vector):
        dtype = torch.bfloat16 if mode == "stochastic" else torch.float32
        assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == dtype


@pytest.mark.parametrize("mode", list(MODES))
def test_moments_in_few_bits_give_nearly_the_same_update(mode: str) -> None:
    """After 20 steps the change of the weights is that of fp32: with an error of some percent, and without a bias."""
    own, exact = parameters(dtype_of(mode)), parameters(dtype_of(mode))
    exact = [nn.Parameter(parameter.detach().float()) for parameter in exact]
    first = [parameter.detach().clone() for parameter in exact]
    train(make(mode, own), own, range(20))
    train(torch.optim.AdamW(exact, **OPTIONS), exact, range(20))
    for mine, other, start in zip(own, exact, first, strict=True):
        error = (mine - other).detach()
        assert error.norm() / (other - start).norm() < {"fp32": 1e-5, "8bit": 0.1}.get(mode, 0.25)
        assert error.mean().abs() <= 5 * error.std() / error.numel() ** 0.5


@pytest.mark.parametrize("mode", list(MODES))
@pytest.mark.parametrize("steps", [0, 3])
def test_a_step_left_out_changes_no_bit(mode: str, steps: int) -> None:
    params = parameters(dtype_of(mode))
    optimizer = make(mode, params)
    train(optimizer, params, range(steps))
    weights = [parameter.detach().clone() for parameter in params]
    before = bits(optimizer, params)
    set_found_inf(optimizer, torch.tensor(True))
    for parameter in params:
        parameter.grad = torch.full_like(parameter, torch.nan)
    optimizer.step()
    assert same(list(weights), [parameter.detach() for parameter in params])
    if steps:
        assert same(before, bits(optimizer, params))
    # Then it goes on as if nothing had been.
    set_found_inf(optimizer, torch.tensor(0.0))
    train(optimizer, params, range(steps, steps + 2))
    other = parameters(dtype_of(mode))
    undisturbed = make(mode, other)
    train(undisturbed, other, range(steps + 2))
    assert same(bits(optimizer, params), bits(undisturbed, other))


@pytest.mark.parametrize("found", [torch.tensor(1.0), torch.tensor(3), torch.tensor(True), torch.tensor(torch.nan)])
@pytest.mark.parametrize("fused", [True, False])
def test_any_number_but_zero_leaves_a_step_out(found: Tensor, fused: bool) -> None:
    params = parameters()
    optimizer: torch.optim.Optimizer = make("fp32", params)
    if fused:
        optimizer = torch.optim.AdamW(params, **OPTIONS, fused=True)
    train(optimizer, params, range(2))
    before = bits(optimizer, params)
    set_found_inf(optimizer, found)
    train(optimizer, params, range(2, 3))
    assert same(before, bits(optimizer, params))
    set_found_inf(optimizer, None)
    train(optimizer, params, range(2, 3))
    assert not same(before, bits(optimizer, params))


@pytest.mark.parametrize("mode", list(MODES))
def test_a_resumed_run_is_the_same_to_the_bit(mode: str, tmp_path: Path) -> None:
    def model() -> nn.Module:
        made = nn.Module()
        for name, parameter in zip("abcd", parameters(dtype_of(mode)), strict=True):
            made.register_parameter(name, parameter)
        return made

    def checkpoints() -> Checkpoints:
        return Checkpoints(tmp_path, digest="same", keep=1, rank=0, world_size=1)

    whole, half, resumed = model(), model(), model()
    reference = make(mode, list(whole.parameters()))
    train(reference, list(whole.parameters()), range(9))
    first = make(mode, list(half.parameters()))
    train(first, list(half.parameters()), range(5))
    checkpoints().save(Progress(5, 0), half, first)
    second = make(mode, list(resumed.parameters()))
    assert isinstance(second, PortableOptimizer)
    assert checkpoints().load_latest(resumed, second).step == 5
    train(second, list(resumed.parameters()), range(5, 9))
    assert same(bits(reference, list(whole.parameters())), bits(second, list(resumed.parameters())))


@pytest.mark.parametrize("mode", list(MODES))
def test_portable_state_has_the_parameters_shape_and_comes_back_to_the_bit(mode: str) -> None:
    params = parameters(dtype_of(mode))
    optimizer = make(mode, params)
    assert optimizer.portable_state(params[0]) == {}
    train(optimizer, params, range(3))
    before = bits(optimizer, params)
    for parameter in params:
        state = {name: value.clone() for name, value in optimizer.portable_state(parameter).items()}
        assert {name: value.shape for name, value in state.items()} == {
            "step": (),
            "exp_avg": parameter.shape,
            "exp_avg_sq": parameter.shape,
        }
        assert state["step"] == 3
        optimizer.load_portable_state(parameter, state)
    assert same(before, bits(optimizer, params))


def test_random_bits_depend_on_seed_step_and_parameter_only() -> None:
    def after(seed: int, step: int) -> list[Tensor]:
        params = parameters(torch.bfloat16)
        params.append(nn.Parameter(params[0].detach().clone()))  # equal to the first, updated alike
        optimizer = make("stochastic", params, seed=seed)
        give_gradients(params, 0)
        params[-1].grad = params[0].grad
        torch.manual_seed(torch.seed())  # whatever the default generator did
        start_step(optimizer, step, 1e-3)
        optimizer.step()
        return [parameter.detach() for parameter in params]

    first = after(1, 4)
    assert same(first, after(1, 4))
    assert not same(first, after(2, 4))
    assert not same(first, after(1, 5))
    assert not torch.equal(first[0], first[-1])


def test_small_updates_survive_stochastic_rounding_only() -> None:
    """Weights of 1 and gradients of one sign, at a rate of an eighth of what moves a bf16 weight of 1."""
    rate, steps = 2.0**-11, 200

    def moved(options: dict[str, Any]) -> float:
        parameter = nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
        optimizer = AdamW([parameter], **{**OPTIONS, "weight_decay": 0.0, **options})
        for step in range(steps):
            parameter.grad = torch.full_like(parameter, -0.5)
            start_step(optimizer, step, rate)
            optimizer.step()
        return parameter.detach().double().mean().item() - 1

    assert moved({}) == 0.0
    assert moved({"stochastic_rounding": True}) == pytest.approx(rate * steps, rel=0.05)


def test_a_closure_is_called_first() -> None:
    parameter = nn.Parameter(torch.ones(3))
    optimizer = AdamW([parameter], **OPTIONS)

    def closure() -> Tensor:
        loss = parameter.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 3.0
    assert (parameter < 1).all()


def test_memory_is_bounded_by_a_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor of more numbers than a piece is made, but for the state itself in the first step."""
    piece = 1024
    monkeypatch.setitem(adamw._PIECE, "cpu", piece)
    params = [nn.Parameter(torch.ones(64, 128, dtype=torch.bfloat16))]
    optimizer = make("8bit stochastic", params)
    train(optimizer, params, range(1))
    params[0].grad = torch.ones_like(params[0])
    largest = largest_allocation(lambda: optimizer.step())
    assert 0 < largest <= piece * 8


def largest_allocation(run: Callable[[], object]) -> int:
    """Bytes of the largest tensor that an operation makes."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            known = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)}
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and result.untyped_storage().data_ptr() not in known:
                self.largest = max(self.largest, result.untyped_storage().nbytes())
            return result

    with Watch() as watch:
        run()
    return watch.largest
