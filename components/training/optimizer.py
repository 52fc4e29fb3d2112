"""AdamW with the weight-decay groups of the source articles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from modelmill.components.training.adamw import AdamW
from modelmill.components.training.config import TrainingConfig
from modelmill.components.training.precision import precision_policy

_FUSED = {"cpu", "cuda"}  # kinds of device for which torch has one kernel for the whole update
RateScale = Callable[[str], float]
"""A parameter's name to what the step's learning rate is multiplied by for it."""


def make_optimizer(
    model: nn.Module, config: TrainingConfig, rate_scale: RateScale | None = None
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) for a model and a precision.

    torch's own, fused, for fp32 weights and moments where the device has the kernel; otherwise ours, which rounds
    stochastically and keeps moments in 8 bits (`adamw.AdamW`). Both take plain and distributed parameters, and both
    leave a step out through `set_found_inf`.

    Args:
        model: its parameters already distributed and on their device.
        config: rate, betas, eps, decay, precision and state.
        rate_scale: for parameters that learn at another rate; default, all at the same.
    """
    policy = precision_policy(config.precision)
    groups = decay_groups(model, config, rate_scale)
    options: dict[str, Any] = {"lr": config.learning_rate, "betas": config.betas, "eps": config.eps}
    options["weight_decay"] = config.weight_decay
    kinds = {parameter.device.type for parameter in model.parameters()}
    if config.optimizer_state == "fp32" and not policy.stochastic_rounding and kinds <= _FUSED:
        return torch.optim.AdamW(groups, **options, fused=True)
    return AdamW(
        groups,
        **options,
        state=config.optimizer_state,
        stochastic_rounding=policy.stochastic_rounding,
        seed=config.seed,
    )


def decay_groups(
    model: nn.Module, config: TrainingConfig, rate_scale: RateScale | None = None
) -> list[dict[str, Any]]:
    """Parameter groups with and without weight decay, in the form optimizers take; each parameter once, if trained.

    Matrices are decayed, the embedding and the head among them: GPT-3 (arXiv:2005.14165) and Llama do so, and the
    Llama 2 pretraining on Trainium decayed everything. Norm weights and biases are not, unless
    `config.decay_norm_weights`. They are told by their shape or, as some models have norms over several dimensions and
    biases with one row for each expert, by the name of the module or parameter.

    A group holds plain parameters or those of one device mesh, since torch's fused update takes no mixture. A model's
    shapes are those of whole parameters, also where a rank holds a part.
    """
    groups: dict[Any, dict[str, Any]] = {}
    seen: set[nn.Parameter] = set()
    for path, module in model.named_modules():
        is_norm = "norm" in type(module).__name__.lower()
        for name, parameter in module.named_parameters(recurse=False):
            if parameter in seen or not parameter.requires_grad:
                continue
            seen.add(parameter)
            spared = parameter.dim() < 2 or is_norm or name.endswith("bias")
            decay = 0.0 if spared and not config.decay_norm_weights else config.weight_decay
            scale = 1.0 if rate_scale is None else rate_scale(f"{path}.{name}" if path else name)
            kind = (decay > 0, scale, getattr(parameter, "device_mesh", None))
            group = groups.setdefault(kind, {"params": [], "weight_decay": decay, "rate_scale": scale})
            group["params"].append(parameter)
    return list(groups.values())


def start_step(optimizer: torch.optim.Optimizer, step: int, rate: float) -> None:
    """Prepare the update of a step.

    Args:
        optimizer: from `make_optimizer`.
        step: from 0; with the seed it decides how stochastic rounding rounds, so that a resumed run goes on alike.
        rate: learning rate.
    """
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("rate_scale", 1.0)
    if isinstance(optimizer, AdamW):
        optimizer.steps = step


def set_found_inf(optimizer: torch.optim.Optimizer, found: Tensor | None) -> None:
    """Have the next calls of `step` leave everything as it is while `found` is not zero, or nan.

    Then no bit of weights, moments and step counters changes, whatever the gradients hold. Nothing waits for the
    device. This is the attribute through which `torch.amp.GradScaler` speaks to fused optimizers; their kernel
    compares it with 1 and subtracts it from the step counter, so other numbers must not reach it.

    Args:
        optimizer: from `make_optimizer`.
        found: a scalar on the parameters' device, the same on all ranks, of any dtype; None: update again.
    """
    if found is None:
        optimizer.found_inf = None  # type: ignore[attr-defined]
        return
    optimizer.found_inf = (found.detach() != 0).to(torch.float32).reshape(())  # type: ignore[attr-defined]
