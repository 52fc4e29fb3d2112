"""Sections `pairs`, `training` and `evaluation` of a recipe that tunes an embedding model. Torch-free."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import ConfigDict, Field, NonNegativeFloat, PositiveFloat, PositiveInt, field_validator, model_validator

from modelmill.components.core.recipe import Section
from modelmill.components.data.config import HubDataset
from modelmill.components.data.instruction_config import InstalledDocsQuestions, Split, placeholders
from modelmill.components.data.source_config import DataSource, LocalFiles, S3Objects, SourcesConfig, check_held_out

PARAMETER = "pairs.source"
CONTRASTIVE = ("multiple_negatives_ranking", "symmetric_ranking", "cached_multiple_negatives_ranking")
Loss = Literal["multiple_negatives_ranking", "symmetric_ranking", "cached_multiple_negatives_ranking", "cosent"]


class PairFields(Section):
    """How a record holds its pair: two texts put together from its fields, and perhaps how similar they are.

    A model that was trained with prefixes is given them here: `question: "query: {sentence1}"`.
    """

    question: str = Field(
        default="{sentence1}", min_length=1, description="The text to search with; fields in braces."
    )
    positive: str = Field(default="{sentence2}", min_length=1, description="The text to find; fields in braces.")
    score: str | None = Field(
        default=None,
        min_length=1,
        description="Field with the similarity from 0 to 1; below 0.5 a pair does not belong together.",
    )

    @field_validator("question", "positive")
    @classmethod
    def _filled(cls, text: str) -> str:
        if not placeholders(text):
            raise ValueError(f"{text!r} names no field of the record; put one in braces, such as {{sentence1}}")
        return text


class PairSource(DataSource):
    """What every source of records has."""

    parameter: ClassVar[str] = PARAMETER
    fields: PairFields = Field(default=PairFields(), description="Which fields of a record make the pair.")
    into: Split | None = Field(
        default=None, description="Split that all of it goes to; null splits by a hash of the text to find."
    )


class PairFiles(LocalFiles, PairSource):
    """Local files or folders: `.jsonl` and `.parquet`, plain, `.gz` or `.zst`; and `.json` files with one list."""

    def fingerprint(self) -> str:
        from modelmill.components.data.files import state
        from modelmill.components.embedding.pair_sources import pair_files

        return state((entry.name, entry.path) for entry in pair_files(self.paths))


class PairDataset(HubDataset, PairSource):
    """A Hugging Face dataset, streamed; a local dataset folder works too. Code from a dataset is never run."""


class PairObjects(S3Objects, PairSource):
    """Objects below an S3 prefix (or one object): jsonl and parquet, plain, `.gz` or `.zst`."""


RecordSource = PairFiles | PairDataset | PairObjects
AnySource = Annotated[
    PairFiles | PairDataset | PairObjects | InstalledDocsQuestions,
    Field(discriminator="type"),
]


class PairsConfig(SourcesConfig):
    """Which pairs of texts belong together, and what is held out."""

    source: list[AnySource] = Field(min_length=1, description="One source of pairs, or several.")
    validation_fraction: float = Field(
        default=0.05, ge=0, lt=1, description="Share of the texts to find that is held out for tuning."
    )
    test_fraction: float = Field(
        default=0.1, gt=0, lt=1, description="Share of the texts to find that is held out for the final test."
    )
    seed: int = Field(default=0, ge=0, lt=2**63, description="Salt of the split.")
    max_bad_records: int = Field(
        default=0, ge=0, description="Records that may be dropped because something is wrong with them."
    )

    @model_validator(mode="after")
    def _leaves_training(self) -> Self:
        check_held_out(self.validation_fraction, self.test_fraction)
        return self


class EmbeddingTrainingConfig(Section):
    """How an embedding model is tuned."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    loss: Loss = Field(
        default="multiple_negatives_ranking",
        description="multiple_negatives_ranking: each question must find its text among those of the batch."
        " symmetric_ranking: and each text its question. cached_multiple_negatives_ranking: the first in the memory of"
        " mini_batch_size. cosent: order pairs by their scores.",
    )
    scale: PositiveFloat = Field(default=20.0, description="Multiplies cosines in the loss: the inverse temperature.")
    batch_size: int = Field(default=32, ge=2, description="Pairs in one optimizer step, over all processes.")
    mini_batch_size: PositiveInt | None = Field(
        default=None, description="Pairs embedded at once by the cached loss, which needs it; memory grows with it."
    )
    epochs: PositiveFloat | None = Field(
        default=None, description="Passes over the training pairs; give this or steps. Few, unless the set is tiny."
    )
    steps: PositiveInt | None = Field(default=None, description="Optimizer steps; give this or epochs.")
    learning_rate: PositiveFloat = Field(
        default=2e-5, description="Highest learning rate, after warmup; then linear to 0."
    )
    warmup_fraction: float = Field(default=0.1, ge=0, lt=1, description="Share of the steps of linear growth from 0.")
    weight_decay: NonNegativeFloat = Field(default=0.0, description="Decoupled weight decay of AdamW.")
    clip_norm: PositiveFloat = Field(default=1.0, description="Largest norm of the gradient; more is scaled down.")
    max_sequence_length: PositiveInt | None = Field(
        default=None, description="Tokens read of a text, also when the model is used later; null keeps the base's."
    )
    precision: Literal["fp32", "bf16-mixed"] = Field(
        default="fp32", description="fp32, or bf16-mixed (bf16 products, fp32 weights and sums)."
    )
    accelerator: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="Kind of device to train on.")
    processes_per_node: PositiveInt = Field(
        default=1, description="Processes on this machine; each takes an equal part of every batch."
    )
    threads_per_process: PositiveInt | None = Field(
        default=None, description="CPU threads of a process; null shares the cores evenly."
    )
    seed: int = Field(default=0, ge=0, lt=2**32, description="Decides the order of the pairs and dropout.")
    log_every: PositiveInt = Field(default=10, description="Steps between two logged losses.")
    validate_every: PositiveInt | None = Field(
        default=None, description="Steps between retrievals with the validation pairs; null never."
    )
    checkpoint_every: PositiveInt | None = Field(
        default=None, description="Steps between checkpoints, from which a stopped training goes on; null writes none."
    )
    keep_checkpoints: PositiveInt = Field(default=2, description="Newest checkpoints that stay on disk.")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.epochs is None) == (self.steps is None):
            given = "neither is given" if self.steps is None else f"{self.epochs} and {self.steps} are both given"
            raise ValueError(f"epochs, steps: {given}; set exactly one of them")
        cached = self.loss == "cached_multiple_negatives_ranking"
        if cached != (self.mini_batch_size is not None):
            what = "needs it; set it" if cached else "does not use it; leave it out"
            raise ValueError(f"mini_batch_size: {self.mini_batch_size} with loss {self.loss}, which {what}")
        if self.batch_size % self.processes_per_node:
            raise ValueError(
                f"batch_size: {self.batch_size} cannot be shared evenly by processes_per_node"
                f" {self.processes_per_node}; use a multiple"
            )
        if self.loss == "cosent" and self.processes_per_node > 1:
            raise ValueError(
                f"processes_per_node: {self.processes_per_node} would compare pairs within each process only, which"
                " changes the loss cosent; use 1"
            )
        return self


class RetrievalConfig(Section):
    """How held-out retrieval is measured."""

    split: Literal["validation", "test"] = Field(default="test", description="Pairs whose questions are asked.")
    batch_size: PositiveInt = Field(default=64, description="Texts a forward pass; it changes memory and speed only.")
    num_examples: int = Field(
        default=5, ge=0, le=100, description="Questions in the report that were answered worst, with what was found."
    )
