"""What needs the model itself: its losses on rows and its samples. Importing this costs the import of torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from modelmill.components.core import events
from modelmill.components.core.errors import UserError
from modelmill.components.core.manifest import Manifest
from modelmill.components.evaluation.config import EvaluationConfig
from modelmill.components.evaluation.sampling import (
    FolderCodec,
    NextLogits,
    configured_prompts,
    continue_prompts,
    heldout_prompts,
)
from modelmill.components.llama.huggingface import load_huggingface
from modelmill.components.llama.model import LlamaDecoder
from modelmill.components.training.loss import linear_cross_entropy


def load_decoder(folder: Path, tokens: Manifest) -> LlamaDecoder:
    """The exported model on the best device of this machine, ready to score.

    Raises:
        UserError: the folder holds no usable model, or it does not fit the tokens.
    """
    decoder = load_huggingface(folder)
    if decoder.config.known_vocab_size < tokens.counts["vocab_size"]:
        raise UserError(
            f"tokens: their vocabulary has {tokens.counts['vocab_size']} tokens, the model's "
            f"{decoder.config.known_vocab_size}; evaluate with the tokens the model was trained on"
        )
    if decoder.config.max_sequence_length < tokens.counts["sequence_length"]:
        raise UserError(
            f"packing.sequence_length: {tokens.counts['sequence_length']} is more than the model's "
            f"{decoder.config.max_sequence_length} positions; pack shorter rows"
        )
    return decoder.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def model_row_losses(decoder: LlamaDecoder, rows: NDArray[np.integer], batch_size: int) -> NDArray[np.float64]:
    """Mean loss of each of the rows [n, T + 1] in nats a token: [n]. Full logits are never held."""
    device, length = decoder.output_weight.device, rows.shape[1] - 1
    losses = np.empty(len(rows))
    with torch.inference_mode():
        for begin in range(0, len(rows), batch_size):
            batch = torch.from_numpy(np.asarray(rows[begin : begin + batch_size], dtype=np.int64)).to(device)
            hidden = decoder.hidden_states(batch[:, :-1])
            for place, (states, targets) in enumerate(zip(hidden, batch[:, 1:], strict=True)):
                total = linear_cross_entropy(states, decoder.output_weight, targets, reduction="sum")
                losses[begin + place] = float(total) / length
            events.progress("scoring held-out rows", begin + len(batch), len(rows))
    return losses


def write_samples(
    config: EvaluationConfig, decoder: LlamaDecoder, folder: Path, rows: NDArray[np.integer], tokens: Manifest
) -> list[dict[str, Any]]:
    """Records of `samples.json`: continuations of the recipe's prompts, or of documents in rows [n, T + 1]."""
    codec, eos = FolderCodec(folder), tokens.metadata.get("eos_token_id")
    if config.prompts:
        prompts = configured_prompts(config.prompts, codec, eos)
    else:
        prompts = heldout_prompts(
            rows,
            codec,
            num_prompts=config.num_prompts,
            prompt_tokens=config.prompt_tokens,
            max_new_tokens=config.max_new_tokens,
            eos_token_id=eos,
        )
    events.progress("writing samples")
    logits = _next_logits(decoder, tokens.counts["vocab_size"])
    length = decoder.config.max_sequence_length
    return continue_prompts(prompts, logits, codec, config, context_length=length, eos_token_id=eos)


def _next_logits(decoder: LlamaDecoder, vocab_size: int) -> NextLogits:
    weight = decoder.output_weight[:vocab_size]  # a padded vocabulary has rows that mean nothing

    def logits(context: list[int]) -> torch.Tensor:
        with torch.inference_mode():
            return decoder.hidden_states(torch.tensor([context], device=weight.device))[0, -1] @ weight.T

    return logits
