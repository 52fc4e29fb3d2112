"""First weights that are the same whatever the layout: each block of rows has a generator of its own.

A rank draws only the blocks that its part of a parameter touches, so that no rank ever holds the whole model, and one
that is sharded over many ranks starts from the weights that a single process would have drawn.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import torch
from torch import Tensor

from modelmill.components.training.shards import Box, local_box, local_part

_BLOCK_ELEMENTS = 2**20  # 4 MiB drawn at a time; part of what decides the weights


@torch.no_grad()
def init_normal(parameter: Tensor, *, name: str, seed: int, std: float) -> None:
    """Fill a parameter with normal(0, std).

    The whole tensor is a function of its shape, `name`, `seed` and `std`: equal on every mesh and kind of device. It
    is drawn on the CPU in float32 and then rounded to the parameter's type.

    Args:
        parameter: [R, ...], a plain tensor or a `DTensor` of any placements, of which this rank's part is filled.
        name: of the parameter in its model.
        seed: of the model's weights.
        std: standard deviation.
    """
    _fill_blocks(parameter, name, seed, lambda block, generator: block.normal_(0.0, std, generator=generator))


@torch.no_grad()
def init_uniform(parameter: Tensor, *, name: str, seed: int, bound: float) -> None:
    """Fill a parameter with uniform numbers from -`bound` to `bound`, drawn as those of `init_normal` are."""
    _fill_blocks(parameter, name, seed, lambda block, generator: block.uniform_(-bound, bound, generator=generator))


def _fill_blocks(parameter: Tensor, name: str, seed: int, draw: Callable[[Tensor, torch.Generator], Tensor]) -> None:
    local, box = local_part(parameter), local_box(parameter)
    rows_per_block = max(1, _BLOCK_ELEMENTS // math.prod(parameter.shape[1:]))
    first, last = box.offset[0], box.offset[0] + box.size[0]
    if not box.volume:
        return
    for block in range(first // rows_per_block, math.ceil(last / rows_per_block)):
        start = block * rows_per_block
        rows = min(rows_per_block, parameter.shape[0] - start)
        drawn = Box((start, *[0] * (parameter.dim() - 1)), (rows, *parameter.shape[1:]))
        wanted = drawn.overlap(box)
        assert wanted is not None  # the block was chosen for it
        generator = torch.Generator().manual_seed(_block_seed(seed, name, block))
        values = draw(torch.empty(drawn.size, dtype=torch.float32), generator)
        local[wanted.within(box)] = values[wanted.within(drawn)].to(local)


def _block_seed(seed: int, name: str, block: int) -> int:
    """A generator's seed: torch's on the CPU uses 32 bits of it, so they must depend on everything."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}/{block}".encode()).digest()[:4], "little")
