"""Section `instructions` of a recipe: which conversations a model is tuned on and how they become rows of tokens."""

from __future__ import annotations

import string
from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from modelmill.components.core.recipe import Section
from modelmill.components.data.config import Distributions, HubDataset
from modelmill.components.data.source_config import DataSource, LocalFiles, S3Objects, SourcesConfig, check_held_out

PARAMETER = "instructions.source"
Role = Literal["system", "user", "assistant", "tool"]
Split = Literal["train", "validation", "test"]

# Sections of a prompt for question answering: task, persona, question, answer.
INSTRUCTION_QUESTION_RESPONSE = """\
Below is an instruction that describes a task, followed by a question. Write a response that answers the question.

### Instruction:
{system}

### Question:
{prompt}

### Response:
{completion}"""


def placeholders(text: str) -> list[str]:
    """Names in braces in a text, in order; `{{` and `}}` stand for braces themselves.

    Raises:
        ValueError: a brace is not closed, or a name is empty or carries a conversion or a format.
    """
    names = []
    for _, name, format_, conversion in string.Formatter().parse(text):
        if name is None:
            continue
        if not name or format_ or conversion:
            raise ValueError(f"{{{name}}} is not a plain name in braces; write {{name}}, and {{{{ for a brace")
        names.append(name)
    return names


class ChatRecords(Section):
    """Records that hold a conversation: a list of messages, each with a role and a content."""

    format: Literal["chat"]
    messages: str = Field(default="messages", min_length=1, description="Field with the list of messages.")
    role: str = Field(default="role", min_length=1, description="Field of a message with its role.")
    content: str = Field(default="content", min_length=1, description="Field of a message with its text.")
    roles: dict[str, Role] = Field(
        default={},
        description="Other names of system, user, assistant and tool, such as `human: user, gpt: assistant`.",
    )


class CompletionRecords(Section):
    """Records that hold a prompt and its completion, each put together from the record's fields.

    `prompt: "{instruction}\\n\\n{input}"` and `completion: "{reasoning}\\n\\n{answer}"` join several fields. A field
    that is null counts as empty; blanks around a part that was put together are stripped.
    """

    format: Literal["completion"]
    prompt: str = Field(default="{prompt}", min_length=1, description="The user's turn; fields in braces.")
    completion: str = Field(default="{completion}", min_length=1, description="The answer; fields in braces.")
    system: str | None = Field(default=None, min_length=1, description="The system message; fields in braces.")

    @field_validator("prompt", "completion", "system")
    @classmethod
    def _readable(cls, text: str | None) -> str | None:
        if text is not None:
            placeholders(text)
        return text

    @model_validator(mode="after")
    def _filled(self) -> CompletionRecords:
        for name, text in (("prompt", self.prompt), ("completion", self.completion)):
            if not placeholders(text):
                raise ValueError(f"{name}: {text!r} names no field of the record; put one in braces")
        return self


Records = Annotated[ChatRecords | CompletionRecords, Field(discriminator="format")]


class RecordSource(DataSource):
    """What every source of records has."""

    parameter: ClassVar[str] = PARAMETER
    records: Records = Field(
        default=ChatRecords(format="chat"), description="How a record holds its conversation: chat or completion."
    )
    into: Split | None = Field(
        default=None, description="Split that all of it goes to; null splits by a hash of the prompt."
    )


class FileRecords(LocalFiles, RecordSource):
    """Local files or folders: `.jsonl` (one record a line) and `.parquet` (one a row), plain, `.gz` or `.zst`."""


class DatasetRecords(HubDataset, RecordSource):
    """A Hugging Face dataset, streamed; a local dataset folder works too. Code from a dataset is never run."""


class S3Records(S3Objects, RecordSource):
    """Objects below an S3 prefix (or one object), of the same formats as local files."""


class InstalledDocsQuestions(Distributions):
    """Questions about classes and functions of installed distributions, answered by their documentation's summary.

    Split by module: with a corpus, questions about a module stand in the split its documentation stands in there.
    """

    type: Literal["installed-docs-qa"]
    max_records: int = Field(
        default=20_000, ge=1, description="Pairs to make at most; the distributions share them evenly."
    )
    min_answer_length: int = Field(default=20, ge=1, description="Shorter answers (characters) are left out.")
    max_answer_length: int = Field(default=300, ge=1, description="Longer answers (characters) are left out.")

    @model_validator(mode="after")
    def _consistent(self) -> InstalledDocsQuestions:
        if self.max_answer_length < self.min_answer_length:
            bound = f"{self.max_answer_length} is below min_answer_length {self.min_answer_length}"
            raise ValueError(f"max_answer_length: {bound}; raise it")
        return self

    @property
    def label(self) -> str:
        return "installed-docs-qa"


InstructionSource = Annotated[
    FileRecords | DatasetRecords | S3Records | InstalledDocsQuestions, Field(discriminator="type")
]


class _ChatTemplate(Section):
    variables: dict[str, str | bool | int | float] = Field(
        default={}, description="Values for the template's own variables, such as `enable_thinking: false`."
    )


class TokenizerTemplate(_ChatTemplate):
    """The chat template that the tokenizer brings along."""

    kind: Literal["tokenizer"]


class JinjaTemplate(_ChatTemplate):
    """A chat template of one's own in Jinja, with `messages` and the tokenizer's special tokens as variables.

    Where it has `{% generation %}` blocks, these are what the model learns to write.
    """

    kind: Literal["jinja"]
    text: str | None = Field(default=None, min_length=1, description="The template itself.")
    path: str | None = Field(default=None, description="Or the file it stands in.")

    @model_validator(mode="after")
    def _one(self) -> JinjaTemplate:
        if (self.text is None) == (self.path is None):
            raise ValueError("text, path: give exactly one of them, the template or its file")
        return self


class PromptTemplate(Section):
    """A plain text around one prompt and its completion; the end-of-text token follows the completion.

    The completion stands last, so that its text up to and with that token is what the model learns to write.
    """

    kind: Literal["prompt"]
    text: str = Field(
        default=INSTRUCTION_QUESTION_RESPONSE,
        min_length=1,
        description="The text with {prompt} once, {completion} at its end and, if wanted, {system}.",
    )

    @field_validator("text")
    @classmethod
    def _complete(cls, text: str) -> str:
        names = placeholders(text)
        for name in names:
            if name not in ("system", "prompt", "completion"):
                raise ValueError(f"{{{name}}} is unknown; use {{system}}, {{prompt}} and {{completion}}")
        if names.count("prompt") != 1 or names.count("completion") != 1 or not text.endswith("{completion}"):
            raise ValueError("the text needs {prompt} once and ends with its only {completion}; mend it")
        return text


Template = Annotated[TokenizerTemplate | JinjaTemplate | PromptTemplate, Field(discriminator="kind")]


class InstructionsConfig(SourcesConfig):
    """Which conversations are learnt from, how they are written out, split and packed."""

    source: list[InstructionSource] = Field(min_length=1, description="One source of records, or several.")
    template: Template = Field(
        default=TokenizerTemplate(kind="tokenizer"),
        description="How a conversation becomes text: the tokenizer's chat template, a jinja one, or a prompt text.",
    )
    system: str | None = Field(
        default=None, min_length=1, description="System message of conversations that have none."
    )
    sequence_length: int = Field(default=1024, ge=2, description="Tokens a row predicts; a row stores one more.")
    train_on: Literal["assistant", "all"] = Field(
        default="assistant", description="What the loss counts: the assistant's turns, or every token."
    )
    too_long: Literal["truncate", "drop"] = Field(
        default="truncate", description="What becomes of a conversation that is longer than a row."
    )
    validation_fraction: float = Field(default=0.05, ge=0, lt=1, description="Share of prompts held out for tuning.")
    test_fraction: float = Field(default=0.05, ge=0, lt=1, description="Share of prompts held out for the final test.")
    seed: int = Field(default=0, ge=0, lt=2**63, description="Salt of the split and of what shares a row.")
    max_bad_records: int = Field(
        default=0, ge=0, description="Records that may be dropped because something is wrong with them."
    )
    preview_conversations: int = Field(
        default=3, ge=1, le=100, description="Conversations of each split to show as the model sees them."
    )

    @model_validator(mode="after")
    def _consistent(self) -> InstructionsConfig:
        check_held_out(self.validation_fraction, self.test_fraction)
        if sum(isinstance(source, InstalledDocsQuestions) for source in self.source) > 1:
            raise ValueError("source: installed-docs-qa stands there twice; name all distributions in one")
        return self

    def fingerprint(self) -> str:
        """State of what the sources and the template read: versions, or names, sizes and times.

        Raises:
            UserError: something cannot be found or listed.
        """
        found = super().fingerprint()
        if isinstance(self.template, JinjaTemplate) and self.template.path is not None:
            from modelmill.components.data.files import state, template_path

            path = template_path(self.template.path)
            found += f";template:{state([(path.name, path)])}"
        return found
