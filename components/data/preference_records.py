"""Pairs of answers: what a record of preference data must hold, checked field by field.

Whatever form a record has, it becomes a prompt and two answers, each one turn of the assistant. What is wrong with one
is told by a `BadRecord`, as for instruction data.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from modelmill.components.core.manifest import Manifest, canonical_json
from modelmill.components.data.cleaning import digest
from modelmill.components.data.conversations import BadRecord, Message, read_conversation
from modelmill.components.data.documents import SPLITS
from modelmill.components.data.installed_docs_qa import QuestionAnswer, read_questions
from modelmill.components.data.instruction_config import ChatRecords, CompletionRecords
from modelmill.components.data.preference_config import ChatPairs, InstalledDocsPairs, PreferencesConfig, TextPairs


@dataclass(frozen=True)
class Pair:
    """A prompt, the answer that is preferred and the one that is not."""

    prompt: tuple[Message, ...]
    chosen: Message
    rejected: Message

    @property
    def conversations(self) -> tuple[tuple[Message, ...], tuple[Message, ...]]:
        """The prompt with each of its answers, the chosen one first."""
        return (*self.prompt, self.chosen), (*self.prompt, self.rejected)

    def as_dict(self) -> dict[str, Any]:
        """The form that JSON lines have."""
        prompt = [message.as_dict() for message in self.prompt]
        return {"prompt": prompt, "chosen": self.chosen.content, "rejected": self.rejected.content}


def pair_digest(pair: Pair) -> bytes:
    """128-bit digest of a whole pair: equal ones are duplicates."""
    return digest(canonical_json([[message.role, message.content] for side in pair.conversations for message in side]))


def read_pair(value: Any, records: ChatPairs | TextPairs, system: str | None) -> Pair:
    """The pair of a record.

    Args:
        value: the record: a dictionary, anything else that JSON holds, or the `ValueError` of a line that is no JSON.
        records: how it holds its answers.
        system: content of the system message of conversations without one; None adds none.

    Raises:
        BadRecord: the record does not have that form, or there is nothing to prefer in it.
    """
    sides = _text_sides(value, records, system) if isinstance(records, TextPairs) else _sides(value, records, system)
    chosen, rejected = sides
    if chosen[:-1] != rejected[:-1]:
        shared = zip(chosen, rejected, strict=False)
        place = next((number for number, (one, other) in enumerate(shared, 1) if one != other), 0)
        what = f"they differ in message {place}" if place < min(map(len, sides)) else "one has more messages"
        raise BadRecord("different_prompts", f"chosen and rejected answer different prompts: {what}")
    if chosen[-1].content.strip() == rejected[-1].content.strip():
        raise BadRecord("equal_answers", "has the same answer as chosen and as rejected: nothing to prefer")
    return Pair(tuple(chosen[:-1]), chosen[-1], rejected[-1])


def _text_sides(value: Any, records: TextPairs, system: str | None) -> tuple[list[Message], list[Message]]:
    if isinstance(value, Mapping):
        for name in ("chosen", "rejected"):
            field = getattr(records, name).strip("{}")
            if isinstance(value.get(field), list):
                raise BadRecord("wrong_type", f"{field} is a list, not text; set records.format to chat for messages")
    shared = {"format": "completion", "prompt": records.prompt, "system": records.system}
    chosen, rejected = (
        read_conversation(value, CompletionRecords.model_validate({**shared, "completion": text}), system)
        for text in (records.chosen, records.rejected)
    )
    return chosen, rejected


def _sides(value: Any, records: ChatPairs, system: str | None) -> tuple[list[Message], list[Message]]:
    if isinstance(value, ValueError) or not isinstance(value, Mapping):
        read_conversation(value, ChatRecords(format="chat"), system)  # says what it is
    prompt = value.get(records.prompt) if records.prompt is not None else None
    if isinstance(prompt, str):
        prompt = [{records.role: "user", records.content: prompt}]
    elif prompt is not None and not isinstance(prompt, list):
        raise BadRecord("wrong_type", f"{records.prompt} is {type(prompt).__name__}, not messages or text")
    sides = []
    for field in (records.chosen, records.rejected):
        if field not in value:
            held = ", ".join(map(repr, value)) or "nothing"
            raise BadRecord("missing_field", f"has no field {field!r} but {held}")
        if isinstance(value[field], str):
            remedy = "set records.format to text, with the prompt in a field of its own"
            raise BadRecord("wrong_type", f"{field} is text, not a list of messages; {remedy}")
        listed = value[field]
        name = f"{records.prompt} + {field}" if prompt else field
        if isinstance(listed, list) and prompt:
            if not listed:
                raise BadRecord("no_messages", f"{field} is an empty list")
            listed = [*prompt, *listed]
        form = {"format": "chat", "messages": name, "role": records.role, "content": records.content}
        form_of = ChatRecords.model_validate({**form, "roles": records.roles})
        sides.append(read_conversation({name: listed}, form_of, system))
    return sides[0], sides[1]


def read_documented(
    source: InstalledDocsPairs, config: PreferencesConfig, corpus: Manifest | None, skipped: Counter[str]
) -> Iterator[tuple[str, Pair, str]]:
    """Place, pair and split of questions about installed documentation; the wrong answer is another question's.

    Args:
        source: distributions and bounds.
        config: section it stands in: fractions and seed.
        corpus: what pretraining read, or None; see `installed_docs_qa`.
        skipped: counts what was passed over, by reason.

    Raises:
        UserError: a distribution is not installed, or its files are not those that were installed.
    """
    found = read_questions(source, config.as_instructions(), corpus, skipped)
    by_split = {split: [entry for entry in found if entry.split == split] for split in SPLITS}
    for entry in found:
        other = _other_answer(entry, by_split[entry.split], config.seed)
        if other is None:
            skipped["no_other_answer"] += 1
            continue
        system = (Message("system", config.system),) if config.system is not None else ()
        question, answer = entry.messages
        yield entry.place, Pair((*system, question), answer, Message("assistant", other)), entry.split


def _other_answer(entry: QuestionAnswer, among: Sequence[QuestionAnswer], seed: int) -> str | None:
    """Another question's answer that differs from this one's, drawn by seed and place; None where all are equal."""
    first = int.from_bytes(digest(f"{seed}:{entry.place}:{entry.messages[0].content}")[:8], "little") % len(among)
    for offset in range(len(among)):
        answer = among[(first + offset) % len(among)].answer
        if answer.strip().lower() != entry.answer.strip().lower():
            return answer
    return None
