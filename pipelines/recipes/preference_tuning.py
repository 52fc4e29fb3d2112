"""The recipe of the `preference_tuning` pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from modelmill.components.core.recipe import PlannedStep
from modelmill.components.data.preference_config import PreferencesConfig
from modelmill.components.evaluation.config import GateConfig
from modelmill.components.evaluation.preference_config import PreferenceScoresConfig
from modelmill.components.finetuning.dpo_config import DpoConfig, PreferenceObjectiveConfig
from modelmill.pipelines.recipes.finetuning import COMPONENTS, TuningRecipe, default_gate

_METRICS = ("preferred", "margin", "margin_per_token")


class PreferenceTuningRecipe(TuningRecipe):
    """Tune a language model to prefer one answer of each pair (DPO), and promote it where it learnt to."""

    pipeline: Literal["preference_tuning"]
    preferences: PreferencesConfig = Field(description="The pairs that are learnt from.")
    objective: PreferenceObjectiveConfig = Field(
        default=PreferenceObjectiveConfig(), description="What is minimised over pairs of answers."
    )
    scores: PreferenceScoresConfig = Field(
        default=PreferenceScoresConfig(), description="How held-out pairs are scored."
    )
    gate: GateConfig = Field(
        default=default_gate("margin_per_token"), description="What the tuned model must show to be promoted."
    )

    def judged_by(self) -> Sequence[str]:
        return _METRICS

    def finetuning(self) -> DpoConfig:
        return DpoConfig(**dict(super().finetuning()), objective=self.objective)

    def steps(self) -> list[PlannedStep]:
        data = {"preferences": "prepare_preferences", "base": "fetch_model"}
        sides = {"base": "fetch_model", "tuned": "merge_adapter"}
        pairs = {"preferences": "prepare_preferences"}
        return [
            PlannedStep("fetch_model", self.model, f"{COMPONENTS}.registry.fetch_model:fetch_model"),
            PlannedStep("ingest_corpus", self.corpus, f"{COMPONENTS}.data.corpus:ingest_corpus"),
            PlannedStep(
                "prepare_preferences",
                self.preferences,
                f"{COMPONENTS}.data.preferences:prepare_preferences",
                {"tokenizer": "fetch_model", "corpus": "ingest_corpus"},
            ),
            PlannedStep("dpo", self.finetuning(), f"{COMPONENTS}.finetuning.dpo:dpo", data),
            self.merged("dpo", "fetch_model", "prepare_preferences"),
            *self.both("score_pairs", self.scores, "preferences:score_preferences", sides, pairs),
            *self.decided("base", "fetch_model", "score_pairs", "prepare_preferences"),
        ]
