"""Options of the `training` section that are more than a number. Torch-free.

Each is named in the recipe here and done in a module of its own: activation memory in `activations.py`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, PositiveInt, ValidationError

from modelmill.components.core.recipe import Section

ActivationPolicy = Literal["none", "full", "selective", "selective_matmul"]


class EveryNLayers(Section):
    """Checkpoint every n-th block: the first, the one n further, and so on."""

    every_n_layers: PositiveInt = Field(description="Blocks from one checkpointed block to the next; 1 is full.")


class MemoryBudget(Section):
    """Compile each block and let the partitioner choose what to keep."""

    budget: float = Field(
        ge=0,
        le=1,
        allow_inf_nan=False,
        description="0 keeps a block's inputs only, 1 what the compiler keeps unasked.",
    )


_FORMS = f"use {', '.join(get_args(ActivationPolicy))}, {{every_n_layers: 1 or more}} or {{budget: 0 to 1}}"


def _activation_memory(value: Any) -> Any:
    """Turn a mapping into its class, so that a mistake is one sentence and not one for each alternative."""
    if isinstance(value, (EveryNLayers, MemoryBudget)) or value in get_args(ActivationPolicy):
        return value
    kind = {"every_n_layers": EveryNLayers, "budget": MemoryBudget}.get(*value) if _has_one_key(value) else None
    if kind is not None:
        try:
            return kind.model_validate(value)
        except ValidationError:
            pass  # the sentence below says what would do
    raise ValueError(f"{value!r} is no activation memory mode; {_FORMS}")


def _has_one_key(value: Any) -> bool:
    return isinstance(value, dict) and len(value) == 1


ActivationMemory = Annotated[
    ActivationPolicy | EveryNLayers | MemoryBudget,
    BeforeValidator(_activation_memory),
    Field(
        description="What a block keeps for the backward pass: none (checkpoints nothing), full (its inputs), "
        "selective (and the results of products and attention), selective_matmul (and of products only), "
        "{every_n_layers: n}, or {budget: 0 to 1} (compiled)."
    ),
]
"""How the forward pass of a block trades memory for recomputation; see `activations.apply`."""


def activation_label(mode: ActivationPolicy | EveryNLayers | MemoryBudget) -> str:
    """Short name for tables and metrics: `full`, `every_2_layers`, `budget_0.5`."""
    if isinstance(mode, EveryNLayers):
        return f"every_{mode.every_n_layers}_layers"
    return f"budget_{mode.budget:g}" if isinstance(mode, MemoryBudget) else mode
