"""chrF against `sacrebleu` to the last digit; exact match and token F1 against cases worked out by hand."""

from __future__ import annotations

import random
from pydoc_data.topics import topics

import pytest
from sacrebleu.metrics import CHRF

from modelmill.components.evaluation.text_metrics import (
    best_chrf_counts,
    chrf,
    chrf_counts,
    corpus_chrf,
    exact_match,
    token_f1,
)

DOCUMENTS = [text for _, text in sorted(topics.items())]


def examples(count: int, references: int | None = None) -> list[tuple[list[str], str]]:
    generator = random.Random(count)

    def text() -> str:
        if generator.random() < 0.5:
            return "".join(generator.choices("aab (.,)日é\n\u3000", k=generator.randint(0, 30)))
        document = generator.choice(DOCUMENTS)
        begin = generator.randint(0, len(document))
        return document[begin : begin + generator.randint(0, 300)]

    found = []
    for _ in range(count):
        prediction = text()
        words = prediction.split(" ")
        answers = [text() for _ in range(references or generator.randint(1, 3))]
        answers[0] = " ".join(word for word in words if generator.random() < 0.8) or answers[0]
        found.append((answers, prediction))
    return found


@pytest.mark.parametrize("plus_plus", [False, True])
def test_chrf_is_that_of_sacrebleu(plus_plus: bool) -> None:
    theirs = CHRF(word_order=2 if plus_plus else 0)
    for references, prediction in examples(300):
        counts = best_chrf_counts(chrf_counts(references, prediction), plus_plus=plus_plus)
        assert chrf(counts, plus_plus=plus_plus) == theirs.sentence_score(prediction, references).score


@pytest.mark.parametrize("plus_plus", [False, True])
def test_chrf_of_a_corpus_is_that_of_sacrebleu(plus_plus: bool) -> None:
    cases = examples(80, references=2)
    best = [best_chrf_counts(chrf_counts(references, text), plus_plus=plus_plus) for references, text in cases]
    columns = list(zip(*(references for references, _ in cases), strict=True))
    expected = CHRF(word_order=2 if plus_plus else 0).corpus_score([text for _, text in cases], columns)
    assert corpus_chrf(best, plus_plus=plus_plus) == expected.score
    sentences = [chrf(each, plus_plus=plus_plus) for each in best]
    assert sum(sentences) / len(sentences) != pytest.approx(expected.score, rel=1e-3), "not the mean of the examples"


@pytest.mark.parametrize(
    ("reference", "prediction", "exact", "f1"),
    [
        ("The Cat!", "cat", 1.0, 1.0),
        ("a cat on the mat", "cat mat", 0.0, 0.8),  # of 3 and 2 words 2 are shared
        ("cat cat dog", "cat", 0.0, 0.5),
        ("cat", "cat cat cat", 0.0, 0.5),
        ("cat", "dog", 0.0, 0.0),
        ("cat", "", 0.0, 0.0),
        ("the", "...", 1.0, 1.0),  # nothing is left of either
        ("theatre", "atre", 0.0, 0.0),  # articles are words, not beginnings
    ],
)
def test_exact_match_and_token_f1(reference: str, prediction: str, exact: float, f1: float) -> None:
    assert exact_match([reference], prediction) == exact
    assert token_f1([reference], prediction) == pytest.approx(f1)
    assert exact_match(["something else entirely", reference], prediction) == exact
    assert token_f1(["unrelated words", reference], prediction) == pytest.approx(f1)
