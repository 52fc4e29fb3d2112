"""What each precision means: the dtype of the weights, of products and of gradient sums, and where it is to be had.

| | weights | products | gradients, summed in | moments | update |
| --- | --- | --- | --- | --- | --- |
| fp32 | fp32 | fp32 | fp32 | fp32 | to nearest |
| bf16-mixed | fp32 | bf16 | fp32 | fp32 | to nearest |
| bf16-stochastic | bf16 | bf16 | bf16, over ranks fp32 | bf16 | stochastic |
| fp8-mixed | fp32 | fp8 in blocks, else bf16 | fp32 | fp32 | to nearest |

The choice between the middle ones is that of the Llama 2 pretraining on Trainium described by AWS: bf16 alone
diverged, bf16 with stochastic rounding converged as mixed precision did, with less memory and more tokens a second.
Mixed precision follows Micikevicius et al. 2018 (arXiv:1710.03740) without loss scaling, which bf16's exponents spare.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from modelmill.components.training.config import Precision
from modelmill.components.training.float8 import convert_linears, float8_works


@dataclass(frozen=True)
class PrecisionPolicy:
    """What a precision asks of the model, the forward pass and the optimizer.

    Attributes:
        weights: dtype of parameters, and so of their gradients; `sharding` adds those up over ranks in fp32.
        autocast: dtype that products run in, where it is not that of the weights.
        float8: whether the products of the blocks run in 8 bits.
        stochastic_rounding: whether updated weights and moments are rounded stochastically.
    """

    weights: torch.dtype
    autocast: torch.dtype | None = None
    float8: bool = False
    stochastic_rounding: bool = False


_POLICIES: dict[Precision, PrecisionPolicy] = {
    "fp32": PrecisionPolicy(torch.float32),
    "bf16-mixed": PrecisionPolicy(torch.float32, autocast=torch.bfloat16),
    "bf16-stochastic": PrecisionPolicy(torch.bfloat16, stochastic_rounding=True),
    "fp8-mixed": PrecisionPolicy(torch.float32, autocast=torch.bfloat16, float8=True),
}


def precision_policy(precision: Precision) -> PrecisionPolicy:
    """The policy of a precision."""
    return _POLICIES[precision]


def autocast(precision: Precision, device_type: str) -> AbstractContextManager[Any]:
    """The context in which the forward pass runs."""
    dtype = _POLICIES[precision].autocast
    return nullcontext() if dtype is None else torch.autocast(device_type, dtype=dtype)


def set_precision(model: nn.Module, precision: Precision, tensor: int = 1) -> None:
    """Make a model's parameters and layers those of a precision, in place.

    fp32 changes nothing, so that a model built in float64 stays so. The others cast floating-point parameters that are
    trained; frozen ones, which take no small updates, and buffers (rotary tables, running statistics) keep theirs.

    Args:
        model: before it is sharded or given to an optimizer; any device, meta too.
        precision: of the run.
        tensor: ranks that the matrices will be split over.

    Raises:
        UserError: fp8-mixed on a model without a layer that could use it.
    """
    policy = _POLICIES[precision]
    if precision == "fp32":
        return
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.requires_grad:
            parameter.data = parameter.data.to(policy.weights)
    if policy.float8:
        convert_linears(model, tensor)


def precisions_on(device_type: str) -> tuple[Precision, ...]:
    """Precisions that a kind of device in this machine computes in.

    bf16 works on all of them: in software on a CPU without the instructions. fp8 is tried out; on Neuron devices torch
    has no product for it.
    """
    always: tuple[Precision, ...] = ("fp32", "bf16-mixed", "bf16-stochastic")
    return (*always, "fp8-mixed") if device_type != "neuron" and float8_works(device_type) else always
