"""The learning rate as a pure function of the step, so that resuming needs no scheduler state."""

from __future__ import annotations

import math

from modelmill.components.training.config import TrainingConfig


def learning_rate(step: int, config: TrainingConfig) -> float:
    """Learning rate of one optimizer step.

    With h the highest and l the lowest rate, w, c and d the steps of warmup, constant and decay:

        step <  w           h * (step + 1) / w
        step <  w + c       h
        step <  w + c + d   l + (h - l) * shape((step - w - c) / d)
        otherwise           l

    `shape` is `(1 + cos(pi x)) / 2` for cosine (Loshchilov & Hutter 2017, arXiv:1608.03983, without restarts) and
    `1 - x` for linear. Linear with a long constant part is warmup-stable-decay (arXiv:2404.06395).

    Args:
        step: from 0, the first step, whose rate is above zero so that it is not wasted.
        config: the training section.
    """
    high, low = config.learning_rate, config.min_learning_rate
    if step < config.warmup_steps:
        return high * (step + 1) / config.warmup_steps
    position = step - config.warmup_steps - config.constant_steps
    if position < 0:
        return high
    if position >= config.decay_length:
        # Nothing to decay over: the rate stays where warmup and constant steps left it.
        return low if config.decay_length else high
    part = position / config.decay_length
    shape = (1 + math.cos(math.pi * part)) / 2 if config.schedule == "cosine" else 1 - part
    return low + (high - low) * shape
