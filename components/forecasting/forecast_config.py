"""Section `forecast` of a recipe, and how a Chronos is run wherever one is. Torch-free."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, NonNegativeInt, PositiveInt

from modelmill.components.core.recipe import Section


def _levels(levels: list[float]) -> list[float]:
    if levels != sorted(set(levels)) or not all(0 < level < 1 for level in levels) or 0.5 not in levels:
        raise ValueError(f"{levels} must rise, lie between 0 and 1 and hold 0.5; write such as [0.1, 0.5, 0.9]")
    return levels


QuantileLevels = Annotated[list[float], AfterValidator(_levels)]


class ChronosUseConfig(Section):
    """How a Chronos is run; all but the sampling and cross learning change memory and speed only."""

    batch_size: PositiveInt = Field(
        default=256,
        description="Rows a forward pass: series, for Chronos-2 their covariates too, for Chronos-T5 sample paths.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="auto is a GPU where there is one.")
    precision: Literal["fp32", "fp64", "bf16"] = Field(
        default="fp32",
        description="Of the weights. In fp32 one draw of Chronos-T5 in about a million may land in the next bin when"
        " the batch size changes; fp64 rules that out.",
    )
    context_length: PositiveInt | None = Field(
        default=None, description="Latest points of a series that are read; null, and at most, all the model can."
    )
    covariates: list[str] | None = Field(
        default=None,
        description="Covariates that are read; null: all of them by Chronos-2, none by the others, which cannot.",
    )
    cross_learning: bool = Field(
        default=False,
        description="Let Chronos-2 read a batch of series as one group; batch_size and order then decide the result.",
    )
    num_samples: PositiveInt | None = Field(
        default=None, description="Sample paths of Chronos-T5 a series; null takes the model's own number."
    )
    seed: NonNegativeInt = Field(default=0, description="Of the sample paths, together with the name of a series.")


class ForecastConfig(Section):
    """What is forecast beyond the end of every series."""

    horizon: PositiveInt | None = Field(default=None, description="Steps; null takes the horizon of the series.")
    quantiles: QuantileLevels = Field(
        default=[0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9],
        description="Rising levels between 0 and 1, 0.5 among them; levels beyond the model's own are its outermost.",
    )
    use: ChronosUseConfig = Field(default=ChronosUseConfig(), description="How the model is run.")
    num_charts: NonNegativeInt = Field(
        default=12, le=200, description="Series drawn in the report, evenly spread over all."
    )
