"""Conversations: what a record of instruction data must hold, checked field by field.

Whatever form a record has (messages, or a prompt with its completion), it becomes a list of messages. What is wrong
with one is told by a `BadRecord` with a short reason to count and a sentence that names the field.
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from modelmill.components.core.manifest import canonical_json
from modelmill.components.data.cleaning import digest
from modelmill.components.data.instruction_config import ChatRecords, CompletionRecords, Role

_ROLES = get_args(Role)


class BadRecord(Exception):
    """A record that cannot be learnt from.

    Attributes:
        reason: one word to count it under.
    """

    def __init__(self, reason: str, problem: str) -> None:
        super().__init__(" ".join(problem.split()))
        self.reason = reason


@dataclass(frozen=True)
class Message:
    """One turn of a conversation: `role` is system, user, assistant or tool."""

    role: str
    content: str

    def as_dict(self) -> dict[str, str]:
        """The form chat templates and JSON lines have."""
        return {"role": self.role, "content": self.content}


def content_digest(messages: Sequence[Message]) -> bytes:
    """128-bit digest of a whole conversation: equal ones are duplicates."""
    return digest(canonical_json([[message.role, message.content] for message in messages]))


def prompt_digest(messages: Sequence[Message]) -> bytes:
    """128-bit digest of what is said before the assistant's first turn, the system message aside.

    Splits go by it: a question that occurs with two answers, or under two system messages, is in one split only.
    """
    first = next(number for number, message in enumerate(messages) if message.role == "assistant")
    asked = [[message.role, message.content] for message in messages[:first] if message.role != "system"]
    return digest(canonical_json(asked))


def read_conversation(value: Any, records: ChatRecords | CompletionRecords, system: str | None) -> list[Message]:
    """Messages of a record.

    Args:
        value: the record: a dictionary, anything else that JSON holds, or the `ValueError` of a line that is no JSON.
        records: how it holds its conversation.
        system: content of the system message of conversations without one; None adds none.

    Raises:
        BadRecord: the record does not have that form, or there is nothing to learn in it.
    """
    if isinstance(value, ValueError):
        raise BadRecord("not_json", f"is not JSON ({value})")
    if not isinstance(value, Mapping):
        raise BadRecord("wrong_type", f"is a {type(value).__name__}, not an object with fields")
    messages = _read_messages(value, records) if isinstance(records, ChatRecords) else _read_completion(value, records)
    if system is not None and all(message.role != "system" for message in messages):
        messages.insert(0, Message("system", system))
    _check_turns(messages)
    return messages


def _field(record: Mapping[str, Any], name: str, place: str = "") -> Any:
    if name not in record:
        held = ", ".join(map(repr, record)) or "nothing"
        raise BadRecord("missing_field", f"{place}has no field {name!r} but {held}")
    return record[name]


def _text(value: Any, place: str) -> str:
    if not isinstance(value, str):
        kind = "null" if value is None else type(value).__name__
        raise BadRecord("wrong_type", f"{place} is {kind}, not text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise BadRecord("not_unicode", f"{place} holds half a surrogate pair, which no text has") from None
    return value


def _read_messages(record: Mapping[str, Any], records: ChatRecords) -> list[Message]:
    listed = _field(record, records.messages)
    if not isinstance(listed, list):
        raise BadRecord("wrong_type", f"{records.messages} is {type(listed).__name__}, not a list of messages")
    messages = []
    for number, given in enumerate(listed):
        place = f"{records.messages}[{number}]"
        if not isinstance(given, Mapping):
            raise BadRecord(
                "wrong_type", f"{place} is {type(given).__name__}, not an object with a role and a content"
            )
        named = _text(_field(given, records.role, f"{place} "), f"{place}.{records.role}")
        role = records.roles.get(named, named)
        if role not in _ROLES:
            known = ", ".join([*_ROLES, *records.roles])
            raise BadRecord("unknown_role", f"{place}.{records.role}: {named!r} is none of {known}")
        if given.get("tool_calls"):
            raise BadRecord("tool_calls", f"{place} calls tools; only what stands in {records.content} can be learnt")
        content = _text(_field(given, records.content, f"{place} "), f"{place}.{records.content}")
        if not content.strip():
            raise BadRecord("empty_content", f"{place}.{records.content} is empty")
        messages.append(Message(role, content))
    if not messages:
        raise BadRecord("no_messages", f"{records.messages} is an empty list")
    return messages


def _read_completion(record: Mapping[str, Any], records: CompletionRecords) -> list[Message]:
    parts = [("system", "system", records.system), ("prompt", "user", records.prompt)]
    messages = []
    for name, role, text in [*parts, ("completion", "assistant", records.completion)]:
        if text is None:
            continue
        content = _filled(text, record)
        if content:
            messages.append(Message(role, content))
        elif name != "system":
            raise BadRecord("empty_content", f"{name} ({text!r}) is empty")
    return messages


def _filled(text: str, record: Mapping[str, Any]) -> str:
    """A text with the record's fields in the places of their names, stripped."""
    pieces = []
    for literal, name, _, _ in string.Formatter().parse(text):
        pieces.append(literal)
        if name is not None:
            value = _field(record, name)
            pieces.append("" if value is None else _text(value, name))
    return "".join(pieces).strip()


def _check_turns(messages: Sequence[Message]) -> None:
    roles = [message.role for message in messages]
    if "assistant" not in roles:
        raise BadRecord("no_assistant", f"has no turn of the assistant but only {', '.join(roles)}: nothing to learn")
    if "user" not in roles[: roles.index("assistant")]:
        raise BadRecord("no_prompt", "has no turn of the user before the assistant's first")
    if roles[-1] != "assistant":
        raise BadRecord("assistant_not_last", f"ends with a turn of the {roles[-1]}, which nothing answers")
    if "system" in roles[1:]:
        raise BadRecord("system_not_first", f"has a system message as number {roles.index('system', 1) + 1}")
