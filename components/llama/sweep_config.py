"""Section of the activation sweep. Torch-free."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from modelmill.components.core.recipe import Section
from modelmill.components.llama.config import LlamaConfig
from modelmill.components.training.config import AcceleratorName, TrainingConfig
from modelmill.components.training.layout import ParallelConfig
from modelmill.components.training.options import ActivationMemory, activation_label


class SweepConfig(Section):
    """What is compared, and how often."""

    modes: tuple[ActivationMemory, ...] = Field(
        default=("none", "full", "selective", "selective_matmul"),
        min_length=1,
        description="Modes of activation memory to compare, as `training.activation_memory` takes them.",
    )
    sequence_length: PositiveInt = Field(description="Tokens of a row.")
    micro_batch_size: PositiveInt = Field(description="Rows of a step.")
    precision: Literal["fp32", "bf16-mixed"] = Field(default="fp32", description="Precision of the products.")
    repeats: PositiveInt = Field(default=5, description="Timed steps of each mode, the modes taking turns.")
    accelerator: AcceleratorName = Field(default="auto", description="Device; auto: the best one present.")
    threads: PositiveInt | None = Field(default=None, description="CPU threads; left out, all cores.")
    seed: NonNegativeInt = Field(default=0, description="Decides weights and tokens.")

    @model_validator(mode="after")
    def _modes_differ(self) -> Self:
        labels = [activation_label(mode) for mode in self.modes]
        twice = sorted({label for label in labels if labels.count(label) > 1})
        if twice:
            raise ValueError(f"modes: {', '.join(twice)} is listed more than once; list each mode once")
        return self


class ActivationSweepConfig(Section):
    """Section of the `activation_sweep` step."""

    model: LlamaConfig = Field(description="Architecture, with its vocabulary size.")
    sweep: SweepConfig = Field(description="What is compared.")

    def training(self, mode: ActivationMemory) -> TrainingConfig:
        """The training section of one step in a mode, as the estimates read it."""
        sweep = self.sweep
        return TrainingConfig(
            steps=1,
            global_batch_size=sweep.micro_batch_size,
            micro_batch_size=sweep.micro_batch_size,
            parallel=ParallelConfig(processes_per_node=1),
            precision=sweep.precision,
            activation_memory=mode,
            accelerator=sweep.accelerator,
        )


def check_sizes(model: LlamaConfig, sweep: SweepConfig) -> None:
    """Check model and sweep against each other.

    Raises:
        ValueError: they do not fit; one line names the field, its value and what would do.
    """
    if model.vocab_size is None:
        raise ValueError("model.vocab_size: is not set and a sweep has no tokenizer; give it a number")
    if sweep.sequence_length > model.max_sequence_length:
        raise ValueError(
            f"sweep.sequence_length: {sweep.sequence_length} is more than model.max_sequence_length"
            f" {model.max_sequence_length}; shorten the one or raise the other"
        )
