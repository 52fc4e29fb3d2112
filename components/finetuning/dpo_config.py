"""Section of preference tuning. Torch-free."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, model_validator

from modelmill.components.core.recipe import Section
from modelmill.components.finetuning.config import FinetuneConfig
from modelmill.components.training.config import TrainingConfig


class PreferenceObjectiveConfig(Section):
    """What is minimised over pairs of answers."""

    loss: Literal["sigmoid", "ipo"] = Field(
        default="sigmoid",
        description="sigmoid (DPO, Rafailov et al. 2023, arXiv:2305.18290), or ipo (Azar et al. 2023,"
        " arXiv:2310.12036), which draws margins to 1 / (2 beta) instead of ever further.",
    )
    beta: PositiveFloat = Field(
        default=0.1, description="How strongly the model is held to the base: rewards are beta times log-ratios."
    )
    label_smoothing: NonNegativeFloat = Field(
        default=0.0, lt=0.5, description="Share of pairs assumed to be the wrong way round (conservative DPO)."
    )
    length_normalized: bool = Field(
        default=False,
        description="Divide each answer's log-ratio by its tokens; beta is then larger, such as 2 to 10.",
    )
    sft_weight: NonNegativeFloat = Field(
        default=0.0,
        description="Weight of the chosen answer's loss per token (RPO, Pang et al. 2024, arXiv:2404.19733).",
    )

    @model_validator(mode="after")
    def _smoothed(self) -> Self:
        if self.loss == "ipo" and self.label_smoothing:
            raise ValueError("label_smoothing: ipo has none; remove it or use loss sigmoid")
        return self


class DpoConfig(FinetuneConfig):
    """Section of the step that tunes a model on pairs of answers."""

    objective: PreferenceObjectiveConfig = Field(
        default=PreferenceObjectiveConfig(), description="What is minimised over pairs of answers."
    )
    training: TrainingConfig = Field(
        description="Batch (of pairs: two sequences each), layout, optimizer, schedule. Learning rates are lower than"
        " those of fine-tuning."
    )
