"""Question and answer pairs from the documentation of installed distributions: real data without a download.

The question names a public class or function with its signature, in one of several phrasings; the answer is the first
sentence of its documentation. Modules are read by their syntax tree and never imported (`installed_docs`).

What pretraining saw must not be asked in a test. With the corpus at hand a module's questions therefore stand in the
split its documentation stands in there; the rest is split by the same hash of the document. A held-out question whose
answer also occurs in the training text (inherited documentation is often copied) is left out.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from modelmill.components.core.manifest import Manifest
from modelmill.components.data.cleaning import assign_split, digest, normalize
from modelmill.components.data.conversations import Message
from modelmill.components.data.documents import SPLITS, read_documents
from modelmill.components.data.installed_docs import Documentation, Documented, read_documentation
from modelmill.components.data.instruction_config import InstalledDocsQuestions, InstructionsConfig

_SHORTEST = 100  # bytes of documentation that make a module worth parsing, as in a corpus
_LONGEST_SIGNATURE = 160
_FUNCTION_QUESTIONS = (
    "What does `{signature}` in the module `{module}` do?",
    "Explain in one sentence what `{name}` does:\n\n{signature}",
    "Which purpose does the function `{name}` serve?\n\n{signature}",
    "I came across this in `{module}`:\n\n{signature}\n\nWhat does it do?",
)
_CLASS_QUESTIONS = (
    "What is `{signature}` in the module `{module}`?",
    "Explain in one sentence what `{name}` is:\n\n{signature}",
    "What is the class `{name}` for?\n\n{signature}",
    "I came across this in `{module}`:\n\n{signature}\n\nWhat is it?",
)
_ABBREVIATION = re.compile(r"(?:\b(?i:e\.g|i\.e|etc|vs|cf|resp|approx|al|fig|eq|ref|sec|no)|\b[A-Z])$")
_SENTENCE_END = re.compile(r"[.!?](?=\s|$)")
# Markup, examples, and lists of arguments: the beginning of a documentation string need not be a sentence.
_NO_SENTENCE = re.compile(
    r"^(?:[:>.@*#|=+-]|\w+(?:\.\w+)* ?\(|(?i:args|arguments|parameters|returns?|examples?|notes?|usage|todo)\b *:)"
    r"|::|[=~^-]{4}|\*optional\*"
)


@dataclass(frozen=True)
class QuestionAnswer:
    """A pair: the conversation, where it comes from and the split it belongs to."""

    place: str
    messages: tuple[Message, Message]
    split: str

    @property
    def answer(self) -> str:
        return self.messages[1].content


def read_questions(
    source: InstalledDocsQuestions, config: InstructionsConfig, corpus: Manifest | None, skipped: Counter[str]
) -> list[QuestionAnswer]:
    """Pairs of the source, in the order in which a corpus reads the same documentation.

    Args:
        source: distributions and bounds.
        config: section it stands in: fractions and seed of the split.
        corpus: what pretraining read, or None.
        skipped: counts what was passed over, by reason.

    Raises:
        UserError: a distribution is not installed, or its files are not those that were installed.
    """
    known = _corpus_splits(corpus) if corpus is not None else {}
    pairs: list[QuestionAnswer] = []
    for document in read_documentation(source.distributions, _SHORTEST, skipped):
        name = digest(normalize(document.text))
        split = known.get(name) or assign_split(
            name, seed=config.seed, validation=config.validation_fraction, test=config.test_fraction
        )
        pairs.extend(_pairs_of(document, split, source, skipped))
        if len(pairs) >= source.max_records:
            break
    return _held_out(pairs[: source.max_records], corpus, skipped)


def _corpus_splits(corpus: Manifest) -> dict[bytes, str]:
    """Split of each document of a corpus by its digest."""
    return {
        digest(text): split
        for split in SPLITS
        for batch in read_documents(corpus.path(f"{split}.arrow"))
        for text in batch
    }


def _held_out(pairs: list[QuestionAnswer], corpus: Manifest | None, skipped: Counter[str]) -> list[QuestionAnswer]:
    """Pairs without the held-out ones whose answer stands in the training text or, for validation, in the test."""
    seen = {_fingerprint(pair.answer) for pair in pairs if pair.split == "train"}
    if corpus is not None:
        for batch in read_documents(corpus.path("train.arrow")):
            for text in batch:
                seen.update(_fingerprint(summary_sentence(part)) for part in text.split("\n\n"))
    tested = {_fingerprint(pair.answer) for pair in pairs if pair.split == "test"}
    kept = []
    for pair in pairs:
        answer = _fingerprint(pair.answer)
        if pair.split != "train" and (answer in seen or (pair.split == "validation" and answer in tested)):
            skipped["answer_in_other_split"] += 1
        else:
            kept.append(pair)
    return kept


def _fingerprint(sentence: str) -> bytes:
    """64-bit digest of a sentence, whatever its case and punctuation."""
    return hashlib.blake2b(re.sub(r"\W+", " ", sentence.lower()).strip().encode(), digest_size=8).digest()


def _pairs_of(
    document: Documentation, split: str, source: InstalledDocsQuestions, skipped: Counter[str]
) -> Iterator[QuestionAnswer]:
    if any(part.startswith("_") for part in document.module.split(".")):
        return
    for entry in document.entries:
        if entry.kind == "module" or any(part.startswith("_") for part in entry.name.split(".")):
            continue
        answer = summary_sentence(entry.text)
        if not source.min_answer_length <= len(answer) <= source.max_answer_length:
            skipped["answer_length"] += 1
        elif _NO_SENTENCE.search(answer) or len(answer.split()) < 3:
            skipped["no_sentence"] += 1
        else:
            question = _question(document.module, entry)
            place = f"installed-docs-qa {document.module}.{entry.name}"
            yield QuestionAnswer(place, (Message("user", question), Message("assistant", answer)), split)


def _question(module: str, entry: Documented) -> str:
    signature = entry.signature
    if len(signature) > _LONGEST_SIGNATURE:
        signature = signature[:_LONGEST_SIGNATURE] + "..."
    name = f"{module}.{entry.name}"
    phrasings = _CLASS_QUESTIONS if entry.kind == "class" else _FUNCTION_QUESTIONS
    chosen = int.from_bytes(digest(f"{name}{entry.signature}")[:8], "little") % len(phrasings)
    return phrasings[chosen].format(name=name, module=module, signature=signature)


def summary_sentence(text: str) -> str:
    """First sentence of a documentation string on one line; without an end mark, its first paragraph (PEP 257)."""
    paragraph = " ".join(normalize(text).strip().partition("\n\n")[0].split())
    for end in _SENTENCE_END.finditer(paragraph):
        if not _ABBREVIATION.search(paragraph[: end.start()]):
            return paragraph[: end.end()]
    return paragraph
