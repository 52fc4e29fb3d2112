"""The recipe of the `retrain` pipeline."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from modelmill.components.core.recipe import PlannedStep
from modelmill.components.registry.retrain_config import NewDataConfig, OutcomeConfig
from modelmill.pipelines.recipes.finetuning import COMPONENTS, FinetuningRecipe

_FETCH = f"{COMPONENTS}.registry.fetch_model:fetch_model"


class RetrainRecipe(FinetuningRecipe):
    """Tune on what is new since the champion, and promote the result where it beats the champion.

    `model` is what the tuning starts from: a base, or the champion itself (`models:/<name>@champion`, with `otherwise`
    for the time before the first one).
    """

    pipeline: Literal["retrain"]
    new_data: NewDataConfig = Field(default=NewDataConfig(), description="When a retraining is worth its cost.")

    def steps(self) -> list[PlannedStep]:
        return [
            PlannedStep("fetch_base", self.model, _FETCH),
            PlannedStep("fetch_champion", self.model.champion_of(self.registry.name), _FETCH),
            *self.prepared("fetch_base"),
            PlannedStep(
                "find_new_data",
                self.new_data,
                f"{COMPONENTS}.registry.new_data:find_new_data",
                {"data": "prepare_instructions", "champion": "fetch_champion"},
            ),
            *self.tuned("fetch_base"),
            *self.judged("champion", "fetch_champion"),
            PlannedStep(
                "report_outcome",
                OutcomeConfig(name=self.registry.name),
                f"{COMPONENTS}.registry.outcome:report_outcome",
            ),
        ]
