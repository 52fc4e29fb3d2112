"""The computed shuffle is a bijection, and a shuffle."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelmill.components.data.permutation import Permutation

seeds = st.integers(0, 2**63 - 1)


@given(st.integers(1, 3000), seeds, st.integers(0, 5))
def test_every_index_comes_once(length: int, seed: int, epoch: int) -> None:
    assert np.array_equal(np.sort(Permutation(length, seed, epoch)(np.arange(length))), np.arange(length))


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 15, 16, 17, 2**16 - 1, 2**16, 2**16 + 1])
def test_bijection_around_powers_of_two(length: int) -> None:
    assert np.array_equal(np.sort(Permutation(length, seed=3)(np.arange(length))), np.arange(length))


@given(st.integers(1, 2**40), seeds, st.data())
def test_one_position_at_a_time_is_the_same(length: int, seed: int, data: st.DataObject) -> None:
    """Also for lengths whose index array would fill no memory of this world."""
    places = np.array(data.draw(st.lists(st.integers(0, length - 1), min_size=1, max_size=20, unique=True)))
    shuffle = Permutation(length, seed)
    together = shuffle(places)
    assert [int(shuffle(np.array([place]))[0]) for place in places] == together.tolist()
    assert len(set(together.tolist())) == len(places)
    assert 0 <= together.min() <= together.max() < length
    assert together.dtype == np.int64


@pytest.mark.parametrize("position", [-1, 10])
def test_positions_outside_are_refused(position: int) -> None:
    with pytest.raises(IndexError, match=r"outside 0\.\.9"):
        Permutation(10, seed=0)(np.array([position]))


def test_nothing_to_permute_is_refused() -> None:
    with pytest.raises(ValueError, match="give at least 1"):
        Permutation(0, seed=0)


def test_seed_and_epoch_decide_the_order() -> None:
    orders = [tuple(Permutation(1000, seed, epoch)(np.arange(1000))) for seed in (0, 1) for epoch in (0, 1)]
    assert len(set(orders)) == 4
    assert tuple(Permutation(1000, 0, 0)(np.arange(1000))) == orders[0]


@pytest.mark.parametrize("length", [100, 1000, 4097])
def test_order_looks_random(length: int) -> None:
    """Fixed points, neighbours that stay neighbours and the rank correlation are what chance gives (4 sigma)."""
    places = np.arange(length)
    orders = [Permutation(length, seed)(places) for seed in range(200)]
    assert abs(np.mean([np.sum(order == places) for order in orders]) - 1) < 4 / np.sqrt(200)
    assert abs(np.mean([np.sum(np.diff(order) == 1) for order in orders]) - 1) < 4 / np.sqrt(200)
    correlations = [np.corrcoef(order, places)[0, 1] for order in orders]
    assert abs(np.mean(correlations)) < 4 / np.sqrt(200 * length)
    assert np.std(correlations) == pytest.approx(1 / np.sqrt(length), rel=0.25)


def test_every_place_sees_every_index() -> None:
    """Over seeds, each of 8 indices comes to each of 8 places about equally often."""
    table = np.zeros((8, 8))
    for seed in range(4000):
        table[np.arange(8), Permutation(8, seed)(np.arange(8))] += 1
    chi_squared = ((table - 500) ** 2 / 500).sum()
    assert chi_squared < 49 + 5 * np.sqrt(2 * 49)  # 49 degrees of freedom
