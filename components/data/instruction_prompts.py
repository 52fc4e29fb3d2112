"""Prompts of prepared conversations, to generate the last answer anew and compare it with the one that was given."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from modelmill.components.core.manifest import Manifest
from modelmill.components.data.chat_template import open_template
from modelmill.components.data.conversations import Message
from modelmill.components.data.instruction_rows import read_conversations
from modelmill.components.data.tokenizer_files import load_tokenizer


@dataclass(frozen=True)
class Prompt:
    """What a model is to answer.

    Attributes:
        id: of the conversation.
        text: all before its last answer, with the generation prompt, as in training.
        tokens: its ids; no special tokens are to be added.
        reference: the last answer.
    """

    id: str
    text: str
    tokens: tuple[int, ...]
    reference: str


def read_prompts(instructions: Manifest, tokenizer: Manifest, split: str) -> Iterator[Prompt]:
    """Prompts of a split, in the order of its `.jsonl` and of `InstructionRows.places`.

    Args:
        instructions: manifest of `prepare_instructions`.
        tokenizer: the same manifest that step was given.
        split: `train`, `validation` or `test`.

    Raises:
        UserError: a file is missing or not what was written, or the tokenizer cannot be loaded.
    """
    files = load_tokenizer(tokenizer)
    template = open_template(instructions.metadata["template"], files)
    for record in read_conversations(instructions, split):
        messages = [Message(**message) for message in record["messages"]]
        text = template.prompt(messages[:-1])
        tokens = files.encoder.encode(text, add_special_tokens=False).ids
        yield Prompt(record["id"], text, tuple(tokens), messages[-1].content)
