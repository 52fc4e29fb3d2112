"""Any causal language model of transformers under our training loop: its loss without logits, packed rows.

What the loop calls is the model's trunk up to the last hidden states; the head is `loss.linear_cross_entropy`. Packed
conversations are kept apart by positions that begin anew with each of them: from those transformers builds the mask of
every attention it has, sliding windows included. Whether a model's logits are just its head's product, and whether its
layers keep conversations apart, is tried out on the loaded model and not looked up in a list.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from modelmill.components.core.errors import UserError
from modelmill.components.data.instruction_rows import InstructionBatch, InstructionRows, InstructionSource
from modelmill.components.training.loss import linear_cross_entropy

_TRIAL_TOKENS = 6
_TRIAL_TOLERANCE = 2e-2  # of the largest logit or state: far above rounding in bf16, far below another model


class SupervisedModel(nn.Module):
    """A model as the loop trains it: rows in, the sum of the losses of their targets out."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, rows: Tensor) -> Tensor:
        """Sum of the cross entropies of the targets of rows [b, 3, T] from `stack_rows`, a scalar in nats."""
        tokens, targets, positions = rows.unbind(1)
        hidden = last_hidden_states(self.model, tokens, positions)
        head = self.model.get_output_embeddings()
        return linear_cross_entropy(hidden.flatten(0, 1), head.weight, targets.flatten(), reduction="sum")


def supervised_loss(model: nn.Module, rows: Tensor) -> Tensor:
    """The objective: see `SupervisedModel.forward`."""
    return model(rows)


class SupervisedBatches:
    """Batches of packed conversations as the loop takes them, `feed.WeightedBatches`."""

    def __init__(self, rows: InstructionRows, seed: int, global_batch_size: int) -> None:
        self._source = InstructionSource(rows, seed, global_batch_size)

    def batch(self, step: int, rank: int, world: int) -> np.ndarray:
        """A rank's rows, int64 [global_batch_size / world, 3, T]."""
        return stack_rows(self._source.batch(step, rank, world))

    def targets(self, step: int) -> int:
        """Targets of the global batch."""
        return self._source.targets(step)


def stack_rows(batch: InstructionBatch) -> np.ndarray:
    """Tokens, targets and positions, int64 [b, 3, T]; positions begin at 0 with each conversation of a row."""
    documents = batch.documents
    places = np.broadcast_to(np.arange(documents.shape[1]), documents.shape)
    begins = np.zeros_like(documents)
    begins[:, 1:] = np.where(documents[:, 1:] != documents[:, :-1], places[:, 1:], 0)
    positions = places - np.maximum.accumulate(begins, axis=1)
    return np.stack([batch.tokens, batch.targets, positions], axis=1)


def last_hidden_states(model: PreTrainedModel, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
    """Outputs [b, T, hidden] of a model's last norm; conversations are told apart by `positions` [b, T]."""
    output = model.get_decoder()(input_ids=tokens, position_ids=positions, use_cache=False)
    return output.last_hidden_state


@torch.no_grad()
def check_model(model: PreTrainedModel, *, packed: bool) -> None:
    """Try out what the loss and packed rows rest on.

    Args:
        model: loaded, not distributed.
        packed: whether rows hold more than one conversation.

    Raises:
        UserError: the model's logits are not just the product of its head, or its layers mix packed conversations.
    """
    was_training, family = model.training, type(model).__name__
    model.eval()
    try:
        head = model.get_output_embeddings()
        if not isinstance(head, nn.Linear) or head.bias is not None:
            raise UserError(f"base: the output head of {family} is no plain matrix; use another model")
        size = min(model.config.get_text_config().vocab_size, head.weight.shape[0])
        tokens = (torch.arange(2 * _TRIAL_TOKENS, device=head.weight.device) * 7 % size).unsqueeze(0)
        hidden = last_hidden_states(model, tokens)
        if not _close(head(hidden), model(input_ids=tokens, use_cache=False).logits):
            raise UserError(
                f"base: {family} scales or caps its logits, which the chunked loss does not; use another one"
            )
        if packed:
            positions = torch.arange(_TRIAL_TOKENS, device=tokens.device).repeat(2).unsqueeze(0)
            together = last_hidden_states(model, tokens, positions)[:, _TRIAL_TOKENS:]
            if not _close(together, last_hidden_states(model, tokens[:, _TRIAL_TOKENS:])):
                raise UserError(
                    f"base: {family} mixes conversations that are packed into one row; use another model, or"
                    " an instructions.sequence_length that leaves each a row of its own"
                )
    finally:
        model.train(was_training)


def _close(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).abs().max() <= _TRIAL_TOLERANCE * expected.abs().max())
