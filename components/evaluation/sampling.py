"""Sample continuations for a report: what the model writes, greedy and drawn at random from a fixed seed.

Not `decoding`, which answers many prompts at once: this needs only logits, so it also runs our own decoder as it was
trained, without transformers and a cache. Draws are torch's multinomial in fp32 from one generator a continuation;
those of `decoding` are uniform numbers an example, looked up in fp64. Taking one for the other would change the texts
that seeds give.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from modelmill.components.core.errors import UserError
from modelmill.components.evaluation.config import EvaluationConfig

NextLogits = Callable[[list[int]], Tensor]


class Codec(Protocol):
    """What sampling needs of a tokenizer."""

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens."""

    def decode(self, tokens: list[int]) -> str:
        """Text of token ids, special tokens left out."""


@dataclass(frozen=True)
class Prompt:
    """A text to continue.

    Attributes:
        tokens: what the model is given, at least one token.
        text: the same, as people read it (without the end-of-text token in front of a document).
        reference: how a held-out document really goes on, None for a prompt of the user's.
    """

    tokens: list[int]
    text: str
    reference: str | None = None


def generate(
    next_logits: NextLogits,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    context_length: int,
    eos_token_id: int | None,
    temperature: float | None = None,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
) -> list[int]:
    """Continue a prompt token by token.

    The whole context is computed again for each token: at the lengths and numbers of a report that costs seconds,
    and the numbers are those of training, without a cache that could disagree.

    Args:
        next_logits: token ids to the logits [V] of the token after them.
        prompt: at least one token id.
        max_new_tokens: upper limit of the continuation.
        context_length: tokens the model can see; older ones are dropped.
        eos_token_id: ends the continuation and is not part of it; None never ends it.
        temperature: divides the logits before a draw; None takes the most likely token.
        top_k: draw among the k most likely tokens.
        generator: source of the draws, on the CPU.

    Returns:
        The new token ids.
    """
    tokens = list(prompt)
    for _ in range(max_new_tokens):
        logits = next_logits(tokens[-context_length:]).float().cpu()
        token = int(logits.argmax()) if temperature is None else _draw(logits / temperature, top_k, generator)
        if token == eos_token_id:
            break
        tokens.append(token)
    return tokens[len(prompt) :]


def _draw(logits: Tensor, top_k: int | None, generator: torch.Generator | None) -> int:
    if top_k is not None and top_k < len(logits):
        values, places = logits.topk(top_k)
    else:
        values, places = logits, torch.arange(len(logits))
    choice = torch.multinomial(values.softmax(dim=0), 1, generator=generator)
    return int(places[choice])


def heldout_prompts(
    rows: np.ndarray,
    codec: Codec,
    *,
    num_prompts: int,
    prompt_tokens: int,
    max_new_tokens: int,
    eos_token_id: int | None,
) -> list[Prompt]:
    """Beginnings of documents in rows [n, T + 1], evenly spaced over them, with how they go on.

    A document begins after an end-of-text token. Rows in which none begins (long documents) give their own beginning.
    """
    length = min(prompt_tokens, rows.shape[1] - 1)
    starts = []
    if eos_token_id is not None:
        row, column = np.nonzero(rows[:, : rows.shape[1] - length] == eos_token_id)
        pairs = zip(row.tolist(), column.tolist(), strict=True)
        starts = [(r, c) for r, c in pairs if not (rows[r, c + 1 : c + 1 + length] == eos_token_id).any()]
    starts = starts or [(r, -1) for r in range(len(rows))]
    count = min(num_prompts, len(starts))
    chosen = [starts[index * len(starts) // count] for index in range(count)]
    prompts = []
    for row_index, before in chosen:
        line = rows[row_index].tolist()
        begin = before + 1
        rest = line[begin + length : begin + length + max_new_tokens]
        rest = rest[: rest.index(eos_token_id)] if eos_token_id in rest else rest
        shown = line[begin : begin + length]
        prompts.append(Prompt(line[max(before, 0) : begin + length], codec.decode(shown), codec.decode(rest)))
    return prompts


def configured_prompts(texts: Sequence[str], codec: Codec, eos_token_id: int | None) -> list[Prompt]:
    """Prompts of the recipe, each put at the beginning of a document.

    Raises:
        UserError: a prompt has no token and no end-of-text token can stand in front of it.
    """
    prompts = []
    for index, text in enumerate(texts):
        tokens = ([eos_token_id] if eos_token_id is not None else []) + codec.encode(text)
        if not tokens:
            raise UserError(f"evaluation.prompts.{index}: {text!r} has no token; give some text")
        prompts.append(Prompt(tokens, text))
    return prompts


def continue_prompts(
    prompts: Sequence[Prompt],
    next_logits: NextLogits,
    codec: Codec,
    config: EvaluationConfig,
    *,
    context_length: int,
    eos_token_id: int | None,
) -> list[dict[str, Any]]:
    """Continue each prompt greedily and `config.num_samples` times at random, as records for `samples.json`.

    Every draw has its own seed, `seed + num_samples * prompt + sample`, so that one more prompt changes no other.
    """
    records = []
    limits: dict[str, Any] = {
        "max_new_tokens": config.max_new_tokens,
        "context_length": context_length,
        "eos_token_id": eos_token_id,
    }
    for place, prompt in enumerate(prompts):
        continuations: list[dict[str, Any]] = [
            {"method": "greedy", "text": codec.decode(generate(next_logits, prompt.tokens, **limits))}
        ]
        for sample in range(config.num_samples):
            seed = config.seed + config.num_samples * place + sample
            drawn = generate(
                next_logits,
                prompt.tokens,
                temperature=config.temperature,
                top_k=config.top_k,
                generator=torch.Generator().manual_seed(seed),
                **limits,
            )
            settings = {"temperature": config.temperature, "top_k": config.top_k, "seed": seed}
            continuations.append({"method": "sampled", **settings, "text": codec.decode(drawn)})
        records.append({"prompt": prompt.text, "reference": prompt.reference, "continuations": continuations})
    return records


class FolderCodec:
    """The tokenizer of an exported model's folder."""

    def __init__(self, folder: Path) -> None:
        file = folder / "tokenizer.json"
        if file.is_file():
            from tokenizers import Tokenizer

            fast = Tokenizer.from_file(str(file))
            self._encode: Callable[[str], Any] = lambda text: fast.encode(text, add_special_tokens=False).ids
            self._decode: Callable[[list[int]], Any] = lambda tokens: fast.decode(tokens, skip_special_tokens=True)
        else:  # a SentencePiece model; costs the import of transformers
            from transformers import AutoTokenizer

            slow = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            self._encode = lambda text: slow.encode(text, add_special_tokens=False)
            self._decode = lambda tokens: slow.decode(tokens, skip_special_tokens=True)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens."""
        return list(self._encode(text))

    def decode(self, tokens: list[int]) -> str:
        """Text of token ids, special tokens left out."""
        return str(self._decode(tokens))
