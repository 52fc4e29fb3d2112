"""Section `search` of a recipe: which trainings of a Chronos are tried, and how the best one is found. Torch-free."""

from __future__ import annotations

import itertools
from typing import Literal, Self

from pydantic import ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt, ValidationError, model_validator

from modelmill.components.core.manifest import json_digest
from modelmill.components.core.recipe import Section
from modelmill.components.forecasting.chronos2_config import Chronos2TuneConfig
from modelmill.components.forecasting.chronos_train_config import ChronosTrainConfig
from modelmill.components.forecasting.forecast_config import ChronosUseConfig, QuantileLevels

Params = dict[str, float | int]
"""What one trial tries: `learning_rate`, and of the others those that are searched."""


class SearchSpace(Section):
    """What is tried; what is left out stays as the training's section says."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    learning_rate: tuple[PositiveFloat, PositiveFloat] = Field(
        default=(1e-5, 1e-4),
        description="Lowest and highest learning rate, on a logarithmic scale; min_learning_rate keeps its ratio.",
    )
    steps: list[PositiveInt] | None = Field(default=None, description="Numbers of optimizer steps to choose from.")
    batch_size: list[PositiveInt] | None = Field(
        default=None, description="Batches to choose from: global_batch_size, of a Chronos-2 batch_size."
    )
    rank: list[PositiveInt] | None = Field(
        default=None, description="LoRA ranks of a Chronos-2 to choose from; alpha keeps its ratio to the rank."
    )

    @model_validator(mode="after")
    def _is_a_space(self) -> Self:
        low, high = self.learning_rate
        if low > high:
            raise ValueError(f"learning_rate: [{low:g}, {high:g}] must rise; write [{high:g}, {low:g}]")
        for name, choices in self.choices().items():
            if not choices or len(set(choices)) < len(choices):
                raise ValueError(f"{name}: {choices} must hold different values; write such as [100, 200]")
        return self

    def choices(self) -> dict[str, list[int]]:
        """Values of each parameter that is chosen from a list."""
        given = {"steps": self.steps, "batch_size": self.batch_size, "rank": self.rank}
        return {name: list(values) for name, values in given.items() if values is not None}


class PruningConfig(Section):
    """When a trial is given up before its last step. Trials are trained and validated in segments for it."""

    segments: int = Field(default=4, ge=2, description="Validations of a trial, evenly spread over its steps.")
    pruner: Literal["median", "hyperband"] = Field(
        default="median",
        description="median: worse than the median of the finished trials at the same segment; hyperband: not among"
        " the best third at a rung.",
    )
    startup_trials: NonNegativeInt = Field(
        default=2, description="Trials that finish before the median counts; hyperband has none."
    )


class SearchConfig(Section):
    """Section of the steps that search for the best training of a Chronos."""

    chronos: ChronosTrainConfig | None = Field(
        default=None, description="How a Chronos-T5 or Chronos-Bolt is trained; `model` stays null, there is a base."
    )
    chronos2: Chronos2TuneConfig | None = Field(default=None, description="How a Chronos-2 is tuned.")
    space: SearchSpace = Field(default=SearchSpace(), description="What is tried.")
    metric: Literal["sql", "wql", "mase"] = Field(
        default="sql", description="What trials are compared by on the validation windows; lower is better."
    )
    max_jobs: PositiveInt = Field(default=10, le=1000, description="Trials beside the untrained base.")
    max_parallel_jobs: PositiveInt = Field(
        default=1, description="Trials at once. With 1 the search is a function of its seed."
    )
    seed: NonNegativeInt = Field(default=10, lt=2**32, description="Of the values that are tried.")
    startup_trials: NonNegativeInt = Field(
        default=4, description="Trials drawn at random before TPE models which values are good."
    )
    horizon: PositiveInt | None = Field(
        default=None,
        description="Steps of a validation window; null: those of the series, which decide where they name some.",
    )
    validation_windows: PositiveInt = Field(
        default=1,
        description="Windows of each series right before those of the backtest, on which trials are compared; no trial"
        " is trained on them.",
    )
    min_context: PositiveInt = Field(
        default=1, description="Points before a validation window that must be there; shorter series are left out."
    )
    quantiles: QuantileLevels = Field(
        default=[0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9], description="Levels that are validated."
    )
    use: ChronosUseConfig = Field(default=ChronosUseConfig(), description="How a trial's model is run.")
    pruning: PruningConfig | None = Field(default=None, description="When poor trials are given up; null: never.")
    refit: bool = Field(
        default=False,
        description="Train the winner once more with the validation windows as well. Then no window is left on which"
        " it could be compared with the base.",
    )
    study: str | None = Field(
        default=None,
        min_length=1,
        max_length=200,
        description="Name of the search in its storage; null: made of what decides the search.",
    )

    @model_validator(mode="after")
    def _one_training(self) -> Self:
        if (self.chronos is None) == (self.chronos2 is None):
            what = "neither is" if self.chronos is None else "both are"
            raise ValueError(
                f"chronos, chronos2: {what} given; give chronos for a base of Chronos-T5 or Chronos-Bolt, or chronos2"
            )
        if self.chronos is not None and self.chronos.model is not None:
            raise ValueError("chronos.model: a search starts from the base it is given; remove model")
        if self.chronos2 is not None and self.pruning is not None:
            raise ValueError(
                "pruning: a Chronos-2 is trained by its library in one piece, so no trial can be given up; set it to"
                " null, or lower chronos2.steps"
            )
        if self.space.rank is not None and (self.chronos2 is None or self.chronos2.method != "lora"):
            raise ValueError("space.rank: only a Chronos-2 tuned with LoRA has a rank; remove it")
        return self

    @model_validator(mode="after")
    def _every_trial_can_be_trained(self) -> Self:
        choices = self.space.choices()
        for values in itertools.product(*choices.values()):
            params: Params = {"learning_rate": self.space.learning_rate[0], **dict(zip(choices, values, strict=True))}
            try:
                self.training_of(params)
            except ValidationError as error:
                message = error.errors()[0]["msg"].removeprefix("Value error, ")
                shown = ", ".join(f"{name} {value}" for name, value in params.items() if name in choices)
                raise ValueError(f"space: {shown} cannot be trained: {message}") from None
            if self.pruning is not None and self.steps_of(params) < self.pruning.segments:
                raise ValueError(
                    f"pruning.segments: {self.pruning.segments} is more than {self.steps_of(params)} steps; lower it"
                )
        return self

    def training_of(self, params: Params) -> ChronosTrainConfig | Chronos2TuneConfig:
        """The training's section with a trial's values.

        Raises:
            ValidationError: they do not go together.
        """
        rate = params["learning_rate"]
        changes: dict[str, float | int]
        if self.chronos2 is not None:
            given = self.chronos2
            changes = {name: params[name] for name in self.space.choices() if name in params}
            if "rank" in params:
                changes["alpha"] = given.alpha * params["rank"] / given.rank
            values = {name: getattr(given, name) for name in given.model_fields_set}
            return Chronos2TuneConfig.model_validate({**values, **changes, "learning_rate": rate})
        assert self.chronos is not None
        own = self.chronos.training
        changes = {"min_learning_rate": own.min_learning_rate * rate / own.learning_rate, "learning_rate": rate}
        named = {"steps": "steps", "batch_size": "global_batch_size"}
        changes |= {field: params[name] for name, field in named.items() if name in params}
        training = type(own).model_validate({**own.model_dump(), **changes})
        return self.chronos.model_copy(update={"training": training})

    def steps_of(self, params: Params) -> int:
        """Optimizer steps of a trial."""
        section = self.training_of(params)
        return section.steps if isinstance(section, Chronos2TuneConfig) else section.training.steps

    @property
    def segments(self) -> int:
        """Parts in which a trial is trained."""
        return 1 if self.pruning is None else self.pruning.segments

    def identity(self, series_digest: str, base_digest: str) -> str:
        """Digest of what decides the trials; how many there are does not, so that a search can be prolonged."""
        ignored = {"max_jobs", "refit", "study"}
        content = self.model_dump(mode="json", exclude=ignored)
        return json_digest([content, series_digest, base_digest])
