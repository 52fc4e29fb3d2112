"""Rows hold every item whole and once, as few as best-fit-decreasing needs; batches are a function of the step."""

from __future__ import annotations

import bisect
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelmill.components.core.errors import UserError
from modelmill.components.data import instruction_packing
from modelmill.components.data.instruction_packing import TokenStore, place_items, plan_rows, write_rows
from modelmill.components.data.instruction_rows import (
    IGNORE,
    InstructionRows,
    InstructionSource,
    document_positions,
)


def best_fit_decreasing(lengths: list[int], capacity: int) -> int:
    """Rows of the textbook algorithm, item by item."""
    rooms: list[int] = []
    rows = 0
    for length in sorted(lengths, reverse=True):
        place = bisect.bisect_left(rooms, length)
        if place == len(rooms):
            rows += 1
            room = capacity
        else:
            room = rooms.pop(place)
        bisect.insort(rooms, room - length)
    return rows


@st.composite
def items(draw: st.DrawFn) -> tuple[list[int], int]:
    capacity = draw(st.integers(1, 40))
    return draw(st.lists(st.integers(1, capacity), max_size=80)), capacity


@given(items())
def test_as_few_rows_as_item_by_item(drawn: tuple[list[int], int]) -> None:
    lengths, capacity = drawn
    kinds = plan_rows(np.bincount(lengths, minlength=1), capacity)
    assert sum(kind.rows for kind in kinds) == best_fit_decreasing(lengths, capacity)
    held = [length for kind in kinds for length, times in kind.content for _ in range(times * kind.rows)]
    assert sorted(held) == sorted(lengths)
    assert all(sum(length * times for length, times in kind.content) <= capacity for kind in kinds)


@given(items(), st.integers(0, 5))
def test_every_item_has_its_place(drawn: tuple[list[int], int], seed: int) -> None:
    lengths, capacity = drawn
    rows, starts, count = place_items(np.array(lengths, np.int64), capacity, seed)
    taken = np.zeros((count, capacity), int)
    for row, start, length in zip(rows, starts, lengths, strict=True):
        assert start + length <= capacity
        taken[row, start : start + length] += 1
    assert taken.max(initial=0) <= 1
    assert taken.any(axis=1).all()
    assert not (np.diff(taken, axis=1) > 0).any()  # a row is filled from its beginning without a gap


def test_the_seed_decides_who_shares_a_row() -> None:
    lengths = np.full(100, 5)
    one, other = (place_items(lengths, 10, seed)[0] for seed in (0, 1))
    assert not np.array_equal(one, other)
    assert np.array_equal(one, place_items(lengths, 10, 0)[0])


def test_a_plan_grows_with_lengths_not_with_items() -> None:
    """A hundred million items of a few lengths are planned at once, and nearly without waste."""
    counts = np.zeros(2050, np.int64)
    counts[[2049, 1500, 1000, 549, 300, 49, 7]] = 10**7, 3 * 10**7, 10**7, 10**7, 10**7, 10**7, 10**8
    kinds = plan_rows(counts, 2049)
    assert len(kinds) < 100
    rows, tokens = sum(kind.rows for kind in kinds), int((counts * np.arange(2050)).sum())
    assert rows * 2049 >= tokens
    held = np.zeros(2050, np.int64)
    for kind in kinds:
        for length, times in kind.content:
            held[length] += times * kind.rows
    assert np.array_equal(held, counts)


def packed(folder: Path, lengths: list[int], capacity: int) -> tuple[InstructionRows, list[tuple[np.ndarray, ...]]]:
    """Items of random tokens in rows, and the items."""
    random = np.random.default_rng(0)
    store = TokenStore(folder, "x", np.dtype("<u2"))
    given = [(random.integers(1, 9000, length), random.random(length) < 0.5) for length in lengths]
    for tokens, mask in given:
        store.append(tokens, mask)
    made = write_rows(store, folder / "train", capacity, 0, seed=3)
    arrays = [np.load(folder / f"train.{name}.npy") for name in ("tokens", "loss_mask", "documents")]
    return InstructionRows(*arrays, made.places, made.targets), given


@pytest.mark.parametrize("at_once", [1, 50, 1 << 22])
def test_rows_hold_the_items(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    monkeypatch.setattr(instruction_packing, "_TOKENS_AT_ONCE", at_once)
    rows, given = packed(tmp_path, [5, 17, 1, 3, 16, 9, 2, 2, 8, 17, 4], 17)
    covered = np.zeros(rows.tokens.shape, bool)
    for (row, start, size, targets), (tokens, mask) in zip(rows.places.tolist(), given, strict=True):
        part = row, slice(start, start + size)
        assert np.array_equal(rows.tokens[part], tokens)
        expected = mask.copy()
        expected[0] = False
        assert np.array_equal(rows.loss_mask[part], expected)
        assert targets == expected.sum()
        assert len(set(rows.documents[part].tolist())) == 1
        covered[part] = True
    assert (rows.tokens[~covered] == 0).all()
    assert not rows.loss_mask[~covered].any()
    assert np.array_equal(rows.targets, rows.loss_mask.sum(1))
    for number, documents in enumerate(rows.documents.astype(int)):
        own = [place for place in rows.places.tolist() if place[0] == number]
        assert set(np.diff(documents)) <= {0, 1}
        assert documents[0] == 0
        assert documents.max() == len(own) - covered[number].all()  # the padding counts as one more


def test_batches_as_a_model_takes_them(tmp_path: Path) -> None:
    """Targets are the following tokens of the same item, and only the learnt ones."""
    rows, given = packed(tmp_path, [5, 17, 1, 3, 16, 9, 2, 2, 8, 17, 4], 17)
    batch = rows.take(slice(None))
    assert all(array.dtype == np.int64 and array.shape == (len(rows), 16) for array in batch)
    expected = np.full(batch.targets.shape, IGNORE)
    for (row, start, size, _), (tokens, mask) in zip(rows.places.tolist(), given, strict=True):
        for place in range(1, size):
            if mask[place]:
                expected[row, start + place - 1] = tokens[place]
    assert np.array_equal(batch.targets, expected)
    assert np.array_equal(batch.tokens, rows.tokens[:, :-1])
    inside = batch.targets != IGNORE  # a target and its input are of one item
    assert (rows.documents[:, 1:][inside] == batch.documents[inside]).all()
    assert np.array_equal((batch.targets != IGNORE).sum(1), rows.targets)


def test_positions_begin_anew_with_every_document(tmp_path: Path) -> None:
    rows, _ = packed(tmp_path, [5, 17, 1, 3, 16, 9, 2, 2, 8, 17, 4], 17)
    positions = document_positions(rows.take(slice(None)).documents)
    for row, start, size, _ in rows.places.tolist():
        assert positions[row, start : start + size].tolist() == list(range(size))[: 16 - start]


def test_packed_conversations_do_not_see_each_other(tmp_path: Path) -> None:
    """A model of transformers needs nothing but the positions: every logit is that of the conversation alone."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    rows, given = packed(tmp_path, [5, 17, 3, 16, 9, 2, 2, 8, 17, 4, 7, 7, 6], 17)
    batch = rows.take(slice(None))
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=9000, **sizes)).double().eval()
    positions = torch.from_numpy(document_positions(batch.documents))
    with torch.no_grad():
        together = model(torch.from_numpy(batch.tokens), position_ids=positions, use_cache=False).logits
        for (row, start, size, _), (tokens, _) in zip(rows.places.tolist(), given, strict=True):
            kept = min(size, 16 - start)
            alone = model(torch.from_numpy(tokens[None, :kept].astype(np.int64)), use_cache=False).logits[0]
            torch.testing.assert_close(together[row, start : start + kept], alone, rtol=0, atol=1e-12)


def test_no_items(tmp_path: Path) -> None:
    rows, _ = packed(tmp_path, [], 17)
    assert rows.tokens.shape == (0, 17)
    assert rows.places.shape == (0, 4)
    assert rows.targets.shape == (0,)
    with pytest.raises(UserError, match="holds no conversation"):
        InstructionSource(rows, 0, 4)


def test_ranks_share_one_global_batch(tmp_path: Path) -> None:
    rows, _ = packed(tmp_path, list(range(1, 17)) * 4, 17)
    source = InstructionSource(rows, seed=1, global_batch_size=6)
    for step in (0, 7, 1000):
        whole = source.batch(step)
        for world in (2, 3, 6):
            shares = [source.batch(step, rank, world) for rank in range(world)]
            for name in ("tokens", "targets", "documents"):
                joined = np.concatenate([getattr(share, name) for share in shares])
                assert np.array_equal(joined, getattr(whole, name))
        assert source.targets(step) == (whole.targets != IGNORE).sum()
    with pytest.raises(ValueError, match="not a multiple of 4 ranks"):
        source.batch(0, 0, 4)
    with pytest.raises(ValueError, match=r"outside 0\.\.2"):
        source.batch(0, 3, 3)


def test_an_epoch_uses_every_row_once(tmp_path: Path) -> None:
    rows, _ = packed(tmp_path, [9] * 12, 17)
    source = InstructionSource(rows, seed=1, global_batch_size=4)
    epochs = [np.concatenate([source.batch(3 * e + s).tokens for s in range(3)]).tolist() for e in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(rows.take(slice(None)).tokens.tolist())
    assert epochs[0] != epochs[1]
