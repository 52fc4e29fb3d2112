"""The recipe of the `activation_sweep` pipeline."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import model_validator

from modelmill.components.core.recipe import PlannedStep, Recipe
from modelmill.components.llama.config import LlamaConfig
from modelmill.components.llama.sweep_config import ActivationSweepConfig, SweepConfig, check_sizes
from modelmill.components.training.options import activation_label


class ActivationSweepRecipe(Recipe):
    """Compare the activation memory modes of a model on a machine: memory, recomputation and time."""

    pipeline: Literal["activation_sweep"]
    model: LlamaConfig
    sweep: SweepConfig

    @model_validator(mode="after")
    def _sections_fit(self) -> Self:
        check_sizes(self.model, self.sweep)
        return self

    def headline(self) -> list[str]:
        labels = [activation_label(mode) for mode in self.sweep.modes]
        return [
            f"activation_sweep.{label}_{name}" for name in ("saved_bytes", "tokens_per_second") for label in labels
        ]

    def steps(self) -> list[PlannedStep]:
        function = "modelmill.components.llama.activation_sweep:activation_sweep"
        return [PlannedStep("activation_sweep", ActivationSweepConfig(model=self.model, sweep=self.sweep), function)]
