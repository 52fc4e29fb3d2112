"""How many bytes of a text its first tokens stand for: what turns a loss per token into bits per byte."""

from __future__ import annotations

import json

from tokenizers import Tokenizer


class TokenBytes:
    """Byte accounting of one tokenizer.

    For byte-level BPE it is exact: each character of a token's name is one byte. Other tokenizers report which
    characters a token covers, so a cut inside a character that was split into byte tokens counts the whole character.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.exact = _is_byte_level(tokenizer)
        self._added = {number: token.content for number, token in tokenizer.get_added_tokens_decoder().items()}

    def prefix(self, text: str, tokens: int) -> int:
        """UTF-8 bytes of `text` that its first `tokens` tokens stand for; all of them from its last token on."""
        encoded = self._tokenizer.encode(text, add_special_tokens=False)
        if tokens >= len(encoded.ids):
            return len(text.encode("utf-8"))
        if tokens <= 0:
            return 0
        if self.exact:
            pairs = zip(encoded.ids[:tokens], encoded.tokens[:tokens], strict=True)
            return sum(self._size(number, name) for number, name in pairs)
        end = max(end for _, end in encoded.offsets[:tokens])
        return len(text[:end].encode("utf-8"))

    def _size(self, number: int, name: str) -> int:
        content = self._added.get(number)
        return len(name) if content is None else len(content.encode("utf-8"))


def _is_byte_level(tokenizer: Tokenizer) -> bool:
    """Whether tokens are spelled in the byte alphabet and nothing is added to or taken from the text."""
    layout = json.loads(tokenizer.to_str())
    steps = layout["pre_tokenizer"] or {}
    steps = steps.get("pretokenizers", [steps])
    byte_level = [step for step in steps if step.get("type") == "ByteLevel"]
    return layout["normalizer"] is None and bool(byte_level) and not any(s["add_prefix_space"] for s in byte_level)
