"""Sections `corpus`, `tokenizer` and `packing` of a recipe.

A step's output is reused as long as nothing it reads has changed. What lies outside the recipe (installed
distributions, the user's files, a bucket) is described by `fingerprint()`, which is cheap and runs before anything is
started, so that a missing file is reported before the first step.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from modelmill.components.core.recipe import Section
from modelmill.components.data.source_config import DataSource, LocalFiles, S3Objects, SourcesConfig, check_held_out

PARAMETER = "corpus.source"

# Rich in documentation, and certain to be there with the extras train, kfp, track and eval.
DOCUMENTED_DISTRIBUTIONS = (
    "numpy",
    "scipy",
    "pandas",
    "scikit-learn",
    "sympy",
    "networkx",
    "matplotlib",
    "torch",
    "transformers",
    "mlflow",
    "SQLAlchemy",
    "huggingface_hub",
    "datasets",
    "mpmath",
    "pillow",
    "fonttools",
    "graphql-core",
    "pydantic",
    "Werkzeug",
    "rich",
    "fsspec",
    "click",
    "docker",
    "Flask",
)


class Distributions(Section):
    """Installed Python distributions by name."""

    distributions: list[str] = Field(
        default=list(DOCUMENTED_DISTRIBUTIONS),
        min_length=1,
        description="Distributions to read; they share a cap evenly. Never modelmill itself.",
    )

    @field_validator("distributions")
    @classmethod
    def _not_ourselves(cls, names: list[str]) -> list[str]:
        normal = [name.lower().replace("_", "-").replace(".", "-") for name in names]
        if "modelmill" in normal:
            raise ValueError("modelmill is not a source of text; remove it from the distributions")
        if len(set(normal)) < len(normal):
            raise ValueError("a distribution is named twice; remove one")
        return names

    def fingerprint(self) -> str:
        from modelmill.components.data.installed_docs import installed_versions

        return ",".join(installed_versions(self.distributions))


class InstalledDocsSource(Distributions):
    """Documentation strings and package descriptions of installed Python distributions, read without importing them.

    The text depends on the installed versions only: the same lock gives the same bytes on any machine.
    """

    type: Literal["installed-docs"]

    @property
    def label(self) -> str:
        """Where the text comes from, for people."""
        return "installed-docs"


class FilesSource(LocalFiles):
    """Local files or folders: `.txt` and `.md` (one document a file), `.jsonl` and `.parquet` (one a row).

    Each of them may be compressed as `.gz` or `.zst`. Folders are searched recursively, hidden entries left out.
    """

    parameter: ClassVar[str] = PARAMETER
    text_field: str = Field(
        default="text", min_length=1, description="Field (jsonl) or column (parquet) with the text."
    )
    separator: str | None = Field(
        default=None,
        min_length=1,
        description="Text between documents inside a txt or md file; null makes each file one document.",
    )


class HubDataset(DataSource):
    """A Hugging Face dataset."""

    name: str = Field(min_length=1, description="Dataset on the Hub, or a local dataset folder.")
    config: str | None = Field(default=None, description="Configuration of the dataset; null takes its default one.")
    split: str = Field(default="train", min_length=1, description="Split to read.")
    revision: str | None = Field(default=None, description="Commit, tag or branch; a commit makes the run repeatable.")
    type: Literal["huggingface"]

    @property
    def label(self) -> str:
        return self.name if Path(self.name).expanduser().is_dir() else f"hf://datasets/{self.name}"

    def fingerprint(self) -> str:
        from modelmill.components.data.huggingface import fingerprint_dataset

        return fingerprint_dataset(self)


class HuggingFaceSource(HubDataset):
    """A Hugging Face dataset, streamed; a local dataset folder works too. Code from a dataset is never run."""

    parameter: ClassVar[str] = PARAMETER
    text_field: str = Field(default="text", min_length=1, description="Column with the text.")


class S3Source(S3Objects):
    """Objects below an S3 prefix (or one object), of the same formats as local files."""

    parameter: ClassVar[str] = PARAMETER
    text_field: str = Field(
        default="text", min_length=1, description="Field (jsonl) or column (parquet) with the text."
    )
    separator: str | None = Field(
        default=None,
        min_length=1,
        description="Text between documents inside a txt or md object; null: one document each.",
    )


Source = Annotated[
    InstalledDocsSource | FilesSource | HuggingFaceSource | S3Source,
    Field(discriminator="type"),
]


class QualityConfig(Section):
    """Language-agnostic filters on one document. Shares are of characters and lie between 0 and 1.

    The defaults keep prose, code and reference documentation in any script, and drop tables of numbers, encoded
    binary data, separators and boilerplate (compare Rae et al. 2021, arXiv 2112.11446, appendix A.1.1).
    """

    min_mean_line_length: float = Field(
        default=4.0, ge=0, description="Mean characters of a non-blank line, at least."
    )
    min_letter_share: float = Field(default=0.4, ge=0, le=1, description="Letters and marks among visible characters.")
    max_symbol_share: float = Field(
        default=0.5, ge=0, le=1, description="Visible characters that are neither letters nor digits."
    )
    max_repeated_line_share: float = Field(
        default=0.7, ge=0, le=1, description="Characters in lines that occurred before."
    )
    max_control_share: float = Field(
        default=0.01, ge=0, le=1, description="Control and replacement characters in the text as read."
    )


class CorpusConfig(SourcesConfig):
    """Which text, what of it is kept, and how it is split."""

    source: list[Source] = Field(min_length=1, description="One source or several; they share `max_bytes` evenly.")
    max_bytes: int | None = Field(
        default=None, ge=1, description="Cap on the kept text (UTF-8 bytes); null keeps everything."
    )
    min_document_length: int = Field(default=100, ge=1, description="Shorter documents (characters) are dropped.")
    max_document_length: int = Field(
        default=10_000_000, ge=1, description="Longer documents (characters as read) are dropped."
    )
    quality: QualityConfig = QualityConfig()
    validation_fraction: float = Field(
        default=0.05, gt=0, lt=1, description="Share of documents held out for validation."
    )
    test_fraction: float = Field(
        default=0.05, gt=0, lt=1, description="Share of documents held out for the final test."
    )
    seed: int = Field(default=0, ge=0, lt=2**63, description="Salt of the split; another seed gives another split.")

    @model_validator(mode="after")
    def _consistent(self) -> CorpusConfig:
        check_held_out(self.validation_fraction, self.test_fraction)
        if self.max_document_length < self.min_document_length:
            raise ValueError(
                f"max_document_length: {self.max_document_length} is below min_document_length "
                f"{self.min_document_length}; raise it"
            )
        return self


class TokenizerConfig(Section):
    """Train a byte-level BPE tokenizer on the training split, or load an existing one."""

    kind: Literal["train", "load"] = Field(
        default="train", description="`train` a byte-level BPE, or `load` from `path`."
    )
    path: str | None = Field(
        default=None, description="For `load`: a tokenizer folder, a tokenizer.json or a SentencePiece .model file."
    )
    vocab_size: int = Field(
        default=32_000, ge=259, description="For `train`: entries, special tokens and 256 bytes included."
    )
    min_frequency: int = Field(default=2, ge=1, description="For `train`: a merge must occur at least so often.")
    bos_token: str | None = Field(
        default=None,
        min_length=1,
        description="Start of text; null: <|begin_of_text|>, or what a loaded tokenizer declares.",
    )
    eos_token: str | None = Field(
        default=None,
        min_length=1,
        description="End of a document; null: <|end_of_text|>, or what a loaded one declares.",
    )
    pad_token: str | None = Field(
        default=None, min_length=1, description="Padding; null: <|pad|>, or what a loaded tokenizer declares."
    )

    @model_validator(mode="after")
    def _consistent(self) -> TokenizerConfig:
        if self.kind == "load" and self.path is None:
            raise ValueError("path: is missing; give the tokenizer to load, or set kind to train")
        if self.kind == "train" and self.path is not None:
            raise ValueError(f"path: {self.path!r} is not read by kind train; set kind to load")
        named = [token for token in (self.bos_token, self.eos_token, self.pad_token) if token]
        if self.kind == "train" and len(set(named)) < len(named):
            raise ValueError(f"special tokens: {named} name one token twice; give each its own")
        return self

    def fingerprint(self) -> str:
        """Names, sizes and times of the files that are loaded; empty when training.

        Raises:
            UserError: the path does not exist or is none of the known forms.
        """
        if self.path is None:
            return ""
        from modelmill.components.data.files import fingerprint_tokenizer

        return fingerprint_tokenizer(self.path)


class PackingConfig(Section):
    """How documents become rows of a fixed number of tokens."""

    sequence_length: int = Field(default=2048, ge=1, description="Tokens a row predicts; a row stores one more.")


class TakeTokenizerConfig(Section):
    """The tokenizer that a model brings along."""

    eos_token: str | None = Field(
        default=None, min_length=1, description="End of a document, where the model's files declare none."
    )
