"""The `training` section of a recipe: batch, layout, optimizer, schedule, precision, checkpoints. Torch-free.

The published settings these defaults follow are those of the Llama 2 pretraining on Trainium described by AWS
(4096 cores, Llama 2 7B) and of Llama 2 itself (Touvron et al. 2023, arXiv:2307.09288, section 2.2).
"""

from __future__ import annotations

from typing import Any, Literal, Protocol, Self

from pydantic import ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from modelmill.components.core.errors import UserError
from modelmill.components.core.manifest import Manifest
from modelmill.components.core.recipe import Section
from modelmill.components.training.layout import ParallelConfig, joined
from modelmill.components.training.options import (
    HALF_ATTENTION,
    WHOLE_ROW_ATTENTION,
    ActivationMemory,
    AttentionName,
    MemoryBudget,
    StabilityConfig,
)

Precision = Literal["fp32", "bf16-mixed", "bf16-stochastic", "fp8-mixed"]
OptimizerState = Literal["fp32", "8bit"]
Schedule = Literal["cosine", "linear", "wsd"]
AcceleratorName = Literal["auto", "cpu", "cuda", "neuron"]


class TrainingConfig(Section):
    """Everything about training that is not the model or the data."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    steps: PositiveInt = Field(description="Optimizer steps.")
    global_batch_size: PositiveInt = Field(description="Sequences in one optimizer step, over all processes.")
    micro_batch_size: PositiveInt = Field(
        description="Sequences one process runs at once; memory grows with it, the result does not depend on it."
    )
    parallel: ParallelConfig = Field(default=ParallelConfig(), description="How the processes share the work.")

    learning_rate: PositiveFloat = Field(default=3e-4, description="Highest learning rate, reached after warmup.")
    min_learning_rate: NonNegativeFloat = Field(default=3e-5, description="Learning rate after the decay.")
    schedule: Schedule = Field(
        default="cosine",
        description="Shape of the decay; wsd (warmup, stable, decay) stays at the highest rate and decays late.",
    )
    warmup_steps: NonNegativeInt = Field(default=0, description="Steps of linear growth from zero.")
    constant_steps: NonNegativeInt | None = Field(
        default=None,
        description="Steps at the highest rate between warmup and decay; left out, none, and with wsd what is left.",
    )
    decay_steps: NonNegativeInt | None = Field(
        default=None,
        description="Steps from the highest rate to the lowest; left out, all steps that remain, and with wsd 20% of"
        " the steps (or what is left, if that is less or constant_steps is given).",
    )

    weight_decay: NonNegativeFloat = Field(default=0.1, description="Decoupled weight decay of AdamW.")
    decay_norm_weights: bool = Field(
        default=False, description="Whether the vectors (norm weights, biases) are decayed too, not only matrices."
    )
    betas: tuple[float, float] = Field(default=(0.9, 0.95), description="AdamW's decay of the two gradient moments.")
    eps: PositiveFloat = Field(default=1e-5, description="AdamW's term that keeps the division finite.")
    clip_norm: PositiveFloat | None = Field(
        default=1.0, description="Largest norm of the whole gradient; a larger one is scaled down. null: never."
    )

    precision: Precision = Field(
        default="fp32",
        description="fp32; bf16-mixed (bf16 products, fp32 weights and sums); bf16-stochastic (weights, gradients and "
        "moments in bf16, updates rounded stochastically); fp8-mixed (bf16-mixed with the blocks' products in fp8).",
    )
    optimizer_state: OptimizerState = Field(
        default="fp32",
        description="AdamW's moments: fp32 (bf16 with bf16-stochastic), or 8bit for all but small ones and vectors.",
    )
    activation_memory: ActivationMemory = "none"
    attention: AttentionName = Field(
        default="auto",
        description="Attention kernel: auto (the first one present of a fixed order, named in the log), math, sdpa "
        "(torch chooses), flash, efficient, cudnn, flex, varlen or flash3; all compute the same.",
    )
    document_masking: bool = Field(
        default=False,
        description="Whether positions of a packed row see their own document only, in training and validation. "
        "The evaluation step scores whole rows, unmasked.",
    )
    accelerator: AcceleratorName = Field(
        default="auto", description="auto: the best one with a device for every process."
    )
    deterministic: bool = Field(
        default=True, description="Only kernels that give the same bits every time; slower on a GPU, free on a CPU."
    )
    threads_per_process: PositiveInt | None = Field(
        default=None, description="CPU threads of each process; left out, the cores shared out."
    )
    seed: NonNegativeInt = Field(default=0, description="Decides the first weights and the order of the data.")
    stability: StabilityConfig = Field(
        default=StabilityConfig(), description="When the run counts as unstable, and what is done about it."
    )

    log_every: PositiveInt = Field(default=10, description="Steps between two logged losses.")
    validate_every: PositiveInt | None = Field(
        default=100, description="Steps between two validations; null: only after the last step."
    )
    validation_rows: NonNegativeInt = Field(
        default=256, description="Rows of the validation split a validation reads, at most; 0: no validation."
    )
    checkpoint_every: PositiveInt | None = Field(
        default=200, description="Steps between two checkpoints; null: only when the run is stopped."
    )
    keep_checkpoints: PositiveInt = Field(default=2, description="Newest checkpoints that stay on disk.")

    @model_validator(mode="after")
    def _batch_is_whole(self) -> Self:
        data, micro = self.parallel.data_degree, self.micro_batch_size
        if self.global_batch_size % (data * micro):
            below = self.global_batch_size // (data * micro) * data * micro
            choices = [size for size in (below, below + data * micro) if size]
            raise ValueError(
                f"global_batch_size {self.global_batch_size} is not a multiple of data-parallel degree {data}"
                f" x micro_batch_size {micro} = {data * micro}; use a global_batch_size of {joined(choices)}"
            )
        return self

    @model_validator(mode="after")
    def _budget_fits_the_layout(self) -> Self:
        if isinstance(self.activation_memory, MemoryBudget) and self.parallel.tensor > 1:
            raise ValueError(
                f"activation_memory {{budget: {self.activation_memory.budget:g}}} compiles each block, which does not"
                f" go with parallel.tensor {self.parallel.tensor}; use selective, or tensor 1"
            )
        return self

    @model_validator(mode="after")
    def _attention_fits(self) -> Self:
        if self.attention == "cudnn" and self.deterministic:
            raise ValueError(
                "attention cudnn has no deterministic backward pass; set deterministic to false or use attention auto"
            )
        if self.attention in HALF_ATTENTION and self.precision == "fp32":
            raise ValueError(
                f"attention {self.attention} computes in bf16 and precision is fp32;"
                " use precision bf16-mixed or attention auto"
            )
        if self.attention in WHOLE_ROW_ATTENTION and self.document_masking:
            raise ValueError(
                f"attention {self.attention} cannot mask documents;"
                " set document_masking to false or use attention auto"
            )
        return self

    @model_validator(mode="after")
    def _schedule_fits(self) -> Self:
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(
                f"min_learning_rate {self.min_learning_rate} is above learning_rate {self.learning_rate};"
                f" use a value from 0 to {self.learning_rate}"
            )
        if self.warmup_steps > self.steps:
            raise ValueError(
                f"warmup_steps {self.warmup_steps} is more than steps {self.steps}; use 0 to {self.steps}"
            )
        used = self.warmup_steps + (self.constant_steps or 0) + (self.decay_steps or 0)
        if used > self.steps:
            raise ValueError(
                f"warmup_steps {self.warmup_steps} + constant_steps {self.constant_steps or 0}"
                f" + decay_steps {self.decay_steps or 0} = {used} is more than steps {self.steps};"
                f" lower one of them or raise steps to {used}"
            )
        return self

    @model_validator(mode="after")
    def _betas_are_fractions(self) -> Self:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas {list(self.betas)} must both be at least 0 and below 1; use [0.9, 0.95]")
        return self

    @model_validator(mode="after")
    def _rollback_has_checkpoints(self) -> Self:
        if self.stability.action == "rollback" and self.checkpoint_every is None:
            raise ValueError(
                "stability.action rollback goes back to checkpoints, and checkpoint_every is null;"
                " set checkpoint_every, or use stability.action log or skip_step"
            )
        return self

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches each process adds up before an optimizer step."""
        return self.global_batch_size // (self.parallel.data_degree * self.micro_batch_size)

    @property
    def constant_length(self) -> int:
        """Steps at the highest rate, given or what the schedule makes of the rest."""
        if self.constant_steps is not None:
            return self.constant_steps
        return self.steps - self.warmup_steps - self.decay_length if self.schedule == "wsd" else 0

    @property
    def decay_length(self) -> int:
        """Steps of decay, given or what the schedule makes of the rest."""
        if self.decay_steps is not None:
            return self.decay_steps
        rest = self.steps - self.warmup_steps - (self.constant_steps or 0)
        if self.schedule == "wsd" and self.constant_steps is None:
            return min(rest, max(1, self.steps // 5))
        return rest

    def check_any_model(self) -> None:
        """Refuse what the engine can do with our own decoder only.

        Raises:
            ValueError: for a validator of the section that these settings stand in.
        """
        if self.parallel.tensor > 1:
            raise ValueError(
                f"training.parallel.tensor: {self.parallel.tensor} splits our own decoder only; use 1, and"
                " training.parallel.shard to spread the weights"
            )
        if self.precision == "fp8-mixed":
            raise ValueError("training.precision: fp8-mixed is for pretraining; use bf16-mixed")

    def deciding(self) -> dict[str, Any]:
        """The fields that decide the weights, and so what a checkpoint may be continued with.

        The number of processes does not: a checkpoint goes on with another layout on the same trajectory.
        """
        return self.model_dump(mode="json", exclude=_NOT_DECIDING)


_NOT_DECIDING = {
    "attention",
    "micro_batch_size",
    "parallel",
    "activation_memory",
    "accelerator",
    "threads_per_process",
    "log_every",
    "validate_every",
    "validation_rows",
    "checkpoint_every",
    "keep_checkpoints",
}


class ModelLimits(Protocol):
    """What `check_run` needs to know about a model; `LlamaConfig` has it."""

    @property
    def vocab_size(self) -> int | None: ...

    @property
    def max_sequence_length(self) -> int: ...


def check_run(model: ModelLimits, training: TrainingConfig, tokens: Manifest) -> int:
    """Check model, training and data against each other, before any process starts.

    Args:
        model: the model's sizes; a `vocab_size` of None is taken from the tokens, a larger one than the
            tokenizer's is allowed (padding to a multiple that the hardware likes).
        training: the training section.
        tokens: manifest of the packed tokens.

    Returns:
        The model's vocabulary size.

    Raises:
        UserError: they do not fit; one line names the field, its value and what would do.
    """
    counts = tokens.counts
    vocab_size, length = counts["vocab_size"], counts["sequence_length"]
    if model.vocab_size is not None and model.vocab_size < vocab_size:
        raise UserError(
            f"model.vocab_size: {model.vocab_size} is less than the tokenizer's {vocab_size} tokens;"
            f" use {vocab_size} or more, or leave it out"
        )
    if length > model.max_sequence_length:
        raise UserError(
            f"packing.sequence_length: {length} is more than model.max_sequence_length {model.max_sequence_length};"
            " shorten the one or raise the other"
        )
    rows = counts["train_rows"]
    if rows < training.global_batch_size:
        raise UserError(
            f"training.global_batch_size: {training.global_batch_size} sequences are more than the {rows} rows of"
            f" the training split; use at most {rows}, a shorter packing.sequence_length or a larger corpus"
        )
    if training.document_masking and "eos_token_id" not in tokens.metadata:
        raise UserError(
            "training.document_masking: true needs the end-of-text token, which these tokens do not name;"
            " pack them again or use false"
        )
    if training.validation_rows and not counts["validation_rows"]:
        raise UserError(
            f"training.validation_rows: {training.validation_rows} rows are asked for and the validation split has"
            " none; use a larger corpus or set training.validation_rows to 0"
        )
    return model.vocab_size or vocab_size
