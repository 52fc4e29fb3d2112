"""Normalisation, quality filters and exact deduplication of documents, one at a time.

Everything here looks at one document and a set of digests, so memory does not grow with the length of the text:
about 100 bytes a kept document.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections import Counter
from dataclasses import dataclass
from functools import cache

import numpy as np

from modelmill.components.data.config import CorpusConfig, QualityConfig

REASONS = (
    "empty",
    "too_short",
    "too_long",
    "control_characters",
    "short_lines",
    "few_letters",
    "many_symbols",
    "repeated_lines",
    "duplicate",
    "over_cap",
)
_SPACE, _LETTER, _DIGIT, _SYMBOL, _CONTROL = range(5)
_REPLACEMENT = "\ufffd"
# Every line end becomes a newline; other control characters and byte order marks go.
_UNIFORM: dict[int, str | None] = dict.fromkeys((*range(0x09), *range(0x0E, 0x20), *range(0x7F, 0xA0), 0xFEFF))
_UNIFORM |= dict.fromkeys(map(ord, "\r\x0b\x0c\x85"), "\n")


@cache
def _character_classes() -> np.ndarray:
    """Class of every code point: one table for all documents (1.1 MB, made in a fraction of a second)."""
    kinds = {"Z": _SPACE, "L": _LETTER, "M": _LETTER, "N": _DIGIT, "P": _SYMBOL, "S": _SYMBOL}
    classes = np.full(0x110000, _CONTROL, dtype=np.uint8)
    for code in range(0x110000):
        category = unicodedata.category(chr(code))
        if category == "Cf":  # joiners and direction marks belong to the words they stand in
            classes[code] = _LETTER
        elif category not in ("Cc", "Cs"):  # unassigned and private ones may be newer signs than this Unicode table
            classes[code] = kinds.get(category[0], _SYMBOL)
    for whitespace in "\t\n\x0b\x0c\r\x85":
        classes[ord(whitespace)] = _SPACE
    classes[ord(_REPLACEMENT)] = _CONTROL
    return classes


def count_classes(text: str) -> np.ndarray:
    """Number of spaces, letters, digits, symbols and control characters (surrogates and U+FFFD too), int64 [5]."""
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
    return np.bincount(_character_classes()[codes], minlength=5)


def normalize(text: str) -> str:
    """One form for equal texts: Unicode NFC, `\\n` line ends, no control characters, no blanks at line ends.

    Lone surrogates (legal in JSON, not in UTF-8) become U+FFFD. Indentation and blank lines inside stay.
    Applying it twice changes nothing.
    """
    if _has_surrogates(text):
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    text = text.replace("\r\n", "\n").translate(_UNIFORM)
    text = unicodedata.normalize("NFC", text)
    return "\n".join(line.rstrip(" \t") for line in text.split("\n")).strip("\n")


def _has_surrogates(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False


def digest(text: str) -> bytes:
    """128-bit digest that stands for a normalised text in deduplication and splitting."""
    return hashlib.blake2b(text.encode("utf-8"), digest_size=16).digest()


def repeated_line_share(text: str) -> float:
    """Share of the characters that stand in lines which occurred before in the same text (blank lines aside)."""
    seen: set[str] = set()
    total = repeated = 0
    for line in text.split("\n"):
        line = line.strip()
        total += len(line)
        if line in seen:
            repeated += len(line)
        seen.add(line)
    return repeated / total if total else 0.0


def mean_line_length(text: str) -> float:
    """Mean number of characters of the non-blank lines."""
    lengths = [len(stripped) for line in text.split("\n") if (stripped := line.strip())]
    return sum(lengths) / len(lengths) if lengths else 0.0


def quality_problem(raw: str, text: str, limits: QualityConfig) -> str | None:
    """Reason to drop a document, or None.

    Args:
        raw: the text as read; control characters are counted here.
        text: its normalised form.
        limits: thresholds.
    """
    if count_classes(raw)[_CONTROL] > limits.max_control_share * len(raw):
        return "control_characters"
    counts = count_classes(text)
    visible = max(1, int(counts.sum() - counts[_SPACE]))
    if mean_line_length(text) < limits.min_mean_line_length:
        return "short_lines"
    if counts[_LETTER] < limits.min_letter_share * visible:
        return "few_letters"
    if counts[_SYMBOL] > limits.max_symbol_share * visible:
        return "many_symbols"
    if repeated_line_share(text) > limits.max_repeated_line_share:
        return "repeated_lines"
    return None


@dataclass(frozen=True)
class Document:
    """A document that is kept."""

    text: str
    digest: bytes
    size: int  # UTF-8 bytes


class Cleaner:
    """Decides document by document, and counts what was dropped and why in `dropped`."""

    def __init__(self, config: CorpusConfig) -> None:
        self._config = config
        self._seen: set[bytes] = set()
        self.dropped: Counter[str] = Counter(dict.fromkeys(REASONS, 0))
        self.read = 0

    def clean(self, raw: str) -> Document | None:
        """The normalised document, or None when it is dropped."""
        self.read += 1
        text = normalize(raw) if len(raw) <= self._config.max_document_length else ""
        problem = self._problem(raw, text)
        if problem is None:
            document = Document(text, digest(text), len(text.encode("utf-8")))
            if document.digest not in self._seen:
                self._seen.add(document.digest)
                return document
            problem = "duplicate"
        self.dropped[problem] += 1
        return None

    def reject(self, document: Document, reason: str) -> None:
        """Take back a document that `clean` let through: it is not kept, so a later copy of it is no duplicate."""
        self._seen.discard(document.digest)
        self.dropped[reason] += 1

    def _problem(self, raw: str, text: str) -> str | None:
        if len(raw) > self._config.max_document_length:
            return "too_long"
        if not text or text.isspace():
            return "empty"
        if len(text) < self._config.min_document_length:
            return "too_short"
        return quality_problem(raw, text, self._config.quality)


def assign_split(document: bytes, *, seed: int, validation: float, test: float) -> str:
    """Split of a document by its digest: the same text always lands in the same split, whatever surrounds it.

    Args:
        document: digest of the normalised text.
        seed: salt.
        validation: share of documents for validation.
        test: share of documents for the test.
    """
    salted = hashlib.blake2b(document, digest_size=8, salt=seed.to_bytes(8, "little")).digest()
    place = int.from_bytes(salted, "little") / 2**64
    if place < test:
        return "test"
    return "validation" if place < test + validation else "train"
