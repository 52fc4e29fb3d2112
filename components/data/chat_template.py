"""Conversations as text, with the characters that the model has to write itself.

Chat templates are Jinja, rendered by transformers in its sandbox: a template comes with a download and is not trusted.
A template that marks the assistant's part with `{% generation %}` says itself what is learnt. Of any other the text
before and after each of the assistant's turns is compared: what a turn adds to the text behind the generation prompt,
up to its end-of-turn token and the line end behind it, is what the model has to write.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

from modelmill.components.core.errors import UserError
from modelmill.components.data.conversations import BadRecord, Message
from modelmill.components.data.files import template_path
from modelmill.components.data.instruction_config import InstructionsConfig, JinjaTemplate, PromptTemplate
from modelmill.components.data.tokenizer_files import TokenizerFiles

_PARAMETER = "instructions.template"
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Rendered:
    """A conversation as text, and the [start, end) character ranges that the model has to write, in order."""

    text: str
    spans: tuple[tuple[int, int], ...]


class ConversationTemplate(Protocol):
    """Writes conversations out."""

    def render(self, messages: Sequence[Message]) -> Rendered:
        """The text of a conversation with the assistant's parts.

        Raises:
            BadRecord: the conversation does not fit the template.
        """

    def prompt(self, messages: Sequence[Message]) -> str:
        """The text after which the model writes its next turn.

        Raises:
            BadRecord: the conversation does not fit the template.
        """

    def describe(self) -> dict[str, Any]:
        """What another step needs to write prompts in the same way; `open_template` reads it."""


def make_template(config: InstructionsConfig, tokenizer: TokenizerFiles) -> ConversationTemplate:
    """The template a recipe asks for.

    Raises:
        UserError: the tokenizer has no chat template, or the one given cannot be used.
    """
    chosen = config.template
    if isinstance(chosen, PromptTemplate):
        if tokenizer.eos is None:
            raise UserError(f"{_PARAMETER}.kind: prompt needs an end-of-text token and {tokenizer.name} declares none")
        return PromptText(chosen.text, tokenizer.bos if tokenizer.adds_bos else "", tokenizer.eos)
    if isinstance(chosen, JinjaTemplate):
        text = chosen.text
        if chosen.path is not None:
            path = template_path(chosen.path)
            try:
                text = path.read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise UserError(f"{_PARAMETER}.path: {path} is not UTF-8 at byte {error.start}; convert it") from None
        source = str(text)
    elif tokenizer.chat_template is None:
        remedy = "give one with template.kind jinja, or a plain text with template.kind prompt"
        raise UserError(f"{_PARAMETER}.kind: tokenizer, but {tokenizer.name} has no chat template; {remedy}")
    else:
        source = tokenizer.chat_template
    return ChatTemplate(source, chosen.variables, tokenizer)


def open_template(description: dict[str, Any], tokenizer: TokenizerFiles) -> ConversationTemplate:
    """The template of a prepared data set, from `metadata["template"]` of its manifest."""
    if description["kind"] == "prompt":
        return PromptText(description["text"], description["bos"], description["eos"])
    return ChatTemplate(description["text"], description["variables"], tokenizer)


class PromptText:
    """One prompt and its completion in a plain text, between the start and the end-of-text token.

    Args:
        text: with `{prompt}`, `{completion}` at its end and perhaps `{system}`.
        bos: start-of-text token; empty where the tokenizer does not begin texts with one.
        eos: end-of-text token.
    """

    def __init__(self, text: str, bos: str, eos: str) -> None:
        self._text, self._bos, self._eos = text, bos, eos

    def render(self, messages: Sequence[Message]) -> Rendered:
        answers = [message for message in messages if message.role == "assistant"]
        if len(answers) != 1:
            raise BadRecord("several_turns", f"has {len(answers)} turns of the assistant; a prompt text takes one")
        prompt = self.prompt(messages[:-1])
        text = prompt + answers[0].content + self._eos
        return Rendered(text, ((len(prompt), len(text)),))

    def prompt(self, messages: Sequence[Message]) -> str:
        roles = [message.role for message in messages]
        if roles not in (["user"], ["system", "user"]):
            raise BadRecord("several_turns", f"has turns of {', '.join(roles)}; a prompt text takes one of the user")
        system = messages[0].content if len(messages) > 1 else None
        if system is not None and "{system}" not in self._text:
            raise BadRecord("content_lost", "has a system message, and the prompt text has no place for {system}")
        if system is None and "{system}" in self._text:
            raise BadRecord("no_system", "has no system message for {system}; set instructions.system")
        parts = {"system": system or "", "prompt": messages[-1].content, "completion": ""}
        return self._bos + self._text.format(**parts)

    def describe(self) -> dict[str, Any]:
        return {"kind": "prompt", "text": self._text, "bos": self._bos, "eos": self._eos}


class ChatTemplate:
    """A Jinja chat template.

    Args:
        text: the template.
        variables: values it reads besides the messages.
        tokenizer: whose special tokens it writes.

    Raises:
        UserError: it is not valid Jinja, or writes the date of the day.
    """

    def __init__(self, text: str, variables: dict[str, Any], tokenizer: TokenizerFiles) -> None:
        from jinja2.exceptions import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        self._template, self._variables, self._tokenizer = text, variables, tokenizer
        self._render_jinja: Any = render_jinja_template  # annotated to return text, it returns (texts, spans)
        self._refusals = (TemplateError, TypeError, ValueError)
        self._marked = _GENERATION.search(text) is not None
        self._written = lru_cache(maxsize=8)(self._write)  # the turns of a conversation share what was before them
        if "strftime_now" in text and "date_string" not in variables:
            fix = "set template.variables.date_string (such as '26 Jul 2024'), or give a jinja template without it"
            raise UserError(
                f"{_PARAMETER}: writes the date of the day, so no two days would give the same data; {fix}"
            )
        try:
            self._render_jinja([[{"role": "user", "content": "x"}]], chat_template=text, **self._context())
        except self._refusals as error:
            if type(error).__name__ == "TemplateSyntaxError":
                line = getattr(error, "lineno", 0)
                raise UserError(f"{_PARAMETER}: is not valid Jinja in line {line} ({error}); mend it") from None

    def _context(self) -> dict[str, Any]:
        return {**self._tokenizer.special_tokens, **self._variables}

    def _write(self, messages: tuple[Message, ...], generation_prompt: bool) -> str:
        if not messages:
            return ""
        chat = [message.as_dict() for message in messages]
        try:
            texts, _ = self._render_jinja(
                [chat], chat_template=self._template, add_generation_prompt=generation_prompt, **self._context()
            )
        except self._refusals as error:
            raise BadRecord("template", f"is refused by the chat template: {error}") from None
        return texts[0]

    def prompt(self, messages: Sequence[Message]) -> str:
        return self._write(tuple(messages), True)

    def describe(self) -> dict[str, Any]:
        return {"kind": "chat", "text": self._template, "variables": self._variables}

    def render(self, messages: Sequence[Message]) -> Rendered:
        messages = tuple(messages)
        rendered = self._render_marked(messages) if self._marked else self._render_compared(messages)
        answers = [message.content for message in messages if message.role == "assistant"]
        # A template's own marks may leave turns out or cut them into parts: then all there is to ask is the text.
        written = [rendered.text[start:end] for start, end in rendered.spans]
        for number, content in enumerate(answers, 1):
            place = written[number - 1] if len(written) == len(answers) else rendered.text
            if content.strip() not in place:
                what = f"turn {number} of the assistant is not in the text as it is"
                raise BadRecord("content_lost", f"{what}: the chat template changes or drops it ({content[:40]!r})")
        return rendered

    def _render_marked(self, messages: tuple[Message, ...]) -> Rendered:
        try:
            texts, spans = self._render_jinja(
                [[message.as_dict() for message in messages]],
                chat_template=self._template,
                return_assistant_tokens_mask=True,
                **self._context(),
            )
        except self._refusals as error:
            raise BadRecord("template", f"is refused by the chat template: {error}") from None
        return Rendered(texts[0], tuple((start, end) for start, end in spans[0] if end > start))

    def _render_compared(self, messages: tuple[Message, ...]) -> Rendered:
        text = self._written(messages, False)
        spans: list[tuple[int, int]] = []
        for number, message in enumerate(messages):
            if message.role != "assistant":
                continue
            before, after = self._written(messages[:number], False), self._written(messages[: number + 1], False)
            start, end = self._turn(messages[:number], message, before, after)
            if not text.startswith(after):  # the template writes a turn differently once others follow it
                start, end = self._moved(text, after, (len(before), start, end), spans[-1][1] if spans else 0, message)
            spans.append((start, end))
        return Rendered(text, tuple(spans))

    def _turn(self, prior: tuple[Message, ...], answer: Message, before: str, after: str) -> tuple[int, int]:
        """Where a turn that stands last begins and ends: behind the generation prompt, with its end-of-turn token."""
        prompted = self._written(prior, True)
        if after.startswith(prompted):
            start = len(prompted)
        elif after.startswith(before):
            # The generation prompt goes further than the turn does (DeepSeek-R1 adds <think>): what they share.
            shared = _common_length(prompted, after)
            opened = [match.end() for match in self._tokenizer.special_pattern.finditer(after, len(before), shared)]
            content = after.find(answer.content.strip(), opened[-1] if opened else len(before))
            if content < 0:
                what = f"turn {len(prior) + 1} is not in the text as it is: the chat template changes or drops it"
                raise BadRecord("content_lost", f"{what} ({answer.content[:40]!r})")
            start = min(shared, content)
        else:
            problem = f"cannot be masked: turn {len(prior) + 1} changes the text before it"
            raise BadRecord("template", f"{problem}; give a template with {{% generation %}}")
        return start, len(after)

    def _moved(
        self, text: str, after: str, turn: tuple[int, int, int], cursor: int, answer: Message
    ) -> tuple[int, int]:
        """The place in the whole text of a turn known from the text in which it stands last.

        It is where its header comes next, its content follows and then one of its own special tokens: messages cannot
        spell these (`TokenizerFiles.check`), so nothing else looks like it.
        """
        begin, start, end = turn
        pattern, content = self._tokenizer.special_pattern, answer.content.strip()
        opened = [match.span() for match in pattern.finditer(after[:start])]
        own = set(pattern.findall(after[start:end]))
        if opened:
            begin = min(begin, opened[-1][0])
            header = after[begin:start]
            line = header.find("\n", opened[-1][1] - begin)
            shared = header[: line + 1] if line >= 0 else header  # what follows may be for the last turn only
            place = text.find(shared, cursor)
            first = place + len(header if text.startswith(header, max(place, 0)) else shared)
            said = text.find(content, first) if place >= 0 else -1
            rest = text[said + len(content) :] if said >= 0 else ""
            closing = pattern.match(rest, len(rest) - len(rest.lstrip()))
            if closing and closing.group() in own and own.issuperset(pattern.findall(text[first:said])):
                # The blanks that follow this token in the last turn, where another may close the whole text behind it.
                *_, ended = (match for match in pattern.finditer(after, start) if match.group() == closing.group())
                stop, behind = said + len(content) + closing.end(), after[ended.end() :]
                blank = behind[: len(behind) - len(behind.lstrip())]
                return first, stop + len(blank) * text.startswith(blank, stop)
        problem = f"cannot be masked: the turn {content[:40]!r} is written differently when others follow"
        raise BadRecord("template", f"{problem}; give a template with {{% generation %}}")


def _common_length(one: str, other: str) -> int:
    """Characters that two texts begin with alike."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))
