"""Normalisation, quality filters, deduplication and the split."""

from __future__ import annotations

import random
import time
import unicodedata
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelmill.components.data.cleaning import (
    REASONS,
    Cleaner,
    assign_split,
    count_classes,
    digest,
    mean_line_length,
    normalize,
    repeated_line_share,
)
from modelmill.components.data.config import CorpusConfig

PROSE = "The quick brown fox jumps over the lazy dog and runs away from it. " * 3
CODE = '''def solve(a, b, *, overwrite_a=False):
    """Solve ``a @ x == b`` for x.

    Parameters
    ----------
    a : (M, M) array_like
        Square matrix, see [1]_.

    >>> x = np.linalg.solve(a, b); np.allclose(np.dot(a, x), b)
    True
    """
    return lapack.gesv(a, b, overwrite_a=overwrite_a)[-1]
'''
anything = st.text(st.characters(exclude_categories=()))  # surrogates too, as JSON may hold them


def cleaner(**values: Any) -> Cleaner:
    source = {"type": "installed-docs"}
    return Cleaner(CorpusConfig.model_validate({"source": source, "min_document_length": 1} | values))


def verdict(text: str, **values: Any) -> str:
    """Reason for which a text is dropped, or `kept`."""
    judge = cleaner(**values)
    document = judge.clean(text)
    reasons = [reason for reason, count in judge.dropped.items() if count]
    assert (document is None) == (len(reasons) == 1)
    return reasons[0] if reasons else "kept"


@given(anything)
def test_normalising_twice_changes_nothing(text: str) -> None:
    once = normalize(text)
    assert normalize(once) == once
    once.encode("utf-8")
    assert unicodedata.is_normalized("NFC", once)
    assert not any(unicodedata.category(sign) == "Cc" and sign not in "\n\t" for sign in once)
    assert not any(line.endswith((" ", "\t")) for line in once.split("\n"))


@given(st.lists(st.text(st.characters(categories=["L", "N", "P"]), min_size=1), min_size=1))
def test_line_ends_do_not_matter(lines: list[str]) -> None:
    unix = "\n".join(lines)
    assert normalize("\r\n".join(lines)) == normalize("\r".join(lines)) == normalize(unix)
    assert normalize("\ufeff" + " \n".join(lines) + "\n\n") == normalize(unix)


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        ("cafe\u0301", "café"),
        ("a\x00b\x07c", "abc"),
        ("\n\n    indented\n\n\n  code  \n", "    indented\n\n\n  code"),
        ("page\x0cpage\x85line", "page\npage\nline"),
        ("lone \ud83d surrogate", "lone \ufffd surrogate"),
        ("pair \ud83d\ude00", "pair 😀"),
        ("zero\u200dwidth ﬁ", "zero\u200dwidth ﬁ"),  # NFC, not NFKC: nothing that carries meaning is folded
    ],
)
def test_normal_forms(raw: str, text: str) -> None:
    assert normalize(raw) == text


def test_long_runs_of_blanks_take_linear_time() -> None:
    text = ("word" + " " * 500_000 + "x") * 4
    began = time.perf_counter()
    verdict(text)
    assert time.perf_counter() - began < 5


@given(anything)
def test_every_character_has_one_class(text: str) -> None:
    assert count_classes(text).sum() == len(text)


@pytest.mark.parametrize(
    "text",
    [
        PROSE,
        CODE,
        "देवनागरी लिपि में लिखी हिन्दी भाषा का एक छोटा सा वाक्य यहाँ दिया गया है ताकि मात्राएँ गिनी जाएँ।" * 2,
        "春眠不覺曉\n處處聞啼鳥\n夜來風雨聲\n花落知多少\n" * 1,
        "هذا نص عربي قصير يستخدم لاختبار المرشحات اللغوية المحايدة في هذا المشروع." * 2,
        "Ціна: 1 250,00 грн; знижка 15 % до 31.12.2025 року включно.",
    ],
)
def test_defaults_keep_prose_and_code_in_any_script(text: str) -> None:
    assert verdict(text) == "kept"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "empty"),
        (" \n\t\n\u2003", "empty"),
        (PROSE + "\x00" * 20, "control_characters"),
        (PROSE + "\ufffd" * 20, "control_characters"),
        ("a\nb\nc\nd\ne\nf\n" * 20, "short_lines"),
        ("1.0 2.5 3.75 19.125\n0.1 0.22 0.333 12\n" * 20, "few_letters"),
        ("abcdefgh ---=== ***+++ ###~~~ |||" * 5, "few_letters"),
        ("abcdefg -=+*# ||" * 20, "many_symbols"),
        ("subscribe to our newsletter\n" * 10, "repeated_lines"),
    ],
)
def test_each_filter_names_its_reason(text: str, reason: str) -> None:
    quality = {"min_letter_share": 0.4, "max_symbol_share": 0.4 if reason == "many_symbols" else 0.9}
    assert verdict(text, quality=quality) == reason


def test_lengths_are_limits_of_what_is_kept() -> None:
    text = "abcde fghij klmno"
    assert verdict(text, min_document_length=len(text), max_document_length=len(text)) == "kept"
    assert verdict(text, min_document_length=len(text) + 1) == "too_short"
    assert verdict(text, max_document_length=len(text) - 1) == "too_long"


def test_measures_of_lines() -> None:
    assert repeated_line_share("one\ntwo\n one\n\n\ntwo") == 0.5
    assert repeated_line_share("") == 0
    assert mean_line_length("  four\n\n\nsixsix\n") == 5


def test_equal_after_normalisation_is_a_duplicate() -> None:
    judge = cleaner()
    kept = [
        judge.clean(text) for text in (PROSE + "café", PROSE + "cafe\u0301", PROSE + "café  \r\n", PROSE + "cafés")
    ]
    assert [document is not None for document in kept] == [True, False, False, True]
    assert judge.dropped["duplicate"] == 2
    assert judge.read == 4


def test_a_document_taken_back_is_no_duplicate_later() -> None:
    judge = cleaner()
    document = judge.clean(PROSE)
    assert document is not None
    judge.reject(document, "over_cap")
    assert judge.clean(PROSE) == document
    assert set(judge.dropped) == set(REASONS)


def test_split_depends_on_text_and_seed_only() -> None:
    texts = [f"{PROSE} {number}" for number in range(4000)]
    splits = {text: assign_split(digest(text), seed=7, validation=0.1, test=0.05) for text in texts}
    random.Random(0).shuffle(texts)
    assert all(assign_split(digest(text), seed=7, validation=0.1, test=0.05) == splits[text] for text in texts)
    counts = {name: list(splits.values()).count(name) for name in ("train", "validation", "test")}
    assert abs(counts["validation"] - 400) < 80  # four standard deviations
    assert abs(counts["test"] - 200) < 56
    other = [assign_split(digest(text), seed=8, validation=0.1, test=0.05) for text in splits]
    assert other != list(splits.values())


def test_growing_one_split_moves_documents_only_out_of_training() -> None:
    for number in range(500):
        key = digest(str(number))
        small = assign_split(key, seed=0, validation=0.1, test=0.1)
        large = assign_split(key, seed=0, validation=0.3, test=0.1)
        assert large == small or (small, large) == ("train", "validation")
