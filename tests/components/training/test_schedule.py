"""The learning rate against its formula, and against torch's own schedule."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from modelmill.components.training.config import TrainingConfig
from modelmill.components.training.schedule import learning_rate


def config(**fields: object) -> TrainingConfig:
    return TrainingConfig.model_validate({"global_batch_size": 4, "micro_batch_size": 1, **fields})


def test_the_published_schedule() -> None:
    published = config(steps=500_000, warmup_steps=2000, decay_steps=480_000)
    assert learning_rate(0, published) == pytest.approx(3e-4 / 2000)
    assert learning_rate(1999, published) == pytest.approx(3e-4)
    assert learning_rate(2000, published) == pytest.approx(3e-4)
    assert learning_rate(2000 + 240_000, published) == pytest.approx((3e-4 + 3e-5) / 2)
    assert learning_rate(482_000, published) == 3e-5
    assert learning_rate(499_999, published) == 3e-5


def test_warmup_stable_decay_by_hand() -> None:
    wsd = config(steps=100, schedule="wsd", warmup_steps=10, learning_rate=1.0, min_learning_rate=0.1)
    assert (wsd.constant_length, wsd.decay_length) == (70, 20)  # a fifth of the steps, and what is left
    assert {learning_rate(step, wsd) for step in range(9, 81)} == {1.0}
    for step in range(80, 100):
        assert learning_rate(step, wsd) == pytest.approx(1.0 - 0.9 * ((step - 80) / 20) ** 0.5, rel=1e-12)


@pytest.mark.parametrize(
    ("fields", "lengths"),
    [
        ({"decay_steps": 30}, (60, 30)),
        ({"constant_steps": 40}, (40, 50)),
        ({"constant_steps": 0}, (0, 90)),
        ({"constant_steps": 40, "decay_steps": 30}, (40, 30)),
        ({"warmup_steps": 95}, (0, 5)),
        ({"warmup_steps": 100}, (0, 0)),
        ({"steps": 12}, (0, 2)),
        ({"steps": 3, "warmup_steps": 0}, (2, 1)),
    ],
)
def test_what_is_left_out_of_warmup_stable_decay_follows(fields: dict[str, int], lengths: tuple[int, int]) -> None:
    wsd = config(**{"steps": 100, "warmup_steps": 10, "schedule": "wsd", **fields})
    assert (wsd.constant_length, wsd.decay_length) == lengths


def test_a_warmup_stable_decay_longer_than_the_run_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"constant_steps 0 \+ decay_steps 95 = 105 .* raise steps to 105"):
        config(steps=100, schedule="wsd", warmup_steps=10, decay_steps=95)


def test_linear_with_a_constant_part_is_warmup_stable_decay_of_the_other_shape() -> None:
    wsd = config(
        steps=100, schedule="linear", warmup_steps=10, constant_steps=70, learning_rate=1.0, min_learning_rate=0
    )
    assert {learning_rate(step, wsd) for step in range(9, 80)} == {1.0}
    assert learning_rate(90, wsd) == pytest.approx(0.5)
    assert learning_rate(99, wsd) == pytest.approx(0.05)


def test_without_decay_steps_the_rate_stays() -> None:
    flat = config(steps=20, warmup_steps=5, decay_steps=0, learning_rate=0.5)
    assert {learning_rate(step, flat) for step in range(5, 20)} == {0.5}


def test_cosine_equals_torch() -> None:
    own = config(steps=30, learning_rate=0.3, min_learning_rate=0.01)
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=30, eta_min=0.01)
    for step in range(30):
        assert learning_rate(step, own) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        scheduler.step()


schedules = st.fixed_dictionaries(
    {
        "schedule": st.sampled_from(["cosine", "linear", "wsd"]),
        "warmup_steps": st.integers(0, 40),
        "constant_steps": st.none() | st.integers(0, 40),
        "decay_steps": st.none() | st.integers(0, 40),
    }
)


@given(schedules)
def test_the_rate_rises_stays_and_falls_within_its_bounds(fields: dict[str, object]) -> None:
    one = config(steps=130, **fields)
    rates = [learning_rate(step, one) for step in range(140)]
    warmup = one.warmup_steps
    assert all(0 < rate <= 3e-4 * (1 + 1e-12) for rate in rates)
    assert all(before <= after for before, after in itertools.pairwise(rates[:warmup]))
    assert all(before >= after - 1e-18 for before, after in itertools.pairwise(rates[warmup:]))
    assert all(rate >= 3e-5 * (1 - 1e-12) for rate in rates[warmup:])
    assert math.isclose(max(rates), 3e-4)
    assert warmup + one.constant_length + one.decay_length <= one.steps


@given(schedules)
def test_the_rate_has_no_jumps(fields: dict[str, object]) -> None:
    """No step moves the rate further than the steepest part of its warmup or decay over that many steps."""
    one = config(steps=130, learning_rate=1.0, min_learning_rate=0.25, **fields)
    rates = [learning_rate(step, one) for step in range(140)]
    rise = 1 / max(1, one.warmup_steps)
    d = max(1, one.decay_length)
    fall = 0.75 * {"linear": 1 / d, "cosine": math.pi / 2 / d, "wsd": 1 / math.sqrt(d)}[one.schedule]
    for before, after in itertools.pairwise(rates):
        assert -fall - 1e-12 <= after - before <= rise + 1e-12


@given(schedules, st.integers(0, 139))
def test_a_resumed_run_goes_on_with_the_same_rates(fields: dict[str, object], first: int) -> None:
    """The rate depends on nothing before the step; the section may have been through JSON."""
    one = config(steps=130, **fields)
    rates = [learning_rate(step, one) for step in range(140)]
    again = TrainingConfig.model_validate_json(one.model_dump_json())
    assert [learning_rate(step, again) for step in range(first, 140)] == rates[first:]
