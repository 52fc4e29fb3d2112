"""How likely a model finds token sequences, as sums of nats, without holding the logits of a batch.

Sequences are padded on the right: in a causal model nothing before sees what is behind, so no mask is needed.
Importing this costs the import of torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from modelmill.components.core import events
from modelmill.components.core.errors import UserError
from modelmill.components.evaluation.batching import batches
from modelmill.components.evaluation.language_model import LanguageModel, memory_explained
from modelmill.components.training.loss import default_chunk_tokens

_TRIAL_TOKENS = 6


@dataclass(frozen=True)
class Window:
    """Tokens that the model sees at once.

    Attributes:
        example: number of the example it belongs to.
        tokens: ids [t], at least two.
        targets: which of the tokens are scored, bool [t]; the first cannot be.
    """

    example: int
    tokens: NDArray[np.integer]
    targets: NDArray[np.bool_]


def window_losses(
    model: LanguageModel, windows: Sequence[Window], names: Sequence[str], batch_tokens: int
) -> NDArray[np.float64]:
    """Sum of the cross entropies of each window's targets, in nats: [n].

    Args:
        model: any causal language model of transformers.
        windows: none longer than the model's positions (and one token).
        names: of the examples, for errors.
        batch_tokens: tokens a forward pass, padding included.

    Raises:
        UserError: a loss is not finite, or a GPU's memory does not suffice.
    """
    losses, done = np.zeros(len(windows)), 0
    with torch.inference_mode(), memory_explained():
        plain = _head_is_all(model)
        for batch in batches([len(window.tokens) - 1 for window in windows], batch_tokens):
            losses[batch] = _batch_losses(model, [windows[place] for place in batch], plain)
            done += len(batch)
            events.progress("scoring texts", done, len(windows))
    bad = np.flatnonzero(~np.isfinite(losses))
    if len(bad):
        raise UserError(
            f"model: its loss on example {names[windows[bad[0]].example]!r} is not finite ({len(bad)} of"
            f" {len(windows)} are not); its training diverged or its weights are damaged (of a sound model: set"
            " precision: fp32)"
        )
    return losses


def _batch_losses(model: LanguageModel, windows: Sequence[Window], plain: bool) -> NDArray[np.float64]:
    width = max(len(window.tokens) for window in windows) - 1
    inputs = np.zeros((len(windows), width), np.int64)
    targets = np.full((len(windows), width), -1, np.int64)
    for row, window in enumerate(windows):
        size = len(window.tokens) - 1
        tokens = window.tokens.astype(np.int64)  # stored unsigned, which has no -1
        inputs[row, :size] = tokens[:-1]
        targets[row, :size] = np.where(window.targets[1:], tokens[1:], -1)
    rows, places = np.nonzero(targets >= 0)
    wanted = torch.from_numpy(targets[rows, places]).to(model.device)
    index = torch.from_numpy(rows * width + places).to(model.device)
    given = torch.from_numpy(inputs).to(model.device)
    if plain:
        hidden = model.model.get_decoder()(input_ids=given, use_cache=False).last_hidden_state
        head = model.model.get_output_embeddings()
        found = _cross_entropies(hidden.flatten(0, 1)[index], wanted, head)
    else:
        logits = model.model(input_ids=given, use_cache=False).logits
        found = _cross_entropies(logits.flatten(0, 1)[index], wanted, nn.Identity())
    totals: NDArray[np.float64] = np.zeros(len(windows))
    np.add.at(totals, rows, found.double().cpu().numpy())
    return totals


def _cross_entropies(states: Tensor, targets: Tensor, head: nn.Module) -> Tensor:
    """Losses [n] of targets [n], the logits of a chunk of states at a time."""
    rows = head.weight.shape[0] if isinstance(head, nn.Linear) else states.shape[1]
    chunk = default_chunk_tokens(rows, states.device.type)
    losses = []
    for some, wanted in zip(states.split(chunk), targets.split(chunk), strict=True):
        logits = head(some)
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        losses.append(nn.functional.cross_entropy(wide, wanted, reduction="none"))
    return torch.cat(losses) if losses else targets.new_zeros(0, dtype=torch.float32)


def _head_is_all(model: LanguageModel) -> bool:
    """Whether logits are just the head's product of the last hidden states, tried out; some models scale or cap them.

    Where they are not, the model's own forward pass gives them, all of a batch at once.
    """
    head = model.model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        return False
    tokens = (torch.arange(_TRIAL_TOKENS, device=model.device) * 7 % head.weight.shape[0]).unsqueeze(0)
    hidden = model.model.get_decoder()(input_ids=tokens, use_cache=False).last_hidden_state
    logits = model.model(input_ids=tokens, use_cache=False).logits
    return torch.equal(head(hidden), logits)
