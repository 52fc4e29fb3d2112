"""Write the continuations of a batch of prompts with a key-value cache.

Prompts are padded on the left, so that the next token of every row is the last of its logits. Rows that have ended
leave the batch with their part of the cache as soon as they are a quarter of it; copying it more often would cost more
than the rows do.

A draw takes one uniform number and looks it up in the cumulated probabilities. The numbers of an example come from a
generator of its own, so what it draws does not depend on which examples are computed with it. Probabilities still
differ in their last bits with the shape of a batch, as any product on a CPU or GPU does: where two tokens are that
close, a greedy choice may differ too.

The few samples of a pretraining report come from `sampling`, which takes any function to logits and has no cache.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from modelmill.components.core.errors import UserError
from modelmill.components.evaluation.config import GenerateConfig
from modelmill.components.evaluation.language_model import LanguageModel

_NOT_A_NUMBER = -1  # in the place of a token whose logits are not finite


@dataclass
class Continuation:
    """What follows a prompt: its tokens without the one that ended it, and whether one did."""

    tokens: list[int]
    ended: bool = False


@torch.inference_mode()
def continue_batch(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    names: Sequence[str],
    config: GenerateConfig,
    *,
    vocab_size: int,
    end_tokens: Collection[int],
    report: Callable[[int], None] = lambda ended: None,
) -> list[Continuation]:
    """Continue prompts, all at once.

    Args:
        model: any causal language model of transformers.
        prompts: token ids, at least one each.
        names: of the examples; they seed the draws and appear in errors.
        config: how many tokens, greedy or drawn.
        vocab_size: tokens to choose among; a padded vocabulary has logits beyond that mean nothing.
        end_tokens: any of them ends a continuation.
        report: called after every token with the number of prompts whose continuation is complete.

    Raises:
        UserError: logits are not finite.
    """
    device, found = model.device, [Continuation([]) for _ in prompts]
    tokens, mask = _padded(prompts)
    tokens, mask = tokens.to(device), mask.to(device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    draws = torch.from_numpy(np.stack([uniforms(config, name) for name in names])).to(device)
    cache = DynamicCache(config=model.model.config)
    rows = list(range(len(prompts)))  # of the prompts that are still in the batch
    open_rows = len(rows)
    for step in range(config.max_new_tokens):
        output = model.model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            **model.last_logits,
        )
        chosen = choose_tokens(output.logits[:, -1, :vocab_size], config, draws[:, step])
        for row, token in zip(rows, chosen.tolist(), strict=True):
            if found[row].ended:
                continue
            if token == _NOT_A_NUMBER:
                raise UserError(
                    f"model: its logits for example {names[row]!r} are not finite after {step} new tokens; its"
                    " training diverged or its weights are damaged (of a sound model: set precision: fp32)"
                )
            if token in end_tokens:
                found[row].ended = True
                open_rows -= 1
            else:
                found[row].tokens.append(token)
        report(len(prompts) - open_rows)
        if not open_rows:
            break
        tokens, positions = chosen[:, None], positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
        if 4 * open_rows <= 3 * len(rows):
            kept = [place for place, row in enumerate(rows) if not found[row].ended]
            index = torch.tensor(kept, device=device)
            cache.batch_select_indices(index)
            tokens, positions, mask, draws = tokens[index], positions[index], mask[index], draws[index]
            rows = [rows[place] for place in kept]
    return found


def uniforms(config: GenerateConfig, name: str) -> np.ndarray:
    """The numbers in [0, 1) that an example draws with: float64 [max_new_tokens], none where nothing is drawn."""
    if not config.temperature:
        return np.zeros(config.max_new_tokens)
    digest = hashlib.sha256(f"{config.seed}:{name}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest, "big")).random(config.max_new_tokens)


def choose_tokens(logits: Tensor, config: GenerateConfig, draws: Tensor) -> Tensor:
    """The next token of each row: int64 [b], or -1 where logits [b, V] are not finite.

    The temperature is applied first, then `top_k`, then `top_p`, as in transformers (nucleus sampling: Holtzman et al.
    2020, arXiv:1904.09751).

    Args:
        logits: [b, V].
        config: how to choose.
        draws: numbers in [0, 1), [b].
    """
    finite = torch.isfinite(logits.amax(dim=-1))  # nan and infinity get through a maximum; single -inf are no harm
    if not config.temperature:
        return torch.where(finite, logits.argmax(dim=-1), _NOT_A_NUMBER)
    scaled = logits.double() / config.temperature
    if config.top_k is not None and config.top_k < scaled.shape[-1]:
        values, tokens = scaled.topk(config.top_k, dim=-1)
    else:
        values, tokens = scaled.sort(dim=-1, descending=True, stable=True)
    weights = values.softmax(dim=-1)
    if config.top_p < 1:
        weights = torch.where(weights.cumsum(dim=-1) - weights < config.top_p, weights, 0.0)
    total = weights.cumsum(dim=-1)
    place = torch.searchsorted(total, draws[:, None] * total[:, -1:], right=True)
    place = place.clamp(max=(weights > 0).sum(dim=-1, keepdim=True) - 1).clamp(min=0)
    return torch.where(finite, tokens.gather(1, place).squeeze(1), _NOT_A_NUMBER)


def _padded(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Token ids [b, t], padded on the left, and which of them are no padding."""
    width = max(map(len, prompts))
    tokens = torch.zeros(len(prompts), width, dtype=torch.int64)
    mask = torch.zeros_like(tokens)
    for row, prompt in enumerate(prompts):
        tokens[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    return tokens, mask
