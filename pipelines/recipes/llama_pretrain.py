"""The recipe of the `llama_pretrain` pipeline: one section a concern, one step a section."""

from __future__ import annotations

from typing import Literal

from modelmill.components.core.recipe import PlannedStep, Recipe
from modelmill.components.data.config import CorpusConfig, PackingConfig, TokenizerConfig
from modelmill.components.evaluation.config import EvaluationConfig
from modelmill.components.llama.config import LlamaConfig, PretrainConfig
from modelmill.components.registry.config import RegisterConfig, RegistryConfig
from modelmill.components.training.config import TrainingConfig

_COMPONENTS = "modelmill.components"


class LlamaPretrainRecipe(Recipe):
    """Pretrain a Llama from raw text to a registered model."""

    pipeline: Literal["llama_pretrain"]
    corpus: CorpusConfig
    tokenizer: TokenizerConfig
    packing: PackingConfig
    model: LlamaConfig
    training: TrainingConfig
    evaluation: EvaluationConfig = EvaluationConfig()
    registry: RegistryConfig

    def steps(self) -> list[PlannedStep]:
        registration = RegisterConfig(**self.registry.model_dump(), recipe_name=self.name, recipe_hash=self.hash)
        return [
            PlannedStep("ingest_corpus", self.corpus, f"{_COMPONENTS}.data.corpus:ingest_corpus"),
            PlannedStep(
                "train_tokenizer",
                self.tokenizer,
                f"{_COMPONENTS}.data.tokenizer:train_tokenizer",
                {"corpus": "ingest_corpus"},
            ),
            PlannedStep(
                "pack_tokens",
                self.packing,
                f"{_COMPONENTS}.data.packing:pack_tokens",
                {"corpus": "ingest_corpus", "tokenizer": "train_tokenizer"},
            ),
            PlannedStep(
                "pretrain",
                PretrainConfig(model=self.model, training=self.training),
                f"{_COMPONENTS}.llama.pretrain:pretrain",
                {"tokenizer": "train_tokenizer", "tokens": "pack_tokens"},
            ),
            PlannedStep(
                "evaluate_heldout",
                self.evaluation,
                f"{_COMPONENTS}.evaluation.heldout:evaluate_heldout",
                {"model": "pretrain", "tokens": "pack_tokens"},
            ),
            PlannedStep(
                "register_model",
                registration,
                f"{_COMPONENTS}.registry.register:register_model",
                {"model": "pretrain", "evaluation": "evaluate_heldout"},
            ),
        ]
