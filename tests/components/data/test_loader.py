"""Batches are a pure function of (seed, step, data set), whatever the number of ranks."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelmill.components.core.errors import UserError
from modelmill.components.core.manifest import Manifest
from modelmill.components.data.config import PackingConfig
from modelmill.components.data.loader import BatchSource, open_rows
from modelmill.components.data.packing import pack_tokens
from tests.components.data.conftest import Produce, produce_in


def numbered(rows: int) -> np.ndarray:
    """Rows that carry their own number."""
    return np.repeat(np.arange(rows, dtype=np.uint16)[:, None], 5, axis=1)


@pytest.fixture(scope="module")
def tokens(shared: Path, corpus: Manifest, tokenizer: Manifest) -> Manifest:
    config = PackingConfig(sequence_length=64)
    return produce_in(shared / "loader-tokens", pack_tokens, config, corpus=corpus, tokenizer=tokenizer)


@given(st.integers(1, 50), st.integers(0, 100), st.integers(0, 20), st.integers(0, 2**40))
def test_ranks_share_one_global_batch(rows: int, seed: int, step: int, far: int) -> None:
    for at in (step, far):
        source = BatchSource(numbered(rows), seed, global_batch_size=8)
        whole = source.batch(at)
        for world in (1, 2, 4, 8):
            shares = [BatchSource(numbered(rows), seed, 8).batch(at, rank, world) for rank in range(world)]
            assert all(share.shape == (8 // world, 5) for share in shares)
            assert np.array_equal(np.concatenate(shares), whole)
        assert whole.dtype == np.int64


@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 5))
def test_an_epoch_uses_every_row_once(rows: int, batch: int, seed: int) -> None:
    """Also when batches straddle epochs or are larger than one."""
    source = BatchSource(numbered(rows), seed, batch)
    steps = -(-3 * rows // batch)
    stream = np.concatenate([source.batch(step)[:, 0] for step in range(steps)])
    for epoch in range(3):
        assert sorted(stream[epoch * rows : (epoch + 1) * rows]) == list(range(rows))


def test_epochs_have_orders_of_their_own() -> None:
    source = BatchSource(numbered(500), seed=0, global_batch_size=500)
    first, second = source.batch(0)[:, 0], source.batch(1)[:, 0]
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, BatchSource(numbered(500), 1, 500).batch(0)[:, 0])


def test_a_batch_does_not_depend_on_what_was_read_before() -> None:
    steady, jumping = (BatchSource(numbered(100), 3, 8) for _ in range(2))
    expected = [steady.batch(step) for step in range(60)]
    for step in (59, 0, 31, 13, 12):
        assert np.array_equal(jumping.batch(step), expected[step])


def test_uneven_sharing_is_refused() -> None:
    source = BatchSource(numbered(10), 0, 6)
    with pytest.raises(ValueError, match="6 is not a multiple of 4 ranks"):
        source.batch(0, 0, 4)
    with pytest.raises(ValueError, match=r"rank: 2 is outside 0\.\.1"):
        source.batch(0, 2, 2)
    with pytest.raises(ValueError, match="make no batch"):
        BatchSource(numbered(10), 0, 0)


def test_rows_are_mapped_not_loaded(tokens: Manifest) -> None:
    rows = open_rows(tokens, "train")
    assert isinstance(rows, np.memmap)
    assert rows.shape == (tokens.counts["train_rows"], 65)
    assert rows.dtype == np.uint16
    assert not rows.flags.writeable
    batch = BatchSource(rows, 0, 4).batch(0)
    assert batch.flags.writeable
    assert batch.max() < tokens.counts["vocab_size"]


def test_unknown_split_is_refused(tokens: Manifest) -> None:
    with pytest.raises(UserError, match=r"no file 'dev\.bin' .* it holds test\.bin, train\.bin, validation\.bin"):
        open_rows(tokens, "dev")


@pytest.mark.parametrize("damage", ["truncated", "flipped", "removed"])
def test_damage_is_found_when_rows_are_opened(tokens: Manifest, tmp_path: Path, produce: Produce, damage: str) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(tokens.uri, folder)
    copy = tokens.model_copy(update={"uri": str(folder)})
    path = folder / "train.bin"
    data = bytearray(path.read_bytes())
    assert np.array_equal(open_rows(copy, "train"), open_rows(tokens, "train"))
    if damage == "removed":
        path.unlink()
    else:
        data[100] ^= 1
        path.write_bytes(data[:-2] if damage == "truncated" else data)
    with pytest.raises(UserError, match=r"train\.bin (has \d+ bytes|is corrupt|is missing)"):
        open_rows(copy, "train")


def test_a_manifest_that_counts_other_rows_is_refused(tokens: Manifest) -> None:
    counts = tokens.counts | {"train_rows": tokens.counts["train_rows"] - 1}
    with pytest.raises(UserError, match="does not hold"):
        open_rows(tokens.model_copy(update={"counts": counts}), "train")
