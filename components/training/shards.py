"""Which part of a tensor a rank holds, whatever the layout, and how such parts are read from files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


@dataclass(frozen=True)
class Box:
    """An axis-aligned part of a tensor: the first index and the length along each dimension."""

    offset: tuple[int, ...]
    size: tuple[int, ...]

    @property
    def volume(self) -> int:
        """Elements in it; 1 for that of a scalar."""
        return math.prod(self.size)

    def overlap(self, other: Box) -> Box | None:
        """What two boxes of one tensor share, or None."""
        starts = [max(a, b) for a, b in zip(self.offset, other.offset, strict=True)]
        ends = [min(a + m, b + n) for a, m, b, n in zip(self.offset, self.size, other.offset, other.size, strict=True)]
        if any(end <= start for start, end in zip(starts, ends, strict=True)):
            return None
        return Box(tuple(starts), tuple(end - start for start, end in zip(starts, ends, strict=True)))

    def within(self, outer: Box) -> tuple[slice, ...]:
        """How to index a tensor that holds `outer` to get this box, which lies inside it."""
        starts = [mine - its for mine, its in zip(self.offset, outer.offset, strict=True)]
        return tuple(slice(start, start + length) for start, length in zip(starts, self.size, strict=True))


def local_part(tensor: Tensor) -> Tensor:
    """This rank's part of a distributed tensor, sharing its memory; a plain tensor itself."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_box(tensor: Tensor) -> Box:
    """Where this rank's part lies in the whole tensor; of a plain tensor all of it.

    Raises:
        RuntimeError: a distributed tensor's part is not one box of the size that its placements say.
    """
    if not isinstance(tensor, DTensor):
        return Box((0,) * tensor.dim(), tuple(tensor.shape))
    size, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    if tuple(size) != tuple(tensor.to_local().shape):
        raise RuntimeError(f"a part of {tuple(tensor.to_local().shape)} should be {tuple(size)}: {tensor.placements}")
    return Box(tuple(offset), tuple(size))


def copies(tensor: Tensor, world_size: int) -> int:
    """How many ranks hold the same part as this one: all of them for a plain tensor.

    Raises:
        RuntimeError: a distributed tensor spans some ranks only, so that nobody can tell, or is not yet summed up.
    """
    if not isinstance(tensor, DTensor):
        return world_size
    if tensor.device_mesh.size() != world_size:
        raise RuntimeError(f"a tensor spans {tensor.device_mesh.size()} of {world_size} ranks: {tensor.device_mesh}")
    if any(placement.is_partial() for placement in tensor.placements):
        raise RuntimeError(f"a tensor of {tuple(tensor.shape)} holds partial sums: {tensor.placements}")
    sizes = zip(tensor.device_mesh.shape, tensor.placements, strict=True)
    return math.prod(size for size, placement in sizes if placement.is_replicate())


def is_first_holder(tensor: Tensor, rank: int, world_size: int) -> bool:
    """Whether no rank before this one holds the same part."""
    if not isinstance(tensor, DTensor):
        return rank == 0
    copies(tensor, world_size)
    place: Sequence[int] = tensor.device_mesh.get_coordinate() or ()
    return all(at == 0 or not placement.is_replicate() for at, placement in zip(place, tensor.placements, strict=True))


class StoredTensors:
    """Tensors that lie in parts in the safetensors files of a folder, read part by part; a context manager."""

    def __init__(self, folder: Path, index: dict[str, Any]) -> None:
        """
        Args:
            folder: where the files lie.
            index: by "<kind>/<key>" `dtype`, `shape` and `parts`: `file` (which calls the part <key>), and the
                `offset` and `size` of the part's box.
        """
        self.folder, self.index = folder, index
        self._files: dict[str, Any] = {}
        self._stack = ExitStack()

    def __enter__(self) -> StoredTensors:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def names(self, kind: str) -> list[str]:
        """Tensors of the model or the optimizer."""
        return [name.removeprefix(f"{kind}/") for name in self.index if name.startswith(f"{kind}/")]

    def is_scalar(self, name: str) -> bool:
        """Whether a tensor has no dimensions."""
        return not self.index[name]["shape"]

    def dtype(self, name: str) -> torch.dtype:
        """Element type of a tensor as it was stored."""
        return getattr(torch, self.index[name]["dtype"])

    def fill(self, target: Tensor, name: str, box: Box) -> None:
        """Copy a box of a tensor into `target`, which has its size.

        Raises:
            RuntimeError: a file cannot be read, or the files together do not hold the box.
        """
        filled, key = 0, name.partition("/")[2]
        for part in self.index[name]["parts"]:
            there = Box(tuple(part["offset"]), tuple(part["size"]))
            if (common := box.overlap(there)) is not None:
                file = self._file(part["file"])
                found = file.get_slice(key)[common.within(there)] if common != there else file.get_tensor(key)
                target[common.within(box)].copy_(found)
                filled += common.volume
        if filled != box.volume:
            raise RuntimeError(f"{self.folder}: {name} has {filled} of the {box.volume} elements of {box}")

    def _file(self, name: str) -> Any:
        if name not in self._files:
            self._files[name] = self._stack.enter_context(open_tensors(self.folder / name))
        return self._files[name]


def open_tensors(path: Path) -> Any:
    """A safetensors file as `safe_open` gives it.

    Raises:
        RuntimeError: it cannot be read; the message names it.
    """
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise RuntimeError(f"{path}: {error}") from error
