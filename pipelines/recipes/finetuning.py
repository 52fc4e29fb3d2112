"""What the recipes of fine-tuning pipelines have in common: sections, their checks, and the steps that judge."""

from __future__ import annotations

from typing import Self

from pydantic import BaseModel, Field, model_validator

from modelmill.components.core.recipe import PlannedStep, Recipe, suggest
from modelmill.components.data.config import CorpusConfig
from modelmill.components.data.instruction_config import InstructionsConfig
from modelmill.components.evaluation.config import (
    GateConfig,
    GenerateConfig,
    GenerationScoresConfig,
    GuardConfig,
    TextScoresConfig,
)
from modelmill.components.finetuning.config import AdapterConfig, FinetuneConfig, MergeConfig, Method, QuantizationConfig
from modelmill.components.registry.config import FetchModelConfig, PromoteConfig, RegisterConfig, RegistryConfig
from modelmill.components.training.config import TrainingConfig

COMPONENTS = "modelmill.components"
_GUARDED = ("text_loss", "text_bits_per_byte")  # what `score_texts` gives
_BERTSCORE = ("bertscore_precision", "bertscore_recall", "bertscore_f1")
_GATE = GateConfig(
    metric="rougeL",
    guards=(GuardConfig(metric="text_bits_per_byte", direction="lower", max_drop=0.1, examples="other"),),
)


class FinetuningRecipe(Recipe):
    """Sections of a fine-tuning whose result is judged by what it writes."""

    model: FetchModelConfig = Field(description="The model to start from.")
    corpus: CorpusConfig = Field(description="Text of the base's own task, on which the tuned model must not fall.")
    instructions: InstructionsConfig = Field(description="What is learnt.")
    method: Method = Field(default="lora", description="full, lora, dora, or qlora over 4-bit weights.")
    adapter: AdapterConfig = Field(default=AdapterConfig(), description="The adapter; method full has none.")
    quantization: QuantizationConfig = Field(
        default=QuantizationConfig(), description="The 4-bit base; method qlora alone has one."
    )
    training: TrainingConfig = Field(description="Batch, layout, optimizer, schedule.")
    merging: MergeConfig = Field(default=MergeConfig(), description="Check of the merged weights.")
    generation: GenerateConfig = Field(default=GenerateConfig(), description="How both models answer.")
    scores: GenerationScoresConfig = Field(default=GenerationScoresConfig(), description="How answers are scored.")
    forgetting: TextScoresConfig = Field(default=TextScoresConfig(), description="How the corpus is scored.")
    gate: GateConfig = Field(default=_GATE, description="What the tuned model must show to be promoted.")
    registry: RegistryConfig = Field(description="Where the tuned model is registered.")
    promotion: PromoteConfig = Field(default=PromoteConfig(), description="What a promotion says.")

    @model_validator(mode="after")
    def _steps_fit(self) -> Self:
        self.finetuning()
        known = [*self.scores.metrics, *(_BERTSCORE if self.scores.bertscore else ())]
        if self.gate.metric not in known:
            raise ValueError(
                f"gate.metric: {self.gate.metric!r} is not among scores.metrics; {suggest(self.gate.metric, known)}"
            )
        guards = [guard for guard in self.gate.guards if guard.examples == "other"]
        if not guards:
            raise ValueError(
                "gate.guards: none looks at the corpus; add one with examples: other, metric text_bits_per_byte,"
                " direction: lower and the max_drop that is accepted"
            )
        for guard in self.gate.guards:
            if guard.metric not in (choice := _GUARDED if guard.examples == "other" else known):
                raise ValueError(f"gate.guards: {guard.metric!r} is no score there; {suggest(guard.metric, choice)}")
            if guard.examples == "other" and guard.direction != "lower":
                raise ValueError(f"gate.guards: {guard.metric} is a loss; set its direction to lower")
        return self

    def finetuning(self) -> FinetuneConfig:
        """Section of the training step."""
        return FinetuneConfig(
            method=self.method, adapter=self.adapter, quantization=self.quantization, training=self.training
        )

    def check_local(self) -> None:
        """See `Recipe.check_local`: the layout, precision and accelerator must be ones that this machine has."""
        from modelmill.components.finetuning.job import refuse_missing_packages
        from modelmill.components.training.launch import LocalLauncher

        refuse_missing_packages(self.method)
        LocalLauncher().check(self.training)

    def headline(self) -> list[str]:
        return ["gate.candidate", "gate.reference", "gate.gain_lower", "gate.p_value", "gate.passed"]

    def registration(self) -> RegisterConfig:
        return RegisterConfig(**self.registry.model_dump(), recipe_name=self.name, recipe_hash=self.hash)

    def prepared(self, base: str) -> list[PlannedStep]:
        """Steps up to the data, for the step that fetches the base."""
        return [
            PlannedStep("ingest_corpus", self.corpus, f"{COMPONENTS}.data.corpus:ingest_corpus"),
            PlannedStep(
                "prepare_instructions",
                self.instructions,
                f"{COMPONENTS}.data.instructions:prepare_instructions",
                {"tokenizer": base, "corpus": "ingest_corpus"},
            ),
        ]

    def tuned(self, base: str) -> list[PlannedStep]:
        """Steps from the training to a whole model."""
        data = {"instructions": "prepare_instructions", "base": base}
        return [
            PlannedStep("finetune", self.finetuning(), f"{COMPONENTS}.finetuning.finetune:finetune", data),
            PlannedStep(
                "merge_adapter",
                self.merging,
                f"{COMPONENTS}.finetuning.merge:merge_adapter",
                {"adapter": "finetune", **data},
            ),
        ]

    def judged(self, other: str, model: str) -> list[PlannedStep]:
        """Steps from both models to the promotion.

        Args:
            other: what the tuned model must beat, as the steps' names call it.
            model: step that fetches it.
        """
        sides = {other: model, "tuned": "merge_adapter"}
        texts = {"candidate": "score_tuned", "reference": f"score_{other}"}
        kept = {"guard_candidate": "score_texts_tuned", "guard_reference": f"score_texts_{other}"}

        def both(name: str, config: BaseModel, function: str, upstream: dict[str, str]) -> list[PlannedStep]:
            module = f"{COMPONENTS}.evaluation.{function}"
            return [
                PlannedStep(f"{name}_{side}", config, module, {"model": sides[side], **upstream}) for side in sides
            ]

        return [
            *both("generate", self.generation, "generate:generate", {"instructions": "prepare_instructions"}),
            *(
                PlannedStep(
                    f"score_{side}",
                    self.scores,
                    f"{COMPONENTS}.evaluation.generation:score_generations",
                    {"generations": f"generate_{side}"},
                )
                for side in sides
            ),
            *both("score_texts", self.forgetting, "texts:score_texts", {"corpus": "ingest_corpus"}),
            PlannedStep("gate", self.gate, f"{COMPONENTS}.evaluation.gate:gate", texts | kept),
            PlannedStep(
                "register_model",
                self.registration(),
                f"{COMPONENTS}.registry.register:register_model",
                {"model": "merge_adapter", "evaluation": "gate", "instructions": "prepare_instructions"},
            ),
            PlannedStep(
                "promote",
                self.promotion,
                f"{COMPONENTS}.registry.promote:promote",
                {"registration": "register_model", "gate": "gate"},
            ),
        ]
