"""The learning rate as a pure function of the step, so that resuming needs no scheduler state."""

from __future__ import annotations

import math

from modelmill.components.training.config import Schedule, TrainingConfig


def learning_rate(step: int, config: TrainingConfig) -> float:
    """Learning rate of one optimizer step.

    With h the highest and l the lowest rate, w, c and d the steps of warmup, constant and decay:

        step <  w           h * (step + 1) / w
        step <  w + c       h
        step <  w + c + d   l + (h - l) * shape((step - w - c) / d)
        otherwise           l

    The shapes, falling from 1 at 0 to 0 at 1:

        cosine    (1 + cos(pi x)) / 2   Loshchilov & Hutter 2017, arXiv:1608.03983, without restarts
        linear    1 - x
        wsd       1 - sqrt(x)           warmup, stable, decay: Hu et al. 2024, arXiv:2404.06395

    `wsd` is long at the highest rate: left out, d is a fifth of all steps and c the rest. A run can then be prolonged
    from a checkpoint of the constant part. Haegele et al. 2024 (arXiv:2405.18392) found a fifth of the steps to be
    enough to match cosine, and 1 - sqrt(x) to end lower than 1 - x; for the latter use `linear` with constant steps.

    Args:
        step: from 0, the first step, whose rate is above zero so that it is not wasted.
        config: the training section.
    """
    high, low = config.learning_rate, config.min_learning_rate
    if step < config.warmup_steps:
        return high * (step + 1) / config.warmup_steps
    position = step - config.warmup_steps - config.constant_length
    if position < 0:
        return high
    if position >= config.decay_length:
        # Nothing to decay over: the rate stays where warmup and constant steps left it.
        return low if config.decay_length else high
    return low + (high - low) * _shape(config.schedule, position / config.decay_length)


def _shape(schedule: Schedule, part: float) -> float:
    if schedule == "cosine":
        return (1 + math.cos(math.pi * part)) / 2
    return 1 - (math.sqrt(part) if schedule == "wsd" else part)
