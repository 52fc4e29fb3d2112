"""The recipe of the `embedding_finetune` pipeline."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from modelmill.components.core.recipe import PlannedStep, Recipe, suggest
from modelmill.components.embedding.config import EmbeddingTrainingConfig, PairsConfig, RetrievalConfig
from modelmill.components.evaluation.config import GateConfig
from modelmill.components.registry.config import FetchModelConfig, PromoteConfig, RegisterConfig, RegistryConfig

_COMPONENTS = "modelmill.components"
_METRICS = ("recall_at_1", "recall_at_5", "recall_at_10", "mrr_at_10", "ndcg_at_10", "cosine")


class EmbeddingFinetuneRecipe(Recipe):
    """Tune an embedding model on pairs of texts and promote it where it finds held-out texts better than its base."""

    pipeline: Literal["embedding_finetune"]
    model: FetchModelConfig = Field(description="The embedding model to start from.")
    pairs: PairsConfig = Field(description="Which texts belong together.")
    training: EmbeddingTrainingConfig = Field(description="Loss, batch and schedule.")
    evaluation: RetrievalConfig = Field(default=RetrievalConfig(), description="How both models are measured.")
    gate: GateConfig = Field(
        default=GateConfig(metric="ndcg_at_10"), description="What the tuned model must show to be promoted."
    )
    registry: RegistryConfig = Field(description="Where the tuned model is registered.")
    promotion: PromoteConfig = Field(default=PromoteConfig(), description="What a promotion says.")

    @model_validator(mode="after")
    def _gate_knows_its_metrics(self) -> Self:
        for name, metric in [("metric", self.gate.metric), *(("guards", guard.metric) for guard in self.gate.guards)]:
            if metric not in _METRICS:
                raise ValueError(f"gate.{name}: {metric!r} is no score of a retrieval; {suggest(metric, _METRICS)}")
        if any(guard.examples == "other" for guard in self.gate.guards):
            raise ValueError("gate.guards: there are no other examples in this pipeline; use examples: same")
        return self

    def check_local(self) -> None:
        """See `Recipe.check_local`: the accelerator and precision must be ones that this machine has."""
        from modelmill.components.embedding.finetune_embedding import engine
        from modelmill.components.training.launch import LocalLauncher

        LocalLauncher().check(engine(self.training, steps=1))

    def headline(self) -> list[str]:
        names = ("evaluate_tuned.ndcg_at_10", "evaluate_base.ndcg_at_10", "gate.gain_lower", "gate.p_value")
        return [*names, "evaluate_tuned.cosine", "evaluate_base.cosine", "gate.passed"]

    def steps(self) -> list[PlannedStep]:
        registration = RegisterConfig(**self.registry.model_dump(), recipe_name=self.name, recipe_hash=self.hash)
        embedding, registry = f"{_COMPONENTS}.embedding", f"{_COMPONENTS}.registry"
        judge = f"{embedding}.evaluate_retrieval:evaluate_retrieval"
        models = {"evaluate_base": "fetch_model", "evaluate_tuned": "finetune_embedding"}
        return [
            PlannedStep("fetch_model", self.model, f"{registry}.fetch_model:fetch_model"),
            PlannedStep("prepare_pairs", self.pairs, f"{embedding}.pairs:prepare_pairs"),
            PlannedStep(
                "finetune_embedding",
                self.training,
                f"{embedding}.finetune_embedding:finetune_embedding",
                {"pairs": "prepare_pairs", "base": "fetch_model"},
            ),
            *(
                PlannedStep(name, self.evaluation, judge, {"model": model, "pairs": "prepare_pairs"})
                for name, model in models.items()
            ),
            PlannedStep(
                "gate",
                self.gate,
                f"{_COMPONENTS}.evaluation.gate:gate",
                {"candidate": "evaluate_tuned", "reference": "evaluate_base"},
            ),
            PlannedStep(
                "register_model",
                registration,
                f"{registry}.register:register_model",
                {"model": "finetune_embedding", "evaluation": "gate"},
            ),
            PlannedStep(
                "promote",
                self.promotion,
                f"{registry}.promote:promote",
                {"registration": "register_model", "gate": "gate"},
            ),
        ]
