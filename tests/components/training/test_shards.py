"""Boxes against plain indexing, and tensors that lie in several files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from modelmill.components.training.shards import (
    Box,
    StoredTensors,
    copies,
    is_first_holder,
    local_box,
    local_part,
)


def spans(length: int) -> st.SearchStrategy[tuple[int, int]]:
    """First index and length of a part, empty ones too, of so many indices."""
    ends = st.tuples(st.integers(0, length), st.integers(0, length))
    return ends.map(lambda pair: (min(pair), abs(pair[0] - pair[1])))


def boxes() -> st.SearchStrategy[Box]:
    return st.tuples(spans(5), spans(4)).map(lambda parts: Box(*zip(*parts, strict=True)))


@given(boxes(), boxes())
def test_what_two_boxes_share_is_what_two_masks_share(one: Box, other: Box) -> None:
    whole, origin = torch.arange(20).view(5, 4), Box((0, 0), (5, 4))
    masks = [torch.zeros(5, 4, dtype=torch.bool) for _ in range(2)]
    for mask, box in zip(masks, (one, other), strict=True):
        mask[box.within(origin)] = True
        assert mask.sum() == box.volume
    common = one.overlap(other)
    both = masks[0] & masks[1]
    assert (common is None) == (not both.any())
    if common is not None:
        assert common.volume == both.sum()
        for box in (one, other):  # the same elements, whichever of the two parts is at hand
            assert torch.equal(whole[box.within(origin)][common.within(box)].flatten(), whole[both])


def test_a_scalar_is_a_box_that_meets_itself() -> None:
    scalar = local_box(torch.tensor(3.0))
    assert scalar.volume == 1
    assert scalar.overlap(scalar) == scalar


def test_a_plain_tensor_is_whole_on_every_rank_and_the_first_writes_it() -> None:
    tensor = torch.nn.Parameter(torch.ones(3, 2))
    assert local_box(tensor) == Box((0, 0), (3, 2))
    assert local_part(tensor).data_ptr() == tensor.data_ptr()
    assert copies(tensor, 4) == 4
    assert [is_first_holder(tensor, rank, 2) for rank in range(2)] == [True, False]


def entry(parts: list[tuple[str, tuple[int, ...], tuple[int, ...]]]) -> dict[str, object]:
    return {
        "dtype": "float32",
        "shape": [6, 4],
        "parts": [{"file": file, "offset": list(offset), "size": list(size)} for file, offset, size in parts],
    }


def test_any_part_is_put_together_from_the_files_that_hold_it(tmp_path: Path) -> None:
    whole = torch.arange(24.0).view(6, 4)
    save_file({"weight": whole[:4].contiguous()}, tmp_path / "a.safetensors")
    save_file({"weight": whole[4:].contiguous()}, tmp_path / "b.safetensors")
    parts = [("a.safetensors", (0, 0), (4, 4)), ("b.safetensors", (4, 0), (2, 4))]
    with StoredTensors(tmp_path, {"model/weight": entry(parts)}) as stored:
        assert (stored.names("model"), stored.names("optimizer")) == (["weight"], [])
        for box in (Box((0, 0), (6, 4)), Box((3, 1), (3, 2)), Box((4, 0), (2, 4)), Box((2, 0), (0, 4))):
            target = torch.full(box.size, -1.0)
            stored.fill(target, "model/weight", box)
            assert torch.equal(target, whole[box.within(Box((0, 0), (6, 4)))])
    with (
        StoredTensors(tmp_path, {"model/weight": entry(parts[:1])}) as stored,
        pytest.raises(RuntimeError, match="16 of the 24 elements"),
    ):
        stored.fill(torch.empty(6, 4), "model/weight", Box((0, 0), (6, 4)))


def test_a_file_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"no")
    parts = [("a.safetensors", (0, 0), (6, 4))]
    with (
        StoredTensors(tmp_path, {"model/weight": entry(parts)}) as stored,
        pytest.raises(RuntimeError, match=r"a\.safetensors"),
    ):
        stored.fill(torch.empty(6, 4), "model/weight", Box((0, 0), (6, 4)))
