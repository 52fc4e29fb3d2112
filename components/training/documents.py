"""Where documents begin and end in packed rows, in the forms that attention kernels want.

A row [T + 1] is cut from a stream of documents, each ended by its end-of-text token, which belongs to the document it
ends. Its first T tokens are the inputs. `documents` [B, T] counts the documents of a row: 0 for the first (often the
rest of one that began in another row), rising by one at the token after every end-of-text.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

BLOCK = 128  # positions of a block of a block mask; FlexAttention's default
_ROWS_AT_ONCE = 1024


def document_ids(tokens: Tensor, eos: int) -> Tensor:
    """Number of the document each token belongs to, int64 [B, T], for inputs [B, T]."""
    ends = tokens == eos
    return ends.cumsum(1) - ends.long()


def most_documents(rows: np.ndarray, eos: int) -> int:
    """The most documents that the inputs of any of the packed rows [R, T + 1] hold; reads all of them once."""
    most = 1
    for first in range(0, len(rows), _ROWS_AT_ONCE):
        # An end-of-text in the last input position begins no document: nothing follows it.
        ends = np.count_nonzero(rows[first : first + _ROWS_AT_ONCE, :-2] == eos, axis=1)
        most = max(most, 1 + int(ends.max()))
    return most


def document_lengths(documents: Tensor) -> list[int]:
    """Tokens of each document, row after row; on an accelerator this waits for the device."""
    length = documents.shape[1]
    starts = _starts(documents).nonzero().squeeze(1)
    ends = torch.cat([starts[1:], starts.new_tensor([documents.shape[0] * length])])
    return (ends - starts).tolist()


def cumulative_lengths(documents: Tensor, size: int) -> Tensor:
    """First position of each document in the flattened batch and then B x T, int32 [size + 1].

    A fixed size (the unused end repeats B x T: documents without tokens), because a kernel that is compiled or
    captured for one size is made anew for every other, and because asking the device for the number would wait for it.

    Args:
        documents: [B, T].
        size: at least the documents of all rows together; a device-side assertion fails when it is less.
    """
    starts = _starts(documents)
    torch._assert_async((starts.sum() <= size).to(torch.int32), "more documents in a batch than in the data")
    total = documents.numel()
    positions = torch.arange(total, device=documents.device, dtype=torch.int32)
    first = torch.where(starts, positions, total).sort().values[:size]
    padded = torch.full((size + 1,), total, device=documents.device, dtype=torch.int32)
    padded[: len(first)] = first
    return padded


def document_mask(documents: Tensor) -> Tensor:
    """Whether position q may see position k, bool [B, 1, T, T]: not later, and of the same document."""
    length = documents.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=documents.device).tril()
    return ((documents[:, :, None] == documents[:, None, :]) & causal).unsqueeze(1)


def document_blocks(documents: Tensor) -> BlockMask:
    """The same as a block mask of FlexAttention [B, 1, T, T], without ever making T x T values.

    Ids rise along a row, so two blocks of positions share a document when their ranges of ids meet; blocks within one
    document, the key's before the query's, need no mask at all.
    """
    length = documents.shape[1]
    count = -(-length // BLOCK)
    index = torch.arange(count, device=documents.device)
    low = documents[:, index * BLOCK]
    high = documents[:, ((index + 1) * BLOCK - 1).clamp(max=length - 1)]  # the last block may stick out
    earlier = index[:, None] > index
    meet = (index[:, None] >= index) & (low[:, :, None] <= high[:, None, :])
    whole = ((index + 1) * BLOCK <= length)[:, None]
    full = earlier & whole & (low[:, None, :] == high[:, :, None])
    numbers, indices = _in_order(meet & ~full)
    full_numbers, full_indices = _in_order(full)

    def visible(row: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (documents[row, query] == documents[row, key])

    return BlockMask.from_kv_blocks(
        numbers, indices, full_numbers, full_indices, BLOCK, visible, seq_lengths=(length, length)
    )


def _starts(documents: Tensor) -> Tensor:
    """Whether a token of the flattened batch is the first of its document, bool [B x T]."""
    starts = torch.ones_like(documents, dtype=torch.bool)
    starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return starts.flatten()


def _in_order(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Number of chosen key blocks of each query block, int32 [B, 1, Q], and their indices first, [B, 1, Q, K]."""
    indices = chosen.to(torch.int32).argsort(dim=-1, descending=True, stable=True)
    return chosen.sum(-1, dtype=torch.int32)[:, None], indices.to(torch.int32)[:, None].contiguous()
