"""What the recipes of forecasting pipelines have in common: sections, their checks, and the steps after a training."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from modelmill.components.core.recipe import PlannedStep, Recipe, suggest
from modelmill.components.evaluation.config import GateConfig
from modelmill.components.forecasting.backtest_config import BacktestConfig
from modelmill.components.forecasting.forecast_config import ForecastConfig
from modelmill.components.forecasting.series_config import SeriesConfig
from modelmill.components.registry.config import PromoteConfig, RegisterConfig, RegistryConfig

COMPONENTS = "modelmill.components"
FORECASTING = f"{COMPONENTS}.forecasting"
_METRICS = ("sql", "mase", "wql")


def sql_gate(reference: str) -> GateConfig:
    """Better by the scaled quantile loss than a reference of that name."""
    return GateConfig(metric="sql", direction="lower", candidate_name="tuned", reference_name=reference)


class ForecasterRecipe(Recipe):
    """Sections of any pipeline that tunes a forecaster and promotes it where that helped."""

    series: SeriesConfig = Field(description="What is forecast; its last windows are for the backtest.")
    backtest: BacktestConfig = Field(default=BacktestConfig(), description="Windows, quantiles and baselines.")
    gate: GateConfig = Field(default=sql_gate("untuned"), description="What the tuned model must show to be promoted.")
    registry: RegistryConfig = Field(description="Where the tuned model is registered.")
    promotion: PromoteConfig = Field(default=PromoteConfig(), description="What a promotion says.")
    forecast: ForecastConfig = Field(default=ForecastConfig(), description="What is forecast in the end.")

    @model_validator(mode="after")
    def _gate_fits(self) -> Self:
        if self.gate.metric not in _METRICS:
            raise ValueError(
                f"gate.metric: {self.gate.metric!r} is no score of a backtest; {suggest(self.gate.metric, _METRICS)}"
            )
        if self.gate.direction != "lower":
            raise ValueError(f"gate.direction: {self.gate.metric} is a loss; set it to lower")
        return self

    def headline(self) -> list[str]:
        return ["gate.candidate", "gate.reference", "gate.gain_lower", "gate.p_value", "gate.passed"]

    def prepared(self) -> PlannedStep:
        """The step that reads the series."""
        return PlannedStep("prepare_series", self.series, f"{FORECASTING}.series:prepare_series")

    def backtested(self, side: str, model: str, *, baselines: bool) -> PlannedStep:
        """A backtest of the model of a step; baselines are the same for every model, and fitted and shown once."""
        config = self.backtest if baselines else self.backtest.model_copy(update={"baselines": []})
        upstream = {"model": model, "series": "prepare_series"}
        return PlannedStep(f"backtest_{side}", config, f"{FORECASTING}.backtest:backtest", upstream)

    def decided(self, tuned: str, reference: str) -> list[PlannedStep]:
        """Gate, registration and promotion of the model of a step.

        Args:
            tuned: step that makes it.
            reference: side that it is compared with, as of `backtested`; its own is `tuned`.
        """
        registration = RegisterConfig(**self.registry.model_dump(), recipe_name=self.name, recipe_hash=self.hash)
        return [
            PlannedStep(
                "gate",
                self.gate,
                f"{COMPONENTS}.evaluation.gate:gate",
                {"candidate": "backtest_tuned", "reference": f"backtest_{reference}"},
            ),
            PlannedStep(
                "register_model",
                registration,
                f"{COMPONENTS}.registry.register:register_model",
                {"model": tuned, "evaluation": "gate"},
            ),
            PlannedStep(
                "promote",
                self.promotion,
                f"{COMPONENTS}.registry.promote:promote",
                {"registration": "register_model", "gate": "gate"},
            ),
        ]

    def forecasted(self, model: str, name: str = "forecast") -> PlannedStep:
        """The forecast of what follows the series, by the model of a step; `name` is the forecasting step's."""
        upstream = {"model": model, "series": "prepare_series"}
        return PlannedStep(name, self.forecast, f"{FORECASTING}.forecast:forecast", upstream)
