"""Weights that are spread over ranks, brought together: one tensor, or a model as a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def whole(tensor: Tensor) -> Tensor:
    """A tensor gathered from all ranks that hold a part of it, which call this together; a plain tensor itself.

    It goes dimension of the mesh by dimension: what is sharded again after tensor parallelism comes together first;
    all at once torch warns that it cannot.
    """
    tensor = tensor.detach()
    if not isinstance(tensor, DTensor):
        return tensor
    placements = list(tensor.placements)
    for dimension in range(len(placements)):
        placements[dimension] = Replicate()
        tensor = tensor.redistribute(placements=placements)
    return tensor.to_local()


def save_whole(model: PreTrainedModel, folder: Path, *, wanted: bool) -> None:
    """Write a Hugging Face folder: `config.json` and safetensors.

    Args:
        model: on any layout; called by all ranks together.
        folder: made if missing.
        wanted: whether this rank writes.
    """
    state, gathered = model.state_dict(keep_vars=True), dict[Tensor, Tensor]()
    for tensor in state.values():
        if tensor not in gathered:  # one that has two names, as a tied head, is one tensor in the file too
            full = whole(tensor)
            gathered[tensor] = full.cpu() if wanted else torch.empty(0)
    if wanted:
        model.save_pretrained(str(folder), state_dict={name: gathered[tensor] for name, tensor in state.items()})
