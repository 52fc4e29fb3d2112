"""How fast ROUGE is scored against the `rouge_score` package, on the same texts, after checking equality.

    python -m tests.benchmarks.metrics [--rounds 5] [--pairs 300]

ROUGE-1, -2, -L and -Lsum with the stemmer on, of three kinds of pairs made of the topics of Python's own help: answers
of one line, paragraphs, and pages of some dozens of lines. Predictions are references with words left out and lines in
another order. First every precision, recall and F-measure is compared, with and without the stemmer; their largest
difference is `rouge_max_difference`. Then both score all pairs in turns, each time with a new scorer, so that no stem
is known at the beginning; `rouge_vs_rouge_score` is the median over rounds of their seconds over ours.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pydoc_data.topics import topics

from rouge_score import rouge_scorer

from modelmill.components.evaluation.rouge import METRICS, Rouge

Pair = tuple[str, str]
LENGTHS = {"answer": 120, "paragraph": 700, "page": 2500}  # characters of a reference


def make_pairs(kind: str, count: int) -> list[Pair]:
    """References and predictions, the same on every machine with the same Python."""
    generator, length = random.Random(kind), LENGTHS[kind]
    documents = [text for _, text in sorted(topics.items()) if len(text) >= length]
    pairs = []
    for _ in range(count):
        document = generator.choice(documents)
        begin = generator.randint(0, len(document) - length)
        reference = document[begin : begin + length]
        if kind == "answer":
            reference = " ".join(reference.split())
        lines = reference.split("\n")
        generator.shuffle(lines)
        kept = ((word for word in line.split(" ") if generator.random() < 0.7) for line in lines)
        pairs.append((reference, "\n".join(" ".join(words) for words in kept)))
    return pairs


def largest_difference(pairs: list[Pair]) -> float:
    """Largest difference of any score of any pair, with and without the stemmer."""
    largest = 0.0
    for use_stemmer in (False, True):
        ours = Rouge(use_stemmer=use_stemmer)
        theirs = rouge_scorer.RougeScorer(list(METRICS), use_stemmer=use_stemmer)
        for reference, prediction in pairs:
            found, expected = ours.score([reference], prediction), theirs.score(reference, prediction)
            for name in METRICS:
                gaps = (abs(one - other) for one, other in zip(found[name], expected[name], strict=True))
                largest = max(largest, *gaps)
    return largest


def run_ours(pairs: list[Pair]) -> None:
    scorer = Rouge(use_stemmer=True)
    for reference, prediction in pairs:
        scorer.score([reference], prediction)


def run_theirs(pairs: list[Pair]) -> None:
    scorer = rouge_scorer.RougeScorer(list(METRICS), use_stemmer=True)
    for reference, prediction in pairs:
        scorer.score(reference, prediction)


def seconds(run: Callable[[list[Pair]], None], pairs: list[Pair]) -> float:
    began = time.perf_counter()
    run(pairs)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pairs", type=int, default=300)
    arguments = parser.parse_args()
    print(f"Python {platform.python_version()}, rouge_score {version('rouge_score')}, nltk {version('nltk')}")
    pairs = {kind: make_pairs(kind, arguments.pairs // len(LENGTHS)) for kind in LENGTHS}
    difference = max(largest_difference(each) for each in pairs.values())
    print(f"largest difference of {sum(map(len, pairs.values()))} pairs: {difference}")
    ratios: dict[str, list[float]] = {kind: [] for kind in (*LENGTHS, "all")}
    for number in range(arguments.rounds):
        total = {run_ours: 0.0, run_theirs: 0.0}
        for kind, each in pairs.items():
            order = (run_ours, run_theirs) if number % 2 else (run_theirs, run_ours)
            taken = {run: seconds(run, each) for run in order}
            ratios[kind].append(taken[run_theirs] / taken[run_ours])
            for run in order:
                total[run] += taken[run]
        ratios["all"].append(total[run_theirs] / total[run_ours])
        print(f"round {number + 1}: ours {total[run_ours]:.3f} s, rouge_score {total[run_theirs]:.3f} s", flush=True)
    for kind, values in ratios.items():
        print(f"{kind}: {statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})")
    print(json.dumps({"rouge_vs_rouge_score": statistics.median(ratios["all"]), "rouge_max_difference": difference}))


if __name__ == "__main__":
    main()
