"""The recipe of the `reforecast` pipeline."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from modelmill.components.core.recipe import PlannedStep
from modelmill.components.evaluation.config import GateConfig
from modelmill.components.forecasting.drift_config import (
    ArchiveConfig,
    DegradationConfig,
    DriftConfig,
    JudgeConfig,
    PublishConfig,
)
from modelmill.components.forecasting.tune_config import ForecasterTuneConfig
from modelmill.components.registry.config import FetchModelConfig
from modelmill.components.registry.retrain_config import OutcomeConfig
from modelmill.pipelines.recipes.forecasting import COMPONENTS, FORECASTING, ForecasterRecipe, sql_gate


class ReforecastRecipe(ForecasterRecipe):
    """Forecast with the champion of `registry.name`, judge what it forecast before, and retrain it when it degrades.

    `series.as_of` makes a run of the past of it: nothing later is read, and the same forecasts come out again.
    """

    pipeline: Literal["reforecast"]
    made_by: str = Field(default="", description="Recipe whose run makes the first champion; an error names it.")
    otherwise: str | None = Field(
        default=None, min_length=1, description="Model that forecasts before the first champion, as a reference."
    )
    drift: DriftConfig = Field(default=DriftConfig(), description="When the input has drifted.")
    archive: ArchiveConfig = Field(
        default=ArchiveConfig(), description="Where forecasts are published and found again."
    )
    judged_forecasts: int = Field(
        default=24, ge=1, description="Published forecasts that are judged, the latest ones."
    )
    degradation: DegradationConfig = Field(
        default=DegradationConfig(), description="When the champion is to be retrained."
    )
    tuning: ForecasterTuneConfig = Field(description="How the champion is then tuned, by its family.")
    gate: GateConfig = Field(
        default=sql_gate("champion"), description="What the tuned model must show against the champion."
    )

    def check_local(self) -> None:
        """See `Recipe.check_local`: the layout, precision and accelerator must be ones that this machine has."""
        from modelmill.components.training.launch import LocalLauncher

        if (training := self.tuning.training()) is not None:
            LocalLauncher().check(training)

    def headline(self) -> list[str]:
        return ["check_degradation.ratio", "check_degradation.error", "check_degradation.naive", *super().headline()]

    def steps(self) -> list[PlannedStep]:
        name = self.registry.name
        champion = FetchModelConfig(
            reference=f"models:/{name}@champion", otherwise=self.otherwise, made_by=self.made_by
        )
        publish = PublishConfig(**self.archive.model_dump(), name=name)
        judge = JudgeConfig(**publish.model_dump(), max_forecasts=self.judged_forecasts)
        known = {"series": "prepare_series", "champion": "fetch_champion"}
        published = f"{FORECASTING}.publish_forecasts:publish_forecasts"
        return [
            PlannedStep("fetch_champion", champion, f"{COMPONENTS}.registry.fetch_model:fetch_model"),
            self.prepared(),
            PlannedStep("detect_drift", self.drift, f"{FORECASTING}.drift:detect_drift", known),
            self.forecasted("fetch_champion"),
            PlannedStep(
                "publish_forecasts",
                publish,
                published,
                {"forecasts": "forecast", "series": "prepare_series"},
            ),
            PlannedStep("judge_forecasts", judge, f"{FORECASTING}.judge_forecasts:judge_forecasts", known),
            self.backtested("champion", "fetch_champion", baselines=False),
            PlannedStep(
                "check_degradation",
                self.degradation,
                f"{FORECASTING}.degradation:check_degradation",
                {"drift": "detect_drift", "judged": "judge_forecasts", "backtest": "backtest_champion"},
            ),
            PlannedStep(
                "tune",
                self.tuning,
                f"{FORECASTING}.tune_forecaster:tune_forecaster",
                {"series": "prepare_series", "base": "fetch_champion"},
            ),
            self.backtested("tuned", "tune", baselines=True),
            *self.decided("tune", "champion"),
            self.forecasted("tune", "forecast_promoted"),
            PlannedStep(
                "publish_promoted",
                publish,
                published,
                {"forecasts": "forecast_promoted", "series": "prepare_series", "replaced": "publish_forecasts"},
            ),
            PlannedStep("report_outcome", OutcomeConfig(name=name), f"{COMPONENTS}.registry.outcome:report_outcome"),
        ]
