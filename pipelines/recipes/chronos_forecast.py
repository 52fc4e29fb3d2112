"""The recipe of the `chronos_forecast` pipeline."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from modelmill.components.core.recipe import PlannedStep, Recipe, suggest
from modelmill.components.evaluation.config import GateConfig
from modelmill.components.forecasting.backtest_config import BacktestConfig
from modelmill.components.forecasting.chronos_train_config import BoltConfig, ChronosTrainConfig
from modelmill.components.forecasting.forecast_config import ForecastConfig
from modelmill.components.forecasting.series_config import SeriesConfig, SynthesisConfig
from modelmill.components.registry.config import PromoteConfig, RegisterConfig, RegistryConfig
from modelmill.components.training.config import TrainingConfig

_COMPONENTS = "modelmill.components"
_METRICS = ("sql", "mase", "wql")


class ChronosForecastRecipe(Recipe):
    """Train a small Chronos on made-up series, tune it on real ones, and promote it where tuning helped."""

    pipeline: Literal["chronos_forecast"]
    series: SeriesConfig = Field(description="What is forecast; its last windows are for the backtest.")
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
    backtest: BacktestConfig = Field(default=BacktestConfig(), description="Windows, quantiles and baselines.")
    gate: GateConfig = Field(
        default=GateConfig(metric="sql", direction="lower", candidate_name="tuned", reference_name="untuned"),
        description="What the tuned model must show to be promoted.",
    )
    registry: RegistryConfig = Field(description="Where the tuned model is registered.")
    promotion: PromoteConfig = Field(default=PromoteConfig(), description="What a promotion says.")
    forecast: ForecastConfig = Field(default=ForecastConfig(), description="What is forecast in the end.")

    @model_validator(mode="after")
    def _sections_fit(self) -> Self:
        if self.gate.metric not in _METRICS:
            raise ValueError(
                f"gate.metric: {self.gate.metric!r} is no score of a backtest; {suggest(self.gate.metric, _METRICS)}"
            )
        if self.gate.direction != "lower":
            raise ValueError(f"gate.direction: {self.gate.metric} is a loss; set it to lower")
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

    def headline(self) -> list[str]:
        return ["gate.candidate", "gate.reference", "gate.gain_lower", "gate.p_value", "gate.passed"]

    def steps(self) -> list[PlannedStep]:
        forecasting = f"{_COMPONENTS}.forecasting"
        training = f"{forecasting}.train_chronos:train_chronos"
        backtest = f"{forecasting}.backtest:backtest"
        registration = RegisterConfig(**self.registry.model_dump(), recipe_name=self.name, recipe_hash=self.hash)
        series = {"series": "prepare_series"}
        # The baselines are the same for both models; they are fitted and shown once.
        alone = self.backtest.model_copy(update={"baselines": []})
        return [
            PlannedStep("prepare_series", self.series, f"{forecasting}.series:prepare_series"),
            PlannedStep("synthesise_series", self.synthesis, f"{forecasting}.synthesise:synthesise_series"),
            PlannedStep(
                "train_base",
                self.pretrain(),
                training,
                {"series": "synthesise_series"},
            ),
            PlannedStep("tune", self.tune(), training, {"base": "train_base", **series}),
            PlannedStep("backtest_base", alone, backtest, {"model": "train_base", **series}),
            PlannedStep("backtest_tuned", self.backtest, backtest, {"model": "tune", **series}),
            PlannedStep(
                "gate",
                self.gate,
                f"{_COMPONENTS}.evaluation.gate:gate",
                {"candidate": "backtest_tuned", "reference": "backtest_base"},
            ),
            PlannedStep(
                "register_model",
                registration,
                f"{_COMPONENTS}.registry.register:register_model",
                {"model": "tune", "evaluation": "gate"},
            ),
            PlannedStep(
                "promote",
                self.promotion,
                f"{_COMPONENTS}.registry.promote:promote",
                {"registration": "register_model", "gate": "gate"},
            ),
            PlannedStep("forecast", self.forecast, f"{forecasting}.forecast:forecast", {"model": "tune", **series}),
        ]
