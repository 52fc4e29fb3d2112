"""The recipe of the `chronos_forecast` pipeline."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from modelmill.components.core.recipe import PlannedStep
from modelmill.components.forecasting.chronos_train_config import BoltConfig, ChronosTrainConfig
from modelmill.components.forecasting.series_config import SynthesisConfig
from modelmill.components.training.config import TrainingConfig
from modelmill.pipelines.recipes.forecasting import FORECASTING, ForecasterRecipe


class ChronosForecastRecipe(ForecasterRecipe):
    """Train a small Chronos on made-up series, tune it on real ones, and promote it where tuning helped."""

    pipeline: Literal["chronos_forecast"]
    synthesis: SynthesisConfig = Field(description="Made-up series that the model learns from first.")
    model: BoltConfig = Field(default=BoltConfig(), description="Sizes of the model.")
    pretraining: TrainingConfig = Field(description="Training on the made-up series.")
    short_contexts: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="Share of windows in it whose context is cut to a random length; real series are short.",
    )
    tuning: TrainingConfig = Field(description="Training on what the real series do not hold back.")

    @model_validator(mode="after")
    def _sections_fit(self) -> Self:
        if self.synthesis.mixup is not None:
            raise ValueError("synthesis.mixup: there are no series to mix here; use kernel alone")
        self.pretrain()
        self.tune()
        return self

    def pretrain(self) -> ChronosTrainConfig:
        """Section of the training from random weights."""
        return ChronosTrainConfig(model=self.model, short_contexts=self.short_contexts, training=self.pretraining)

    def tune(self) -> ChronosTrainConfig:
        """Section of the tuning: the loss is over what the backtest asks for."""
        horizon = min(self.series.horizon, self.model.prediction_length)
        return ChronosTrainConfig(horizon=horizon, training=self.tuning)

    def check_local(self) -> None:
        """See `Recipe.check_local`: the layout, precision and accelerator must be ones that this machine has."""
        from modelmill.components.training.launch import LocalLauncher

        for training in (self.pretraining, self.tuning):
            LocalLauncher().check(training)

    def steps(self) -> list[PlannedStep]:
        training = f"{FORECASTING}.train_chronos:train_chronos"
        made = {"series": "synthesise_series"}
        return [
            self.prepared(),
            PlannedStep("synthesise_series", self.synthesis, f"{FORECASTING}.synthesise:synthesise_series"),
            PlannedStep("train_base", self.pretrain(), training, made),
            PlannedStep("tune", self.tune(), training, {"base": "train_base", "series": "prepare_series"}),
            self.backtested("base", "train_base", baselines=False),
            self.backtested("tuned", "tune", baselines=True),
            *self.decided("tune", "base"),
            self.forecasted("tune"),
        ]
