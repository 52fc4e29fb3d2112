"""Section `chronos2` of a recipe: how a Chronos-2 is tuned. Torch-free."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import ConfigDict, Field, PositiveFloat, PositiveInt, model_validator

from modelmill.components.core.recipe import Section


class Chronos2TuneConfig(Section):
    """Section of the step that tunes a Chronos-2 with the method of its library."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    method: Literal["full", "lora"] = Field(
        default="lora", description="full trains all weights; lora low-rank additions, which are merged at the end."
    )
    rank: PositiveInt = Field(default=8, description="Rank of the added matrices; method full has none.")
    alpha: PositiveFloat = Field(default=16.0, description="The added product is multiplied by alpha / rank.")
    horizon: PositiveInt | None = Field(
        default=None, description="Points after an origin that count; null takes the horizon of the series."
    )
    context_length: PositiveInt | None = Field(
        default=None, description="Points before an origin that are read; null, and at most, all the model can."
    )
    min_context: PositiveInt = Field(
        default=16, description="Points before an origin at least; shorter series are not trained on."
    )
    covariates: list[str] | None = Field(default=None, description="Covariates that are read; null: all of them.")
    steps: PositiveInt = Field(default=1000, description="Optimizer steps.")
    batch_size: PositiveInt = Field(
        default=32, description="Rows of a step, series and their covariates; the cost grows with its square."
    )
    learning_rate: PositiveFloat = Field(
        default=1e-5, description="Of the first step, then linear to 0; the authors advise 1e-5, and 1e-6 with full."
    )
    validate_every: PositiveInt | None = Field(
        default=100,
        description="Steps between validations on the last `horizon` points of every series, which training then does"
        " not see; the best weights are kept. null: none, and the last weights are kept.",
    )
    log_every: PositiveInt = Field(default=10, description="Steps between two logged losses.")
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="auto is a GPU where there is one.")
    seed: int = Field(default=0, ge=0, lt=2**32, description="Decides the windows and the first added matrices.")

    @model_validator(mode="after")
    def _full_has_no_adapter(self) -> Self:
        if self.method == "full" and {"rank", "alpha"} & self.model_fields_set:
            raise ValueError("rank, alpha: method full trains all weights and adds none; remove them or use lora")
        return self
