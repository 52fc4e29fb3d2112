"""Attention within each conversation of packed rows, on the CPU.

The conversations of a row are blocks on the diagonal of its attention. transformers masks everything else, and on the
CPU what is masked costs as much as what is not. Computed block by block, no mask is built and nothing outside of the
blocks is; the rest of the model still sees whole rows. GPUs would rather have one kernel for all.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

NAME = "modelmill_by_conversation"
_OTHER_KINDS = ("sliding_window", "softcap", "position_bias", "s_aux")  # of attention, as models pass them on
_TOLERANCE = 2e-2  # of the largest state: far above rounding in bf16


def attend_by_conversation(model: PreTrainedModel) -> bool:
    """Have a model with sdpa attention compute it one conversation after the other, in place; returns whether it does.

    It does not where a layer's attention is more than causal: windows, chunks, caps, biases, sinks. That is read in
    the model's configuration and, as models differ in what they pass on, seen in a trial with a packed row.
    """
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    if model.config._attn_implementation != "sdpa" or not getattr(model, "_supports_attention_backend", False):
        return False
    if getattr(config, "sliding_window", None) is not None or kinds - {"full_attention"}:
        return False
    expected = _trial(model)
    model.set_attn_implementation(NAME)
    try:
        same = bool((_trial(model) - expected).abs().max() <= _TOLERANCE * expected.abs().max())
    except (NotImplementedError, TypeError):
        same = False
    if not same:
        model.set_attn_implementation("sdpa")
    return same


@torch.no_grad()
def _trial(model: PreTrainedModel) -> Tensor:
    device = model.device
    tokens = torch.arange(8, device=device).unsqueeze(0) % model.config.get_text_config().vocab_size
    positions = torch.arange(4, device=device).repeat(2).unsqueeze(0)
    return model.get_decoder()(input_ids=tokens, position_ids=positions, use_cache=False).last_hidden_state


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    position_ids: Tensor,
    scaling: float | None = None,
    dropout: float = 0.0,
    **others: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each conversation, in the form that transformers calls.

    Args:
        module: the model's layer of attention.
        query: [b, heads, T, d].
        key: [b, key heads, T, d], like `value`.
        value: see `key`.
        attention_mask: None, see `_no_mask`.
        position_ids: [b or 1, T]; 0 begins a conversation, and so does the start of a row.
        scaling: of the scores; None is 1/sqrt(d).
        dropout: probability.
        others: what the model passes on.

    Returns:
        [b, T, heads, d], and None for the weights.

    Raises:
        NotImplementedError: this attention is more than causal.
    """
    if any(others.get(name) is not None for name in _OTHER_KINDS) or not getattr(module, "is_causal", True):
        raise NotImplementedError(f"{type(module).__name__} asks for more than causal attention")
    batch, heads, length, size = query.shape
    begins = position_ids.expand(batch, length) == 0
    begins[:, 0] = True
    starts = begins.flatten().nonzero().flatten().tolist()
    parts = []
    for start, end in zip(starts, [*starts[1:], batch * length], strict=True):
        row, first = divmod(start, length)
        part = slice(row, row + 1), slice(None), slice(first, first + end - start)
        parts.append(
            F.scaled_dot_product_attention(
                query[part],
                key[part],
                value[part],
                is_causal=True,
                scale=scaling,
                dropout_p=dropout,
                enable_gqa=heads != key.shape[1],
            )
        )
    together = torch.cat(parts, dim=2)  # [1, heads, b * T, d]
    return together.transpose(1, 2).reshape(batch, length, heads, size), None


def _no_mask(*_: Any, **__: Any) -> None:
    """Conversations are told apart by their positions alone."""


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _no_mask)
