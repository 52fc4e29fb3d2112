"""The learning rate against its formula, and against torch's own schedule."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

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


def test_warmup_stable_decay_is_linear_with_a_constant_part() -> None:
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


@given(
    warmup=st.integers(0, 40),
    constant=st.integers(0, 40),
    decay=st.none() | st.integers(0, 40),
    schedule=st.sampled_from(["cosine", "linear"]),
)
def test_the_rate_rises_stays_and_falls_within_its_bounds(
    warmup: int, constant: int, decay: int | None, schedule: str
) -> None:
    one = config(steps=130, warmup_steps=warmup, constant_steps=constant, decay_steps=decay, schedule=schedule)
    rates = [learning_rate(step, one) for step in range(140)]
    assert all(0 < rate <= 3e-4 * (1 + 1e-12) for rate in rates)
    assert all(before <= after for before, after in itertools.pairwise(rates[:warmup]))
    assert all(before >= after - 1e-18 for before, after in itertools.pairwise(rates[warmup:]))
    assert all(rate >= 3e-5 * (1 - 1e-12) for rate in rates[warmup:])
    assert math.isclose(max(rates), 3e-4)
