"""Options of the `training` section that are more than a number. Torch-free.

Each is named in the recipe here and done in a module of its own: activation memory in `activations.py`, stability in
`monitor.py`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
)

from modelmill.components.core.recipe import Section

ActivationPolicy = Literal["none", "full", "selective", "selective_matmul"]
AttentionName = Literal["auto", "math", "sdpa", "flash", "efficient", "cudnn", "flex", "varlen", "flash3"]
GPU_ATTENTION = frozenset({"efficient", "cudnn", "flex", "varlen", "flash3"})
"""Attention kernels that exist on NVIDIA GPUs only; see `attention.py`."""
HALF_ATTENTION = frozenset({"cudnn", "varlen", "flash3"})
"""Those that compute in bf16 and fp16 only."""
WHOLE_ROW_ATTENTION = frozenset({"efficient", "cudnn"})
"""Those that cannot keep documents apart."""


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
    kinds: dict[str, type[Section]] = {"every_n_layers": EveryNLayers, "budget": MemoryBudget}
    kind = kinds.get(*value) if isinstance(value, dict) and len(value) == 1 else None
    if kind is not None:
        try:
            return kind.model_validate(value)
        except ValidationError:
            pass  # the sentence below says what would do
    raise ValueError(f"{value!r} is no activation memory mode; {_FORMS}")


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


class StabilityConfig(Section):
    """When a run counts as unstable, and what is done about it; see `monitor.StabilityMonitor`.

    Spikes, their length and the alarm are those of the Llama 2 pretraining on Trainium described by AWS; the loss
    spike is that of OLMo-core's skip-step optimizer; rollbacks are those of PaLM (arXiv:2204.02311, section 5.1).
    Whatever the action, a step whose loss or gradient is infinite or nan changes no weight.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    action: Literal["log", "skip_step", "rollback"] = Field(
        default="log",
        description="log: report spikes and alarms; skip_step: also leave out the update of a step in a spike; "
        "rollback: on an alarm go back to the newest checkpoint and on with later batches.",
    )
    window: int = Field(
        default=20,
        ge=2,
        description="Updates the running mean of the gradient norm covers; before that many, no spike.",
    )
    spike_margin: PositiveFloat = Field(
        default=0.1, description="A gradient norm this far above its running mean is a spike, until it is below again."
    )
    loss_spike: PositiveFloat | None = Field(
        default=None,
        description="A loss this many standard deviations above the mean of the window is a spike too (OLMo-core: 6); "
        "null: the loss makes none.",
    )
    max_spike_steps: PositiveInt = Field(
        default=5,
        description="Longest spike that settles by itself; a longer one is an alarm, and its updates are taken again.",
    )
    alarm_ratio: float = Field(
        default=3.0, gt=1, description="A gradient norm above this many times the lowest so far is an alarm."
    )
    max_nonfinite_steps: PositiveInt = Field(
        default=5, description="Steps in a row with an infinite or nan loss or gradient that mean divergence."
    )
    max_rollbacks: PositiveInt = Field(default=3, description="Rollbacks of one run; the next alarm ends it.")
    rollback_skip_batches: NonNegativeInt = Field(
        default=200,
        description="Batches after the checkpoint that a rollback leaves out, at least; those up to the alarm always "
        "are (PaLM: 200 to 500).",
    )
