"""Causal attention by several kernels behind one call.

A kernel is called with queries [B, H, T, Dh], keys [B, K, T, Dh] and values [B, K, T, Dh], and returns [B, H, T, Dh];
with K < H, query head h uses key head h // (H / K) (arXiv:2305.13245). Scores are scaled by 1 / sqrt(Dh). What it
needs to know of a batch's documents it works out once for all layers: `kernel.plan(documents)` is the call for that
batch. Which kernel a run can use is decided in `attention.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from modelmill.components.training.documents import (
    cumulative_lengths,
    document_blocks,
    document_lengths,
    document_mask,
)

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class AttentionKernel(Protocol):
    """One way to compute causal attention."""

    def plan(self, documents: Tensor | None = None) -> Attend:
        """The call for a batch.

        Args:
            documents: [B, T] int64 ids that rise along each row; a position sees only its own document. None: a row
                is one document, and the call is the same object every time.
        """


@dataclass(frozen=True)
class ScaledDotProduct:
    """torch's scaled dot product attention by one of its kernels, or by the one torch prefers.

    Attributes:
        kernel: the one to use; None leaves the choice to torch.
        grouped: whether it takes fewer key than query heads; otherwise keys and values are repeated.
    """

    kernel: SDPBackend | None = None
    grouped: bool = True

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        groups = query.shape[1] // key.shape[1]
        if groups > 1 and not self.grouped:
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        with self.chosen():
            return F.scaled_dot_product_attention(
                query, key, value, mask, is_causal=mask is None, enable_gqa=self.grouped and groups > 1
            )

    def chosen(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.kernel is None else sdpa_kernel(self.kernel)

    def plan(self, documents: Tensor | None = None) -> Attend:
        return self if documents is None else _Masked(self, document_mask(documents))


@dataclass(frozen=True)
class _Masked:
    """With one mask [B, 1, T, T] for all heads."""

    kernel: ScaledDotProduct
    mask: Tensor

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self.kernel(query, key, value, self.mask)


@dataclass(frozen=True)
class DocumentwiseFlash(ScaledDotProduct):
    """torch's flash attention on a CPU, called for one document after the other: no mask, and fewer products."""

    kernel: SDPBackend | None = SDPBackend.FLASH_ATTENTION

    def plan(self, documents: Tensor | None = None) -> Attend:
        if documents is None:
            return self
        lengths = document_lengths(documents)
        # One document a row is no special case to the caller, but many small calls to us.
        return self if lengths == [documents.shape[1]] * len(lengths) else _Documentwise(self, lengths)


@dataclass(frozen=True)
class _Documentwise:
    kernel: DocumentwiseFlash
    lengths: list[int]

    @torch.compiler.disable  # the lengths are other ones in every batch: each would be compiled anew
    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        rows, heads, length, size = query.shape
        # `split` and `cat` are each other's gradient; slices would each fill a whole tensor of zeros in the backward.
        parts = [
            [document.transpose(0, 1).unsqueeze(0) for document in t.transpose(1, 2).flatten(0, 1).split(self.lengths)]
            for t in (query, key, value)
        ]
        grouped = key.shape[1] != heads
        with self.kernel.chosen():
            attended = [
                F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped).squeeze(0).transpose(0, 1)
                for q, k, v in zip(*parts, strict=True)
            ]
        return torch.cat(attended).view(rows, length, heads, size).transpose(1, 2)


@dataclass(frozen=True)
class Flex:
    """FlexAttention (Dong et al. 2024, arXiv:2412.05496), compiled: blocks of positions without a pair are skipped."""

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return _flex(query, key, value, _causal_blocks(query.shape[2], query.device))

    def plan(self, documents: Tensor | None = None) -> Attend:
        return self if documents is None else _FlexDocuments(document_blocks(documents))


@dataclass(frozen=True)
class _FlexDocuments:
    blocks: BlockMask

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return _flex(query, key, value, self.blocks)


def _flex(query: Tensor, key: Tensor, value: Tensor, blocks: BlockMask) -> Tensor:
    run: Any = flex_attention if query.device.type == "cpu" else _compiled_flex()
    return run(query, key, value, block_mask=blocks, enable_gqa=query.shape[1] != key.shape[1])


@cache
def _compiled_flex() -> Callable[..., Tensor]:
    return torch.compile(flex_attention, dynamic=False)


@lru_cache(maxsize=8)
def _causal_blocks(length: int, device: torch.device) -> BlockMask:
    def causal(_row: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query >= key

    # One row whose blocks serve every row, so the mask function must not look at the row's documents.
    blocks = document_blocks(torch.zeros(1, length, dtype=torch.int64, device=device))
    blocks.mask_mod = causal
    return blocks


@dataclass(frozen=True)
class Varlen:
    """torch's attention for sequences of several lengths laid end to end (flash attention on a GPU).

    Attributes:
        most: documents in a row at most; decides the size of the cumulative lengths.
    """

    most: int = 1

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        rows, _, length, _ = query.shape
        starts = torch.arange(0, (rows + 1) * length, length, device=query.device, dtype=torch.int32)
        return _end_to_end(_varlen, query, key, value, starts)

    def plan(self, documents: Tensor | None = None) -> Attend:
        if documents is None:
            return self
        return _EndToEnd(_varlen, cumulative_lengths(documents, self.most * len(documents)))


@dataclass(frozen=True)
class Flash3:
    """FlashAttention-3 (Shah et al. 2024, arXiv:2407.08608) from its own package, for Hopper GPUs.

    Attributes:
        most: documents in a row at most.
        deterministic: whether gradients are summed in a fixed order.
    """

    most: int = 1
    deterministic: bool = False

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        from flash_attn_interface import flash_attn_func

        heads_last = (t.transpose(1, 2) for t in (query, key, value))
        return _first(flash_attn_func(*heads_last, causal=True, deterministic=self.deterministic)).transpose(1, 2)

    def plan(self, documents: Tensor | None = None) -> Attend:
        if documents is None:
            return self
        return _EndToEnd(self._varlen, cumulative_lengths(documents, self.most * len(documents)))

    def _varlen(self, query: Tensor, key: Tensor, value: Tensor, starts: Tensor, longest: int) -> Tensor:
        from flash_attn_interface import flash_attn_varlen_func

        lengths = (starts, starts, longest, longest)
        options = {"causal": True, "deterministic": self.deterministic}
        return _first(flash_attn_varlen_func(query, key, value, *lengths, **options))


@dataclass(frozen=True)
class _EndToEnd:
    run: Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]
    starts: Tensor

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return _end_to_end(self.run, query, key, value, self.starts)


def _end_to_end(
    run: Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor,
) -> Tensor:
    """Call a kernel that takes [B x T, H, Dh] and cumulative lengths; no document is longer than a row."""
    rows, heads, length, size = query.shape
    query, key, value = (t.transpose(1, 2).flatten(0, 1) for t in (query, key, value))
    return run(query, key, value, starts, length).view(rows, length, heads, size).transpose(1, 2)


def _varlen(query: Tensor, key: Tensor, value: Tensor, starts: Tensor, longest: int) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    options: dict[str, Any] = {"window_size": (-1, 0), "enable_gqa": query.shape[1] != key.shape[1]}  # -1, 0: causal
    return _first(varlen_attn(query, key, value, starts, starts, longest, longest, **options))


def _first(result: Any) -> Tensor:
    """The output of a function that in some versions returns the softmax sums beside it."""
    return result[0] if isinstance(result, tuple) else result
