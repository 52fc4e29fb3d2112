"""The recipe of the `chronos_tune` pipeline."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from modelmill.components.core.recipe import PlannedStep
from modelmill.components.forecasting.tune_config import ForecasterTuneConfig
from modelmill.components.registry.config import FetchModelConfig
from modelmill.components.registry.retrain_config import OutcomeConfig
from modelmill.pipelines.recipes.forecasting import COMPONENTS, FORECASTING, ForecasterRecipe


class ChronosTuneRecipe(ForecasterRecipe):
    """Tune a given Chronos of any family on series of one's own, and promote it where tuning helped."""

    pipeline: Literal["chronos_tune"]
    model: FetchModelConfig = Field(description="The model to start from.")
    tuning: ForecasterTuneConfig = Field(description="How it is tuned, by its family.")

    def check_local(self) -> None:
        """See `Recipe.check_local`: the layout, precision and accelerator must be ones that this machine has."""
        from modelmill.components.training.launch import LocalLauncher

        if (training := self.tuning.training()) is not None:
            LocalLauncher().check(training)

    def steps(self) -> list[PlannedStep]:
        upstream = {"series": "prepare_series", "base": "fetch_model"}
        return [
            PlannedStep("fetch_model", self.model, f"{COMPONENTS}.registry.fetch_model:fetch_model"),
            self.prepared(),
            PlannedStep("tune", self.tuning, f"{FORECASTING}.tune_forecaster:tune_forecaster", upstream),
            self.backtested("base", "fetch_model", baselines=False),
            self.backtested("tuned", "tune", baselines=True),
            *self.decided("tune", "base"),
            self.forecasted("tune"),
            PlannedStep(
                "report_outcome",
                OutcomeConfig(name=self.registry.name),
                f"{COMPONENTS}.registry.outcome:report_outcome",
            ),
        ]
