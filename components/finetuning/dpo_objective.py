"""Direct preference optimisation on the engine: log-probabilities of answers, the loss over pairs, its rewards.

DPO (Rafailov et al. 2023, arXiv:2305.18290) raises log p(chosen) - log p(rejected) against the same difference of a
fixed reference, here the base. The reference's part is a number for each answer, made once (`dpo_reference`).
"""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from modelmill.components.data.instruction_rows import IGNORE
from modelmill.components.data.preference_rows import PreferenceRows, PreferenceSource
from modelmill.components.finetuning.causal_lm import SupervisedModel, last_hidden_states
from modelmill.components.finetuning.dpo_config import PreferenceObjectiveConfig
from modelmill.components.training.loss import default_chunk_tokens
from modelmill.components.training.worker import RankContext

REWARDS = ("reward_chosen", "reward_rejected", "reward_margin", "reward_accuracy")


def pack_pairs(rows: PreferenceRows, pairs: np.ndarray, width: int, first: int = 0) -> np.ndarray:
    """Pairs as the loop takes them, int64 [b, 1 + 4 width].

    Args:
        rows: of a split.
        pairs: numbers in it, [b].
        width: inputs of each answer.
        first: number of the split's first pair in the table of the reference.
    """
    tokens, targets = rows.take(pairs, width)
    parts = [np.asarray(pairs)[:, None] + first, tokens.reshape(len(pairs), -1), targets.reshape(len(pairs), -1)]
    return np.concatenate(parts, axis=1)


def unpack_pairs(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers [b], inputs [b, 2, width] and targets [b, 2, width] of `pack_pairs`."""
    tokens, targets = rows[:, 1:].view(len(rows), 2, 2, -1).unbind(1)
    return rows[:, 0], tokens, targets


class PreferenceBatches:
    """Batches of pairs as the loop takes them, `feed.WeightedBatches`: a pair is a target."""

    def __init__(self, source: PreferenceSource, global_batch_size: int) -> None:
        self._source, self._pairs = source, global_batch_size

    def batch(self, step: int, rank: int, world: int) -> np.ndarray:
        """A rank's pairs, see `pack_pairs`; as wide as the longest answer of the global batch needs."""
        numbers = self._source.indices_of(step, rank, world)
        return pack_pairs(self._source.rows, numbers, self._source.width(step))

    def targets(self, step: int) -> int:
        """Pairs of the global batch."""
        return self._pairs


class PreferenceModel(SupervisedModel):
    """A model as the loop trains it: pairs in, the log-probabilities of their answers out."""

    def forward(self, rows: Tensor) -> Tensor:
        """Sums of the log-probabilities of the targets of `pack_pairs`, [b, 2] in nats."""
        _, tokens, targets = unpack_pairs(rows)
        hidden = last_hidden_states(self.model, tokens.flatten(0, 1))
        weight = self.model.get_output_embeddings().weight
        return sequence_log_probs(hidden, weight, targets.flatten(0, 1)).view(-1, 2)


def sequence_log_probs(hidden: Tensor, weight: Tensor, targets: Tensor, chunk_tokens: int | None = None) -> Tensor:
    """Sum of the log-probabilities of each sequence's targets, [n], without the logits of more than a chunk.

    `loss.linear_cross_entropy` computes gradients in the forward pass, when what each sequence weighs in the loss is
    not known yet. Here a chunk's logits are computed again in the backward pass.

    Args:
        hidden: [n, T, D], the outputs of the last norm.
        weight: [V, D], the head's weight.
        targets: [n, T] int64 in [0, V), or `IGNORE`.
        chunk_tokens: rows per chunk; by default from V, see `loss.default_chunk_tokens`.
    """
    counted, states = (targets != IGNORE).flatten(), hidden.flatten(0, 1)
    wanted = targets.flatten().clamp(min=0)
    device = hidden.device.type
    if device == "cpu":
        # Rows that do not count cost nothing here; on an accelerator finding them would stall its queue.
        states, wanted = states[counted], wanted[counted]
    size = chunk_tokens or default_chunk_tokens(weight.shape[0], device)
    parts: list[Any] = [
        checkpoint(_log_probs, some, weight, of, use_reentrant=False, preserve_rng_state=False)
        for some, of in zip(states.split(size), wanted.split(size), strict=True)
    ]
    found = torch.cat(parts)
    if device == "cpu":
        found = found.new_zeros(len(counted)).masked_scatter(counted, found)
    return torch.where(counted, found, 0).view(targets.shape).sum(1)


def _log_probs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = F.linear(hidden, weight)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits.gather(1, targets.unsqueeze(1)).squeeze(1) - logits.logsumexp(1)


def preference_losses(
    config: PreferenceObjectiveConfig, log_probs: Tensor, reference: Tensor, lengths: Tensor
) -> tuple[Tensor, Tensor]:
    """Losses and rewards of pairs.

    With h the difference of the answers' log-ratios to the reference, `sigmoid` is -log sigmoid(beta h), with a share
    of `label_smoothing` the other way round (Mitchell 2023), and `ipo` (h - 1 / (2 beta))^2.

    Args:
        config: the objective.
        log_probs: of the chosen and the rejected answer, [b, 2].
        reference: the same of the base, [b, 2].
        lengths: targets of each answer, [b, 2].

    Returns:
        Losses [b], and rewards beta (log p - log p_reference) [b, 2] without gradient.
    """
    ratios = log_probs - reference.to(log_probs.dtype)
    if config.length_normalized:
        ratios = ratios / lengths
    margin = ratios[:, 0] - ratios[:, 1]
    if config.loss == "ipo":
        losses = (margin - 1 / (2 * config.beta)) ** 2
    else:
        scaled, wrong = config.beta * margin, config.label_smoothing
        losses = -(1 - wrong) * F.logsigmoid(scaled) - wrong * F.logsigmoid(-scaled)
    if config.sft_weight:
        losses = losses - config.sft_weight * log_probs[:, 0] / lengths[:, 0]
    return losses, config.beta * ratios.detach()


class PreferenceObjective:
    """The objective as the loop calls it; it remembers the rewards of the newest step and of a validation."""

    def __init__(
        self, config: PreferenceObjectiveConfig, reference: Tensor, train_pairs: int, micro_batches: int
    ) -> None:
        """
        Args:
            config: the loss.
            reference: log-probabilities of the base on the device, [pairs, 2]: training pairs, then validation pairs.
            train_pairs: how many of them are training pairs.
            micro_batches: of a rank in an optimizer step.
        """
        self._config, self._reference, self._train_pairs = config, reference, train_pairs
        self._trained: deque[Tensor] = deque(maxlen=micro_batches)
        self._validated: list[tuple[Tensor, Tensor]] = []

    def __call__(self, model: nn.Module, rows: Tensor) -> Tensor:
        """Sum of the losses of pairs from `pack_pairs`."""
        numbers, _, targets = unpack_pairs(rows)
        lengths = (targets != IGNORE).sum(2)
        losses, rewards = preference_losses(self._config, model(rows), self._reference[numbers], lengths)
        if model.training:
            self._trained.append(rewards)
        else:
            self._validated.append((numbers, rewards))
        return losses.sum()

    def trained(self, ranks: RankContext) -> dict[str, float]:
        """Mean rewards over the newest step's global batch; called by all ranks together."""
        rewards = torch.cat(list(self._trained)).double()
        return _means(_add_up(_described(rewards).sum(0), ranks))

    def validated(self, ranks: RankContext) -> dict[str, float]:
        """Mean rewards over the pairs that were validated since the last call; called by all ranks together."""
        table = torch.zeros(len(self._reference) - self._train_pairs, len(REWARDS) + 1, dtype=torch.float64)
        for numbers, rewards in self._validated:
            table[numbers.cpu() - self._train_pairs] += _described(rewards.double()).cpu()
        self._validated = []
        # A rank that has run out of pairs repeats one, so each counts as what it was on average.
        table = _add_up(table.to(ranks.device), ranks).cpu()
        seen = table[table[:, 0] > 0]
        return {f"validation_{name}": value for name, value in _means((seen / seen[:, :1]).sum(0)).items()}


def _described(rewards: Tensor) -> Tensor:
    """One, and the values of `REWARDS`, for each pair: [b, 5]."""
    chosen, rejected = rewards.unbind(1)
    return torch.stack([torch.ones_like(chosen), chosen, rejected, chosen - rejected, chosen > rejected], dim=1)


def _add_up(values: Tensor, ranks: RankContext) -> Tensor:
    if ranks.world_size > 1:
        dist.all_reduce(values)
    return values


def _means(sums: Tensor) -> dict[str, float]:
    count, *values = sums.tolist()
    return {name: value / count for name, value in zip(REWARDS, values, strict=True)}
