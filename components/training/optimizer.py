"""AdamW with the weight-decay groups of the source articles."""

from __future__ import annotations

import torch
from torch import nn

from modelmill.components.training.config import TrainingConfig


def make_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101), fused where the device has the kernel.

    Matrices are decayed. Vectors (norm weights, biases) are not, as in GPT-3 (arXiv:2005.14165) and Llama, unless
    `config.decay_norm_weights`: the Llama 2 pretraining on Trainium decayed them.

    Args:
        model: its parameters already on their device.
        config: rate, betas, eps and decay.
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            matrix = parameter.dim() >= 2 or config.decay_norm_weights
            (decayed if matrix else plain).append(parameter)
    groups = [
        {"params": group, "weight_decay": decay}
        for group, decay in ((decayed, config.weight_decay), (plain, 0.0))
        if group
    ]
    fused = {parameter.device.type for parameter in model.parameters()} <= {"cpu", "cuda"}
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=fused)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Use a rate from the next step on."""
    for group in optimizer.param_groups:
        group["lr"] = rate
