"""Group attention of Chronos-2 at a cost that is linear in the number of series.

The library lets every row of a batch attend to every row and masks those of other groups: a batch twice as large costs
four times as much there. Groups of one call have one size, so here the rows of each are gathered and attend to each
other only, which gives the same numbers up to rounding (and others at padded positions, which nothing reads).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Groups:
    """Which rows belong together.

    Attributes:
        order: rows, those of a group side by side [rows].
        size: of each group.
        mask: what to add to attention scores, [groups * positions, 1, 1, size].
    """

    order: Tensor
    size: int
    mask: Tensor


def attend_within_groups(model: Any) -> None:
    """Replace the group attention of a `Chronos2Model` in place; weights and their names stay as they are."""
    model.encoder._construct_and_invert_group_time_mask = _groups
    for block in model.encoder.block:
        layer = block.layer[1]
        layer.forward = _Attention(layer)


def _groups(group_ids: Tensor, attention_mask: Tensor, floating_type: torch.dtype) -> Groups:
    order = torch.argsort(group_ids, stable=True)
    size = len(order) // len(torch.unique(group_ids))
    seen = attention_mask[order].to(floating_type)
    mask = (1 - _by_position(seen[..., None], size)[..., 0]) * torch.finfo(floating_type).min
    return Groups(order, size, mask[:, None, None, :])


def _by_position(rows: Tensor, size: int) -> Tensor:
    """Rows [groups * size, positions, d] as [groups * positions, size, d]."""
    _, positions, width = rows.shape
    return rows.reshape(-1, size, positions, width).transpose(1, 2).reshape(-1, size, width)


class _Attention:
    """The forward pass of a `GroupSelfAttention`."""

    def __init__(self, layer: Any) -> None:
        self._layer = layer

    def __call__(self, hidden_states: Tensor, attention_mask: Groups, output_attentions: bool = False) -> Any:
        from chronos.chronos2.layers import AttentionOutput

        layer, groups = self._layer, attention_mask
        rows, positions, width = hidden_states.shape
        if groups.size == 1:  # a row that attends to itself alone: its own values
            normed = layer.layer_norm(hidden_states)
            mixed = layer.self_attention.o(layer.self_attention.v(normed))
            return AttentionOutput(hidden_states=hidden_states + layer.dropout(mixed))
        together = _by_position(layer.layer_norm(hidden_states[groups.order]), groups.size)
        attended = layer.self_attention(together, mask=groups.mask)[0]
        attended = attended.reshape(-1, positions, groups.size, width).transpose(1, 2).reshape(rows, positions, width)
        mixed = torch.empty_like(attended)
        mixed[groups.order] = attended
        return AttentionOutput(hidden_states=hidden_states + layer.dropout(mixed))
