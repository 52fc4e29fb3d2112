"""Section `preferences` of a recipe: which pairs of answers a model is tuned on and how they become rows of tokens."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from modelmill.components.core.recipe import Section
from modelmill.components.data.instruction_config import (
    DatasetRecords,
    FileRecords,
    InstalledDocsQuestions,
    InstructionsConfig,
    Role,
    S3Records,
    Template,
    TokenizerTemplate,
    placeholders,
)
from modelmill.components.data.section_names import told_as
from modelmill.components.data.source_config import SourcesConfig

SECTION = "preferences"
PARAMETER = "preferences.source"


class ChatPairs(Section):
    """Records with two conversations that differ in their last turn, as lists of messages.

    With a prompt in the record, `chosen` and `rejected` go on from it (TRL's explicit form; a prompt that is text is
    the user's turn). Without one, both begin with the same messages (TRL's implicit form).
    """

    format: Literal["chat"]
    prompt: str | None = Field(
        default="prompt", description="Field with the messages both go on from; null, or missing in a record: none."
    )
    chosen: str = Field(default="chosen", min_length=1, description="Field with the messages of the better answer.")
    rejected: str = Field(default="rejected", min_length=1, description="Field with those of the worse answer.")
    role: str = Field(default="role", min_length=1, description="Field of a message with its role.")
    content: str = Field(default="content", min_length=1, description="Field of a message with its text.")
    roles: dict[str, Role] = Field(
        default={},
        description="Other names of system, user, assistant and tool, such as `human: user, gpt: assistant`.",
    )


class TextPairs(Section):
    """Records with a prompt and two answers as text, each put together from the record's fields.

    `prompt: "{instruction}\\n\\n{input}"` joins several fields; blanks around a part are stripped. TRL's form with
    the prompt only inside both texts is not read: where the prompt ends and the answers begin is not said there.
    """

    format: Literal["text"]
    prompt: str = Field(default="{prompt}", min_length=1, description="The user's turn; fields in braces.")
    chosen: str = Field(default="{chosen}", min_length=1, description="The better answer; fields in braces.")
    rejected: str = Field(default="{rejected}", min_length=1, description="The worse answer; fields in braces.")
    system: str | None = Field(default=None, min_length=1, description="The system message; fields in braces.")

    @field_validator("prompt", "chosen", "rejected", "system")
    @classmethod
    def _readable(cls, text: str | None) -> str | None:
        if text is not None:
            placeholders(text)
        return text

    @model_validator(mode="after")
    def _filled(self) -> TextPairs:
        for name in ("prompt", "chosen", "rejected"):
            if not placeholders(getattr(self, name)):
                raise ValueError(f"{name}: {getattr(self, name)!r} names no field of the record; put one in braces")
        return self


PairRecords = Annotated[ChatPairs | TextPairs, Field(discriminator="format")]
_CHAT = ChatPairs(format="chat")
_HOW = "How a record holds its two answers: chat (messages) or text."


class FilePairs(FileRecords):
    """Local files or folders: `.jsonl` (one pair a line) and `.parquet` (one a row), plain, `.gz` or `.zst`."""

    records: PairRecords = Field(default=_CHAT, description=_HOW)  # type: ignore[assignment]


class DatasetPairs(DatasetRecords):
    """A Hugging Face dataset, streamed; a local dataset folder works too. Code from a dataset is never run."""

    records: PairRecords = Field(default=_CHAT, description=_HOW)  # type: ignore[assignment]


class S3Pairs(S3Records):
    """Objects below an S3 prefix (or one object), of the same formats as local files."""

    records: PairRecords = Field(default=_CHAT, description=_HOW)  # type: ignore[assignment]


class InstalledDocsPairs(InstalledDocsQuestions):
    """Questions about classes and functions of installed distributions.

    The better answer is their documentation's summary, the worse one that of another class or function of the same
    split, drawn by the section's seed.
    """


PairSource = Annotated[FilePairs | DatasetPairs | S3Pairs | InstalledDocsPairs, Field(discriminator="type")]


class PreferencesConfig(SourcesConfig):
    """Which pairs are learnt from, how they are written out and split."""

    source: list[PairSource] = Field(min_length=1, description="One source of pairs, or several.")
    template: Template = Field(
        default=TokenizerTemplate(kind="tokenizer"),
        description="How a conversation becomes text: the tokenizer's chat template, a jinja one, or a prompt text.",
    )
    system: str | None = Field(
        default=None, min_length=1, description="System message of conversations that have none."
    )
    sequence_length: int = Field(
        default=1024,
        ge=2,
        description="Tokens that are predicted of each answer with its prompt; a row stores one more.",
    )
    too_long: Literal["truncate", "drop"] = Field(
        default="drop", description="What becomes of a pair with an answer that is longer than a row."
    )
    validation_fraction: float = Field(default=0.05, ge=0, lt=1, description="Share of prompts held out for tuning.")
    test_fraction: float = Field(default=0.05, ge=0, lt=1, description="Share of prompts held out for the final test.")
    seed: int = Field(
        default=0, ge=0, lt=2**63, description="Salt of the split, and of the drawn answers of installed-docs-qa."
    )
    max_bad_records: int = Field(
        default=0, ge=0, description="Records that may be dropped because something is wrong with them."
    )
    preview_pairs: int = Field(
        default=3, ge=1, le=100, description="Pairs of each split to show as the model sees them."
    )

    @model_validator(mode="after")
    def _as_instructions(self) -> PreferencesConfig:
        try:  # fractions and sources must be what they must be there
            self.as_instructions()
        except ValidationError as error:
            raise ValueError(error.errors()[0]["msg"].removeprefix("Value error, ")) from None
        return self

    def as_instructions(self) -> InstructionsConfig:
        """What the readers of instruction data take: the same sources, template, split and seed."""
        shared = ("template", "system", "sequence_length", "too_long", "validation_fraction", "test_fraction", "seed")
        plain = [source.model_dump(mode="json", exclude={"records"}) for source in self.source]
        fields = {name: getattr(self, name) for name in shared}
        return InstructionsConfig.model_validate({"source": plain, **fields})

    def fingerprint(self) -> str:
        """State of what the sources and the template read: versions, or names, sizes and times.

        Raises:
            UserError: something cannot be found or listed.
        """
        with told_as(SECTION, instead_of="instructions"):
            return self.as_instructions().fingerprint()
