"""Prepared conversations as an evaluation reads them: a choice of a split, checked against the model's tokenizer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from modelmill.components.core.errors import UserError
from modelmill.components.core.manifest import Manifest
from modelmill.components.data.chat_template import open_template
from modelmill.components.data.conversations import Message
from modelmill.components.data.instruction_rows import InstructionRows, open_instructions, read_conversations
from modelmill.components.data.tokenizer_files import TokenizerFiles, load_tokenizer
from modelmill.components.evaluation.batching import evenly

_COMPARED = 16  # conversations tokenised anew, to see that the rows were made with the same tokenizer


@dataclass(frozen=True)
class ChosenConversations:
    """Conversations of a split.

    Attributes:
        ids: of each, [n].
        messages: of each, [n].
        numbers: of each within its split, int64 [n].
        rows: of the split.
        tokenizer: the model's.
        end_of_turn: id of the token with which the template ends an answer; None where it has none.
    """

    ids: tuple[str, ...]
    messages: tuple[tuple[Message, ...], ...]
    numbers: np.ndarray
    rows: InstructionRows
    tokenizer: TokenizerFiles
    end_of_turn: int | None

    def tokens(self, place: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids [t] of one of them as prepared, and which of them are targets, bool [t]."""
        row, first, size, _ = self.rows.places[self.numbers[place]].tolist()
        part = slice(first, first + size)
        return self.rows.tokens[row, part], self.rows.loss_mask[row, part] != 0


def choose_conversations(
    instructions: Manifest, model: Manifest, split: str, max_examples: int | None
) -> ChosenConversations:
    """Choose conversations and check that they were prepared with the model's tokenizer.

    Args:
        instructions: manifest of `prepare_instructions`.
        model: manifest of an exported model with its tokenizer.
        split: `validation` or `test`.
        max_examples: evenly spaced over the split; None takes all.

    Raises:
        UserError: the split is empty, or another tokenizer made the rows.
    """
    count = instructions.counts.get(f"{split}_conversations", 0)
    if not count:
        raise UserError(
            f"instructions: the {split} split holds no conversation; raise instructions.{split}_fraction, or give it a"
            f" source with `into: {split}`"
        )
    tokenizer = load_tokenizer(model)
    numbers = evenly(count, max_examples)
    wanted = set(numbers.tolist())
    records = [record for place, record in enumerate(read_conversations(instructions, split)) if place in wanted]
    messages = tuple(tuple(Message(**message) for message in record["messages"]) for record in records)
    rows = open_instructions(instructions, split)
    ids = tuple(record["id"] for record in records)
    end = _check_tokenizer(instructions, tokenizer, messages, rows, numbers)
    return ChosenConversations(ids, messages, numbers, rows, tokenizer, end)


def _check_tokenizer(
    instructions: Manifest,
    tokenizer: TokenizerFiles,
    messages: tuple[tuple[Message, ...], ...],
    rows: InstructionRows,
    numbers: np.ndarray,
) -> int | None:
    """Compare tokens as prepared with those that the tokenizer makes now; returns the end of turn."""
    fix = "prepare the instructions with this model's tokenizer"
    size = instructions.counts["vocab_size"]
    if size != tokenizer.vocab_size:
        raise UserError(
            f"instructions: were made with a tokenizer of {size} entries, the model's has {tokenizer.vocab_size};"
            f" {fix}"
        )
    template, end = open_template(instructions.metadata["template"], tokenizer), None
    for place in evenly(len(messages), _COMPARED).tolist():
        rendered = template.render(messages[place])
        if end is None:  # the first special token behind the words of the last answer
            words = messages[place][-1].content.strip()
            said = rendered.text.rfind(words)
            closing = tokenizer.special_pattern.search(rendered.text, said + len(words)) if said >= 0 else None
            end = tokenizer.id_of(closing.group()) if closing else None
        row, first, length, _ = rows.places[numbers[place]].tolist()
        made = tokenizer.encoder.encode(rendered.text, add_special_tokens=False).ids[:length]
        if made != rows.tokens[row, first : first + length].tolist():
            raise UserError(
                f"instructions: conversation {numbers[place] + 1} was made with another tokenizer than the model's;"
                f" {fix}"
            )
    return end
