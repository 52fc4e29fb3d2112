"""A tokenizer as instruction data needs it: its encoder with exact offsets, its special tokens, its chat template."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from tokenizers import Encoding, Tokenizer

from modelmill.components.core.errors import UserError
from modelmill.components.core.manifest import Manifest
from modelmill.components.data.conversations import BadRecord, Message
from modelmill.components.data.tokenizer import vocabulary_size

# What AutoTokenizer may read; of an exported model's folder the weights stay untouched.
_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "config.json",
)


@dataclass(frozen=True)
class TokenizerFiles:
    """A loaded tokenizer.

    Attributes:
        name: where it came from, for messages.
        encoder: without truncation, padding and post-processing, so that offsets are exact.
        bos, eos, pad: texts of these tokens; None where there is none.
        adds_bos: whether the tokenizer begins a text with its start token.
        special_tokens: names of roles (`bos_token`, ...) to texts, as chat templates use them.
        special_pattern: matches every special token.
        chat_template: Jinja, or None.
    """

    name: str
    encoder: Tokenizer
    bos: str
    eos: str | None
    pad: str | None
    adds_bos: bool
    special_tokens: dict[str, str]
    special_pattern: re.Pattern[str]
    chat_template: str | None

    @property
    def vocab_size(self) -> int:
        return vocabulary_size(self.encoder)

    def id_of(self, token: str | None) -> int | None:
        """Id of a token, or None where there is none."""
        return None if token is None else self.encoder.token_to_id(token)

    def ends_specially(self, text: str) -> bool:
        """Whether a text ends in a special token, blanks behind it aside."""
        ends = [match.end() for match in self.special_pattern.finditer(text)]
        return bool(ends) and not text[ends[-1] :].strip()

    def check(self, messages: Sequence[Message]) -> None:
        """Refuse messages that spell a special token: the text would be read as the template's own.

        Raises:
            BadRecord: one does.
        """
        for number, message in enumerate(messages):
            found = self.special_pattern.search(message.content)
            if found:
                raise BadRecord("special_token", f"message {number + 1} spells the special token {found.group()!r}")


def load_tokenizer(manifest: Manifest) -> TokenizerFiles:
    """The tokenizer of a `train_tokenizer` artifact or of an exported model.

    Raises:
        UserError: there is none, or it cannot be loaded.
    """
    held = [PurePosixPath(entry.path) for entry in manifest.files]
    found = sorted((path for path in held if path.name == "tokenizer.json"), key=lambda path: len(path.parts))
    if not found:
        raise UserError(f"tokenizer: {manifest.uri} holds no tokenizer.json; give a tokenizer or an exported model")
    for name in _FILES:
        if found[0].with_name(name) in held:
            manifest.path(found[0].with_name(name).as_posix())  # verified
    return _load(manifest.path(found[0].as_posix()).parent)


def _load(folder: Path) -> TokenizerFiles:
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        encoder = Tokenizer.from_str(loaded.backend_tokenizer.to_str())
    except Exception as error:  # whatever a damaged folder makes transformers raise
        reason = f"{type(error).__name__}: {error}"[:300]
        raise UserError(f"tokenizer: {folder} cannot be loaded ({reason}); check the folder") from None
    encoder.no_truncation()
    encoder.no_padding()
    begins = encoder.encode("").ids[:1] == [loaded.bos_token_id] and loaded.bos_token_id is not None
    # It adds special tokens, which templates write themselves, and trims blanks off the offsets. Ids stay the same.
    encoder.post_processor = None
    special = {token.content for token in encoder.get_added_tokens_decoder().values() if token.special}
    special |= {token for token in (loaded.bos_token, loaded.eos_token, loaded.pad_token) if token}
    longest_first = sorted(special, key=lambda token: (-len(token), token))
    template = loaded.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    return TokenizerFiles(
        name=str(folder),
        encoder=encoder,
        bos=loaded.bos_token or "",
        eos=loaded.eos_token,
        pad=loaded.pad_token,
        adds_bos=begins,
        special_tokens={
            name: str(token) for name, token in loaded.special_tokens_map.items() if isinstance(token, str)
        },
        special_pattern=re.compile("|".join(map(re.escape, longest_first)) or "(?!)"),
        chat_template=template,
    )


def span_mask(encoding: Encoding, spans: Sequence[tuple[int, int]]) -> np.ndarray:
    """Which tokens hold a character of the spans: bool [tokens].

    All tokens from the one with a span's first character to the last one with its last. As transformers'
    `return_assistant_tokens_mask` has it, which however gives up where offsets leave blanks out, and leaves out all
    but the first token of a last character that takes several.
    """
    mask = np.zeros(len(encoding), bool)
    for start, end in spans:
        first = last = None
        for position in range(start, end):  # a tokenizer may drop characters, such as blanks
            first = encoding.char_to_token(position)
            if first is not None:
                break
        for position in range(end - 1, start - 1, -1):
            last = encoding.char_to_token(position)
            if last is not None:
                break
        if first is None or last is None:
            continue
        mask[first : last + 1] = True
        for token in range(last + 1, len(encoding)):  # a character of several tokens is found by its first
            begin, _ = encoding.token_to_chars(token) or (end, end)
            if begin >= end:
                break
            mask[token] = True
    return mask
