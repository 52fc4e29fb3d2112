"""What the recipes of tuning pipelines have in common: sections, their checks, and the steps around the training."""

from __future__ import annotations

from collections.abc import Sequence
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
from modelmill.components.finetuning.config import (
    AdapterConfig,
    FinetuneConfig,
    MergeConfig,
    Method,
    QuantizationConfig,
)
from modelmill.components.registry.config import (
    FetchModelConfig,
    MirrorConfig,
    PromoteConfig,
    RegisterConfig,
    RegistryConfig,
)
from modelmill.components.training.config import TrainingConfig

COMPONENTS = "modelmill.components"
_GUARDED = ("text_loss", "text_bits_per_byte")  # what `score_texts` gives
_BERTSCORE = ("bertscore_precision", "bertscore_recall", "bertscore_f1")


def default_gate(metric: str) -> GateConfig:
    """Better by that metric, and no more than 0.1 bits per byte worse at the base's own task."""
    guard = GuardConfig(metric="text_bits_per_byte", direction="lower", max_drop=0.1, examples="other")
    return GateConfig(metric=metric, guards=(guard,))


class TuningRecipe(Recipe):
    """Sections of any tuning of a language model whose result is judged by a gate, guarded by a corpus."""

    model: FetchModelConfig = Field(description="The model to start from.")
    corpus: CorpusConfig = Field(description="Text of the base's own task, on which the tuned model must not fall.")
    method: Method = Field(default="lora", description="full, lora, dora, or qlora over 4-bit weights.")
    adapter: AdapterConfig = Field(default=AdapterConfig(), description="The adapter; method full has none.")
    quantization: QuantizationConfig = Field(
        default=QuantizationConfig(), description="The 4-bit base; method qlora alone has one."
    )
    training: TrainingConfig = Field(description="Batch, layout, optimizer, schedule.")
    merging: MergeConfig = Field(default=MergeConfig(), description="Check of the merged weights.")
    forgetting: TextScoresConfig = Field(default=TextScoresConfig(), description="How the corpus is scored.")
    gate: GateConfig = Field(description="What the tuned model must show to be promoted.")
    registry: RegistryConfig = Field(description="Where the tuned model is registered.")
    promotion: PromoteConfig = Field(default=PromoteConfig(), description="What a promotion says.")
    mirror: MirrorConfig = Field(default=MirrorConfig(), description="Another registry that follows the promotions.")

    def finetuning(self) -> FinetuneConfig:
        """Section of the training step."""
        return FinetuneConfig(
            method=self.method, adapter=self.adapter, quantization=self.quantization, training=self.training
        )

    def judged_by(self) -> Sequence[str]:
        """Scores that the gate may look at."""
        raise NotImplementedError

    @model_validator(mode="after")
    def _steps_fit(self) -> Self:
        self.finetuning()
        known, gate = self.judged_by(), self.gate
        if gate.metric not in known:
            raise ValueError(
                f"gate.metric: {gate.metric!r} is no score of this pipeline; {suggest(gate.metric, known)}"
            )
        if not any(guard.examples == "other" for guard in gate.guards):
            raise ValueError(
                "gate.guards: none looks at the corpus; add one with examples: other, metric text_bits_per_byte,"
                " direction: lower and the max_drop that is accepted"
            )
        for guard in gate.guards:
            if guard.metric not in (choice := _GUARDED if guard.examples == "other" else known):
                raise ValueError(f"gate.guards: {guard.metric!r} is no score there; {suggest(guard.metric, choice)}")
            if guard.examples == "other" and guard.direction != "lower":
                raise ValueError(f"gate.guards: {guard.metric} is a loss; set its direction to lower")
        return self

    def check_local(self) -> None:
        """See `Recipe.check_local`: layout, precision, accelerator and packages must be ones that this machine has."""
        from modelmill.components.finetuning.job import refuse_missing_packages
        from modelmill.components.training.launch import LocalLauncher

        refuse_missing_packages(self.method)
        LocalLauncher().check(self.training)

    def headline(self) -> list[str]:
        return ["gate.candidate", "gate.reference", "gate.gain_lower", "gate.p_value", "gate.passed"]

    def merged(self, training: str, base: str, data: str) -> PlannedStep:
        """The step that makes a whole model of what the training step gives."""
        upstream = {"adapter": training, "data": data, "base": base}
        return PlannedStep("merge_adapter", self.merging, f"{COMPONENTS}.finetuning.merge:merge_adapter", upstream)

    def both(
        self, name: str, config: BaseModel, function: str, models: dict[str, str], upstream: dict[str, str]
    ) -> list[PlannedStep]:
        """One step of the evaluation for each model; `models` maps a side's name to the step that makes it."""
        module = f"{COMPONENTS}.evaluation.{function}"
        return [
            PlannedStep(f"{name}_{side}", config, module, {"model": model, **upstream})
            for side, model in models.items()
        ]

    def decided(self, other: str, model: str, scores: str, data: str) -> list[PlannedStep]:
        """Steps from the scores to the promotion.

        Args:
            other: what the tuned model must beat, as the steps' names call it.
            model: step that fetches it.
            scores: steps with the scores are named by this and the side.
            data: step that prepared what was learnt.
        """
        kept = self.both(
            "score_texts",
            self.forgetting,
            "texts:score_texts",
            {other: model, "tuned": "merge_adapter"},
            {"corpus": "ingest_corpus"},
        )
        judged = {"candidate": f"{scores}_tuned", "reference": f"{scores}_{other}"}
        judged |= {"guard_candidate": "score_texts_tuned", "guard_reference": f"score_texts_{other}"}
        registration = RegisterConfig(**self.registry.model_dump(), recipe_name=self.name, recipe_hash=self.hash)
        return [
            *kept,
            PlannedStep("gate", self.gate, f"{COMPONENTS}.evaluation.gate:gate", judged),
            PlannedStep(
                "register_model",
                registration,
                f"{COMPONENTS}.registry.register:register_model",
                {"model": "merge_adapter", "evaluation": "gate", "instructions": data},
            ),
            PlannedStep(
                "promote",
                self.promotion,
                f"{COMPONENTS}.registry.promote:promote",
                {"registration": "register_model", "gate": "gate"},
            ),
            PlannedStep(
                "mirror_to_sagemaker",
                self.mirror,
                f"{COMPONENTS}.registry.sagemaker_mirror:mirror_to_sagemaker",
                {"registration": "register_model", "promotion": "promote"},
            ),
        ]


class FinetuningRecipe(TuningRecipe):
    """Sections of a tuning on instructions, judged by what both models write."""

    instructions: InstructionsConfig = Field(description="What is learnt.")
    generation: GenerateConfig = Field(default=GenerateConfig(), description="How both models answer.")
    scores: GenerationScoresConfig = Field(default=GenerationScoresConfig(), description="How answers are scored.")
    gate: GateConfig = Field(
        default=default_gate("rougeL"), description="What the tuned model must show to be promoted."
    )

    def judged_by(self) -> Sequence[str]:
        return [*self.scores.metrics, *(_BERTSCORE if self.scores.bertscore else ())]

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
            self.merged("finetune", base, "prepare_instructions"),
        ]

    def judged(self, other: str, model: str) -> list[PlannedStep]:
        """Steps from both models to the promotion: see `decided`."""
        sides = {other: model, "tuned": "merge_adapter"}
        data = "prepare_instructions"
        return [
            *self.both("generate", self.generation, "generate:generate", sides, {"instructions": data}),
            *(
                PlannedStep(
                    f"score_{side}",
                    self.scores,
                    f"{COMPONENTS}.evaluation.generation:score_generations",
                    {"generations": f"generate_{side}"},
                )
                for side in sides
            ),
            *self.decided(other, model, "score", data),
        ]
