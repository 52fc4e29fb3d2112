"""The recipe of the `lora_finetune` pipeline."""

from __future__ import annotations

from typing import Literal

from modelmill.components.core.recipe import PlannedStep
from modelmill.pipelines.recipes.finetuning import COMPONENTS, FinetuningRecipe


class LoraFinetuneRecipe(FinetuningRecipe):
    """Tune a language model, judge it against its base, and promote it where it is better."""

    pipeline: Literal["lora_finetune"]

    def steps(self) -> list[PlannedStep]:
        base = PlannedStep("fetch_model", self.model, f"{COMPONENTS}.registry.fetch_model:fetch_model")
        return [
            base,
            *self.prepared(base.name),
            *self.tuned(base.name),
            *self.judged("base", base.name),
        ]
