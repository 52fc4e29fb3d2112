"""The recipe of the `llama_pretrain` pipeline: one section a concern, one step a section."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import model_validator

from modelmill.components.core.recipe import PlannedStep, Recipe
from modelmill.components.data.config import CorpusConfig, PackingConfig, TokenizerConfig
from modelmill.components.evaluation.config import EvaluationConfig
from modelmill.components.llama.config import LlamaConfig, PretrainConfig, layout_problem
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

    @model_validator(mode="after")
    def _sections_fit(self) -> Self:
        length, limit = self.packing.sequence_length, self.model.max_sequence_length
        if length > limit:
            raise ValueError(
                f"packing.sequence_length: {length} is more than model.max_sequence_length {limit};"
                " shorten the one or raise the other"
            )
        parallel = self.training.parallel
        if problem := layout_problem(self.model, parallel.tensor, length, parallel.sequence_parallel):
            raise ValueError(problem)
        entries, known = self.tokenizer.vocab_size, self.model.vocab_size
        if self.tokenizer.kind == "train" and known is not None and known < entries:
            raise ValueError(
                f"model.vocab_size: {known} is less than tokenizer.vocab_size {entries}; raise it or leave it out"
            )
        return self

    def check_local(self) -> None:
        """See `Recipe.check_local`: the layout, precision and accelerator must be ones that this machine has."""
        from modelmill.components.training.launch import LocalLauncher

        LocalLauncher().check(self.training)

    def headline(self) -> list[str]:
        return [
            "evaluate_heldout.bits_per_byte",
            "evaluate_heldout.bigram_bits_per_byte",
            "evaluate_heldout.unigram_bits_per_byte",
            "evaluate_heldout.test_loss",
            "evaluate_heldout.bigram_loss",
            "pretrain.validation_loss",
            "pretrain.tokens_per_second",
        ]

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
