"""Section `backtest` of a recipe: on which windows forecasts are judged, and against which baselines."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from modelmill.components.core.recipe import Section
from modelmill.components.forecasting.forecast_config import ChronosUseConfig, QuantileLevels

SEASONAL_NAIVE = "seasonal-naive"
BaselineName = Literal["auto-ets", "auto-arima", "theta", "lightgbm"]


class BacktestConfig(Section):
    """Rolling-origin evaluation: windows at the end of every series, forecast from what precedes each."""

    horizon: int | None = Field(default=None, ge=1, description="Steps of one forecast; null: that of the series.")
    windows: int | None = Field(default=None, ge=1, description="Origins per series; null: that of the series.")
    step: int | None = Field(
        default=None, ge=1, description="Steps from one origin to the next; null: a horizon, so that none overlap."
    )
    context_length: int | None = Field(
        default=None, ge=1, description="Most recent points that a forecast is made from, and errors are scaled by."
    )
    min_context: int = Field(
        default=1, ge=1, description="Points before an origin that must be there; shorter series are left out."
    )
    quantiles: QuantileLevels = Field(
        default=[0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9],
        description="Rising levels between 0 and 1 that are forecast and judged; 0.5, the point forecast, among them.",
    )
    baselines: list[BaselineName] = Field(
        default=["auto-ets", "theta", "lightgbm"],
        description="Shown beside seasonal-naive, which always is; auto-arima takes seconds a series.",
    )
    fitted_points: int = Field(
        default=1000, ge=10, description="Most recent points that statistical and boosting baselines are fitted to."
    )
    candidate: str | None = Field(
        default=None,
        description="Baseline whose scores are written when no model is given; null: the best by `metric`.",
    )
    metric: Literal["sql", "wql", "mase"] = Field(
        default="sql", description="What forecasters and series are ranked by; lower is better."
    )
    use: ChronosUseConfig = Field(default=ChronosUseConfig(), description="How the model is run.")
    workers: int | None = Field(
        default=None, ge=1, description="Processes for statistical baselines at most; null: one a core."
    )

    @field_validator("baselines")
    @classmethod
    def _once(cls, names: list[BaselineName]) -> list[BaselineName]:
        if len(set(names)) < len(names):
            raise ValueError("a baseline is named twice; remove one")
        return names

    @model_validator(mode="after")
    def _known(self) -> BacktestConfig:
        shown = [SEASONAL_NAIVE, *self.baselines]
        if self.candidate is not None and self.candidate not in shown:
            raise ValueError(f"candidate: {self.candidate!r} is not among the baselines {', '.join(shown)}; add it")
        return self
