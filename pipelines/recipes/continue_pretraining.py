"""The recipe of the `continue_pretraining` pipeline."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from modelmill.components.core.recipe import PlannedStep, Recipe, suggest
from modelmill.components.data.config import CorpusConfig, PackingConfig, TakeTokenizerConfig
from modelmill.components.evaluation.config import GateConfig, TextScoresConfig
from modelmill.components.llama.config import ContinueConfig
from modelmill.components.registry.config import FetchModelConfig, PromoteConfig, RegisterConfig, RegistryConfig
from modelmill.components.registry.retrain_config import NewDataConfig, OutcomeConfig
from modelmill.components.training.config import TrainingConfig

_COMPONENTS = "modelmill.components"
_METRICS = ("text_bits_per_byte", "text_loss")


class ContinuePretrainingRecipe(Recipe):
    """Pretrain the champion further on new text, and promote the result where it beats the champion.

    `model` is taken before the first champion: a Llama of an earlier pretraining.
    """

    pipeline: Literal["continue_pretraining"]
    model: FetchModelConfig = Field(description="The model to go on from while the registry has no champion.")
    corpus: CorpusConfig = Field(description="Text; its test split is what both models are judged on.")
    tokenizer: TakeTokenizerConfig = TakeTokenizerConfig()
    packing: PackingConfig
    new_data: NewDataConfig = NewDataConfig()
    training: TrainingConfig
    scores: TextScoresConfig = TextScoresConfig()
    gate: GateConfig = GateConfig(
        metric="text_bits_per_byte", direction="lower", candidate_name="continued", reference_name="champion"
    )
    registry: RegistryConfig
    promotion: PromoteConfig = PromoteConfig()

    @model_validator(mode="after")
    def _gate_fits(self) -> Self:
        gate = self.gate
        if gate.metric not in _METRICS:
            raise ValueError(f"gate.metric: {gate.metric!r} is no score of text; {suggest(gate.metric, _METRICS)}")
        if gate.direction != "lower":
            raise ValueError(f"gate.direction: {gate.metric} is a loss; set it to lower")
        if any(guard.examples == "other" for guard in gate.guards):
            raise ValueError("gate.guards: there are no other examples here; set examples to same")
        return self

    def check_local(self) -> None:
        """See `Recipe.check_local`: the layout, precision and accelerator must be ones that this machine has."""
        from modelmill.components.training.launch import LocalLauncher

        LocalLauncher().check(self.training)

    def headline(self) -> list[str]:
        return ["gate.candidate", "gate.reference", "gate.gain_lower", "gate.p_value", "gate.passed"]

    def steps(self) -> list[PlannedStep]:
        registration = RegisterConfig(**self.registry.model_dump(), recipe_name=self.name, recipe_hash=self.hash)
        data = {"corpus": "ingest_corpus"}
        scores = f"{_COMPONENTS}.evaluation.texts:score_texts"
        champion = self.model.champion_of(self.registry.name)
        return [
            PlannedStep("fetch_champion", champion, f"{_COMPONENTS}.registry.fetch_model:fetch_model"),
            PlannedStep("ingest_corpus", self.corpus, f"{_COMPONENTS}.data.corpus:ingest_corpus"),
            PlannedStep(
                "find_new_data",
                self.new_data,
                f"{_COMPONENTS}.registry.new_data:find_new_data",
                {"data": "ingest_corpus", "champion": "fetch_champion"},
            ),
            PlannedStep(
                "take_tokenizer",
                self.tokenizer,
                f"{_COMPONENTS}.data.tokenizer:take_tokenizer",
                {"model": "fetch_champion", **data},
            ),
            PlannedStep(
                "pack_tokens",
                self.packing,
                f"{_COMPONENTS}.data.packing:pack_tokens",
                {"tokenizer": "take_tokenizer", **data},
            ),
            PlannedStep(
                "continue_pretraining",
                ContinueConfig(training=self.training),
                f"{_COMPONENTS}.llama.continue_pretraining:continue_pretraining",
                {"base": "fetch_champion", "tokens": "pack_tokens", **data},
            ),
            PlannedStep("score_texts_champion", self.scores, scores, {"model": "fetch_champion", **data}),
            PlannedStep("score_texts_tuned", self.scores, scores, {"model": "continue_pretraining", **data}),
            PlannedStep(
                "gate",
                self.gate,
                f"{_COMPONENTS}.evaluation.gate:gate",
                {"candidate": "score_texts_tuned", "reference": "score_texts_champion"},
            ),
            PlannedStep(
                "register_model",
                registration,
                f"{_COMPONENTS}.registry.register:register_model",
                {"model": "continue_pretraining", "evaluation": "gate"},
            ),
            PlannedStep(
                "promote",
                self.promotion,
                f"{_COMPONENTS}.registry.promote:promote",
                {"registration": "register_model", "gate": "gate"},
            ),
            PlannedStep(
                "report_outcome",
                OutcomeConfig(name=self.registry.name),
                f"{_COMPONENTS}.registry.outcome:report_outcome",
            ),
        ]
