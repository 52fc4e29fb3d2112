"""ROUGE against the `rouge_score` package to the last digit, and the stemmer against NLTK's."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from itertools import permutations
from pydoc_data.topics import topics

import pytest
from nltk.stem.porter import PorterStemmer
from rouge_score import rouge_scorer

from modelmill.components.evaluation.rouge import METRICS, Rouge, Score, lcs_length
from modelmill.components.evaluation.stemming import stem

DOCUMENTS = [text for _, text in sorted(topics.items())]
SUFFIXES = (
    *("ational", "tional", "enci", "anci", "izer", "bli", "abli", "alli", "entli", "eli", "ousli", "ization", "ation"),
    *("ator", "alism", "iveness", "fulness", "ousness", "aliti", "iviti", "biliti", "fulli", "logi", "icate", "ative"),
    *("alize", "iciti", "ical", "ful", "ness", "al", "ance", "ence", "er", "ic", "able", "ible", "ant", "ement"),
    *("ment", "ent", "ion", "sion", "tion", "ou", "ism", "ate", "iti", "ous", "ive", "ize", "e", "ll", "y", "s"),
    *("es", "ies", "ied", "eed", "ed", "ing", "sses", "ss"),
)


def test_stems_are_those_of_nltk() -> None:
    generator, theirs = random.Random(0), PorterStemmer()
    words = {word for text in DOCUMENTS for word in re.findall(r"[a-z0-9]+", text.lower())}
    words |= {"skies", "dying", "lying", "tying", "news", "innings", "outings", "cannings", "howe", "exceed"}
    for _ in range(40_000):
        root = "".join(generator.choices("abeiouylstzx1", k=generator.randint(1, 6)))
        words.add(root + "".join(generator.choices(SUFFIXES, k=generator.randint(0, 2))))
    assert {word: stem(word) for word in words} == {word: theirs.stem(word) for word in words}


def texts(seed: int, count: int) -> Iterator[tuple[list[str], str]]:
    """References and a prediction: few letters, real documents with lines left out and shuffled, odd characters."""
    generator = random.Random(seed)

    def letters() -> str:
        return "".join(generator.choices("aabbc  \n\n.", k=generator.randint(0, 60)))

    def odd() -> str:
        return "".join(generator.choices("aİéΣKſ日abc 1\n\r\t\x0b\u2028 ", k=generator.randint(0, 40)))

    def real() -> str:
        document = generator.choice(DOCUMENTS)
        begin = generator.randint(0, len(document))
        return document[begin : begin + generator.randint(0, 700)]

    for number in range(count):
        kind = (letters, odd, real)[number % 3]
        references = [kind() for _ in range(generator.randint(1, 3))]
        prediction = kind()
        if kind is real and generator.random() < 0.7:
            lines = references[0].split("\n")
            generator.shuffle(lines)
            kept = [word for line in lines for word in f"{line}\n".split(" ") if generator.random() < 0.8]
            prediction = " ".join(kept)
        yield references, prediction


@pytest.mark.parametrize("use_stemmer", [False, True])
def test_scores_are_those_of_rouge_score(use_stemmer: bool) -> None:
    theirs = rouge_scorer.RougeScorer(list(METRICS), use_stemmer=use_stemmer)
    ours = Rouge(use_stemmer=use_stemmer)
    for references, prediction in texts(int(use_stemmer), 600):
        expected = theirs.score_multi(references, prediction)
        scores = ours.score(references, prediction)
        assert list(scores) == list(METRICS)
        for name in METRICS:
            assert tuple(scores[name]) == tuple(expected[name]), (name, references, prediction)


@pytest.mark.parametrize(
    ("reference", "prediction"),
    [
        ("", ""),
        ("a", ""),
        ("", "a"),
        ("\n\n", "a b"),
        ("...", "..."),
        ("日本", "日本"),
        ("a\nb", "a b"),
        ("a b", "b\na"),
    ],
)
def test_edges_are_those_of_rouge_score(reference: str, prediction: str) -> None:
    expected = rouge_scorer.RougeScorer(list(METRICS)).score(reference, prediction)
    assert Rouge(use_stemmer=False).score([reference], prediction) == {
        name: Score(*expected[name]) for name in METRICS
    }


def test_the_order_of_the_metrics_changes_nothing() -> None:
    reference, prediction = "the cat sat\non the mat", "on the mat\nthe cat sat down"
    expected = Rouge().score([reference], prediction)
    assert expected["rougeL"] != expected["rougeLsum"]
    for order in permutations(METRICS, 3):
        assert Rouge(order).score([reference], prediction) == {name: expected[name] for name in order}


def test_of_several_references_each_metric_takes_its_best() -> None:
    score = Rouge(use_stemmer=False).score(["a b c d", "d c b a x", "a b c d"], "d c b a")
    assert score["rouge1"] == Score(1.0, 1.0, 1.0)
    assert score["rouge2"].precision == 1.0
    assert score["rouge2"].recall == 0.75


def test_longest_common_subsequence_against_the_table() -> None:
    generator = random.Random(3)
    for _ in range(300):
        first, second = (generator.choices(range(6), k=generator.randint(0, 90)) for _ in range(2))
        row = [0] * (len(second) + 1)
        for token in first:
            above, row = row, [0]
            for place, other in enumerate(second):
                row.append(above[place] + 1 if token == other else max(above[place + 1], row[-1]))
        assert lcs_length(first, second) == row[-1]


def test_a_metric_that_does_not_exist() -> None:
    with pytest.raises(ValueError, match=r"\['rouge3'\] are not among rouge1, rouge2, rougeL, rougeLsum"):
        Rouge(["rouge1", "rouge3"])
