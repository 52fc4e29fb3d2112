"""What a Chronos is trained for, as the training loop takes it: rows of int64 in, the sum of their losses out."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from modelmill.components.forecasting.chronos_model import Family
from modelmill.components.forecasting.chronos_windows import Windows


class BoltTraining(nn.Module):
    """Chronos-Bolt: the quantile loss of the library, a mean over quantiles and points of the horizon."""

    def __init__(self, model: Any, horizon: int) -> None:
        super().__init__()
        self.model, self.horizon = model, horizon

    def forward(self, rows: Tensor) -> Tensor:
        """Sum over windows [b, context + horizon], whose int64 are the bits of float64."""
        values = rows.view(torch.float64).to(torch.float32)
        # The library sums over the points of its own prediction length; those that are padded or missing count 0.
        loss = self.model(context=values[:, : -self.horizon], target=values[:, -self.horizon :]).loss
        return loss * (len(rows) / self.horizon)


class T5Training(nn.Module):
    """Chronos-T5: the cross entropy of the tokens that follow, a mean over the points of the horizon."""

    def __init__(self, model: Any, horizon: int, labels: int, pad: int) -> None:
        """
        Args:
            model: a T5 of transformers.
            horizon: points that count.
            labels: tokens at the end of each row that are to be predicted.
            pad: token of what is missing.
        """
        super().__init__()
        self.model, self.horizon, self.labels, self.pad = model, horizon, labels, pad

    def forward(self, rows: Tensor) -> Tensor:
        """Sum over windows [b, context tokens + labels]."""
        context, labels = rows[:, : -self.labels], rows[:, -self.labels :]
        labels = labels.masked_fill(labels == self.pad, -100)
        logits = self.model(input_ids=context, attention_mask=(context != self.pad).long(), labels=labels).logits
        loss = functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="sum")
        return loss / self.horizon


class BoltBatches:
    """Windows as the loop reads them: their bits as int64."""

    def __init__(self, windows: Windows) -> None:
        self._windows = windows

    def batch(self, step: int, rank: int, world: int) -> np.ndarray:
        return self.encode(self._windows.batch(step, rank, world))

    def targets(self, step: int) -> int:
        return self._windows.targets(step)

    def encode(self, rows: np.ndarray) -> np.ndarray:
        """int64, of the shape of the rows."""
        return rows.view(np.int64)


class T5Batches(BoltBatches):
    """Windows as tokens of a Chronos-T5: those of the context, then those to predict, end tokens included."""

    def __init__(self, windows: Windows, tokenizer: Any) -> None:
        super().__init__(windows)
        self._tokenizer = tokenizer

    def encode(self, rows: np.ndarray) -> np.ndarray:
        """int64 [b, context tokens + labels]; what is missing is the padding token."""
        values = torch.from_numpy(rows).to(torch.float32)
        length = self._tokenizer.config.prediction_length
        target = values[:, self._windows.context_length :]
        target = functional.pad(target, (0, length - target.shape[1]), value=torch.nan)
        context, _, scale = self._tokenizer.context_input_transform(values[:, : self._windows.context_length])
        labels, present = self._tokenizer.label_input_transform(target, scale)
        present[:, -1:] &= ~target.isnan().all(dim=1, keepdim=True)  # nothing to predict: no end either
        labels = labels.masked_fill(~present, self._tokenizer.config.pad_token_id)
        return torch.cat([context, labels], dim=1).numpy()


def training_of(family: Family, pipeline_or_model: Any, windows: Windows) -> tuple[nn.Module, BoltBatches]:
    """What the loop calls, and what it reads.

    Args:
        family: chronos-bolt or chronos-t5.
        pipeline_or_model: a model of Bolt, or the pipeline of a T5 with its tokenizer.
        windows: to train on.
    """
    if family == "chronos-bolt":
        return BoltTraining(pipeline_or_model, windows.horizon), BoltBatches(windows)
    tokenizer = pipeline_or_model.tokenizer
    labels = tokenizer.config.prediction_length + int(tokenizer.config.use_eos_token)
    model = pipeline_or_model.inner_model
    return T5Training(model, windows.horizon, labels, tokenizer.config.pad_token_id), T5Batches(windows, tokenizer)


def chronos_loss(model: nn.Module, rows: Tensor) -> Tensor:
    """The objective: see the forward passes."""
    return model(rows)
