"""The scores of generations against the packages people compare with, their files, and generations that are wrong."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from rouge_score import rouge_scorer
from sacrebleu.metrics import CHRF

from modelmill.components.core.errors import UserError
from modelmill.components.core.events import read_lines
from modelmill.components.core.home import Home
from modelmill.components.core.manifest import Manifest
from modelmill.components.core.step import StepResult
from modelmill.components.evaluation.config import BertScoreConfig, GenerationScoresConfig
from modelmill.components.evaluation.generation import score_generations
from modelmill.components.evaluation.records import Generation, read_generations, read_scores, write_generations
from modelmill.components.evaluation.resampling import bootstrap_interval
from tests.components.conftest import RunFolder
from tests.components.evaluation import encoders

EXAMPLES = [
    Generation("b", "Who sat?", ("The cat sat.", "It was the cat that sat"), "the cats sat"),
    Generation("a", "Where?", ("On the mat\nin the house",), "in a house\non the mats"),
    Generation("c", "What <b>colour</b>?", ("blue",), ""),
    Generation("d", "Which?", ("A big red dog",), "the big red dog!"),
]


def described(folder: Path, examples: list[Generation], **metadata: Any) -> Manifest:
    folder.mkdir(parents=True, exist_ok=True)
    write_generations(folder / "generations.jsonl", examples)
    return Manifest.describe(folder, kind="generations", metadata=metadata)


def scored(folder: Path, generations: Manifest, **config: Any) -> tuple[StepResult, Manifest]:
    folder.mkdir(parents=True)
    settings = {"resamples": 200, **config}
    result = score_generations(GenerationScoresConfig(**settings), folder, generations=generations)
    fields = {"counts": result.counts, "metrics": result.metrics, "metadata": result.metadata}
    return result, Manifest.describe(folder, kind=result.kind, **fields)


def test_scores_are_those_of_the_reference_packages(home: Home, tmp_path: Path) -> None:
    metrics = ("rouge1", "rouge2", "rougeL", "rougeLsum", "chrf", "chrf_plus_plus", "exact_match", "token_f1")
    result, manifest = scored(tmp_path / "scores", described(tmp_path / "made", EXAMPLES), metrics=metrics)
    held = read_scores(manifest, "scores")
    assert held.ids == ("a", "b", "c", "d")
    assert set(held.values) == set(metrics)
    scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL", "rougeLsum"], use_stemmer=True)
    for example in EXAMPLES:
        place = held.ids.index(example.id)
        for name, score in scorer.score_multi(list(example.references), example.prediction).items():
            assert held.values[name][place] == score.fmeasure
        for name, order in (("chrf", 0), ("chrf_plus_plus", 2)):
            expected = CHRF(word_order=order).sentence_score(example.prediction, list(example.references))
            assert held.values[name][place] == expected.score
    assert held.values["exact_match"].tolist() == [0, 0, 0, 1]
    for name in metrics:
        assert result.metrics[name] == pytest.approx(held.values[name].mean())
        assert result.metrics[f"{name}_lower"] <= result.metrics[name] <= result.metrics[f"{name}_upper"]
    references = [[example.references[0] for example in EXAMPLES], [example.references[-1] for example in EXAMPLES]]
    corpus = CHRF().corpus_score([example.prediction for example in EXAMPLES], references)
    assert result.metrics["chrf_corpus"] == corpus.score
    assert result.counts == {"examples": 4, "empty_predictions": 1}


def test_intervals_are_those_of_the_stated_confidence(home: Home, tmp_path: Path) -> None:
    generations = described(tmp_path / "made", EXAMPLES)
    settings = {"metrics": ("token_f1",), "seed": 3, "resamples": 500}
    result, manifest = scored(tmp_path / "scores", generations, confidence=0.8, **settings)
    lines = (tmp_path / "scores" / "scores.jsonl").read_text().splitlines()
    column = np.array([[json.loads(line)["scores"]["token_f1"]] for line in lines])
    lower, upper = bootstrap_interval(column, confidence=0.8, resamples=500, seed=3)
    assert (result.metrics["token_f1_lower"], result.metrics["token_f1_upper"]) == (lower[0], upper[0])
    assert "80 % interval" in manifest.path("report.md").read_text()
    other, _ = scored(tmp_path / "other", generations, confidence=0.99, **settings)
    assert other.metrics["token_f1_lower"] < result.metrics["token_f1_lower"]


def test_bertscore_is_added_with_the_encoders_digest(home: Home, tmp_path: Path) -> None:
    encoder = encoders.bert(tmp_path / "encoder", positions=8)
    generations = described(tmp_path / "made", EXAMPLES, weights_digest="w" * 64, dataset_digest="d" * 64)
    section = BertScoreConfig(encoder=str(encoder), layer=2)
    result, manifest = scored(tmp_path / "scores", generations, metrics=("exact_match",), bertscore=section)
    held = read_scores(manifest, "scores")
    assert set(held.values) == {"exact_match", "bertscore_precision", "bertscore_recall", "bertscore_f1"}
    assert held.values["bertscore_f1"][2] == 0, "nothing was predicted"
    assert 0.3 < held.values["bertscore_f1"][3] <= 1
    assert result.counts["truncated_texts"] == 1
    assert "1 texts were longer than the encoder reads" in manifest.path("report.md").read_text()
    scoring = result.metadata["scoring"]
    assert len(scoring.pop("encoder_digest")) == 64
    assert scoring == {"use_stemmer": True, "layer": 2, "idf": False, "max_length": None}
    assert result.metadata["weights_digest"] == "w" * 64
    assert result.metadata["dataset_digest"] == "d" * 64
    assert result.metadata["generations_digest"] == generations.digest
    config = GenerationScoresConfig(bertscore=section)
    before = config.fingerprint()
    (encoder / "tokenizer.json").write_text((encoder / "tokenizer.json").read_text() + "\n")
    assert config.fingerprint() != before, "another encoder in the same folder is another input"
    assert GenerationScoresConfig().fingerprint() == ""


def test_equal_input_gives_equal_bytes(home: Home, tmp_path: Path) -> None:
    generations = described(tmp_path / "made", EXAMPLES)
    digests = []
    for number in range(2):
        scored(tmp_path / str(number), generations)
        files = sorted((tmp_path / str(number)).iterdir())
        digests.append({path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files})
    assert digests[0] == digests[1]
    assert set(digests[0]) == {"scores.jsonl", "report.md", "report.html"}


def test_report_shows_examples_from_worst_to_best(home: Home, tmp_path: Path) -> None:
    generations = described(tmp_path / "made", EXAMPLES)
    _, manifest = scored(tmp_path / "scores", generations, metrics=("token_f1",), num_examples=2)
    page = manifest.path("report.html").read_text()
    assert page.index("<h3>c</h3>") < page.index("<h3>d</h3>")
    assert "<h3>a</h3>" not in page
    assert "What &lt;b&gt;colour&lt;/b&gt;?" in page
    assert "(nothing)" in page
    assert str(tmp_path) not in page
    _, manifest = scored(tmp_path / "none", generations, num_examples=0)
    assert "worst" not in manifest.path("report.html").read_text()
    table = manifest.path("report.md").read_text()
    assert "| metric | mean | 95 % interval | standard deviation |" in table
    assert "4 examples, 1 of them without a prediction" in table


def test_scores_reach_the_tracking_spool(
    home: Home, tmp_path: Path, make_run: Callable[[Home, str], RunFolder]
) -> None:
    run = make_run(home, "run-1")
    run.enter("score_tuned")
    result, _ = scored(tmp_path / "scores", described(tmp_path / "made", EXAMPLES))
    lines = [line for _, line in read_lines(run.path / "spool" / "score_tuned.jsonl")]
    points = [line for line in lines if line["type"] == "metrics"]
    assert len(points) == 1, "one record, however many metrics"
    assert points[0]["values"] == result.metrics
    artifacts = [Path(line["path"]).name for line in lines if line["type"] == "artifact"]
    assert artifacts == ["report.html", "report.md", "scores.jsonl"]
    assert [line["profile"]["examples"] for line in lines if line["type"] == "dataset"] == [4]


GOOD = {"id": "x", "prompt": "p", "reference": "r", "prediction": "y"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({**GOOD, "reference": None}, "reference is null; it must be a text"),
        ({"id": "y", "prompt": "p", "prediction": "y"}, "reference is missing"),
        ({**GOOD, "reference": "  "}, "a reference is empty"),
        (
            {"id": "y", "prompt": "p", "prediction": "y", "references": []},
            "references is a list; it must be a list of",
        ),
        ({"id": "y", "prompt": "p", "prediction": "y", "references": "r"}, "references is 'r'"),
        ({"id": "y", "prompt": "p", "prediction": "y", "references": ["r", 3]}, "reference is 3; it must be a text"),
        ({**GOOD, "references": ["r"]}, "has both reference and references"),
        ({**GOOD, "prediction": float("nan")}, "prediction is nan; it must be a text"),
        ({"id": "y", "prompt": "p", "reference": "r"}, "prediction is missing"),
        ({**GOOD, "id": 7}, "id is 7; it must be a text"),
        ({**GOOD, "id": "first"}, "id 'first' was used in line 1"),
        ({**GOOD, "prediction": "\ud83d"}, "prediction holds half of a surrogate pair"),
        (["x"], "is a list; write one object a line"),
        ("{", "is 'x'"),
    ],
)
def test_a_malformed_example_is_named_by_line(home: Home, tmp_path: Path, line: Any, message: str) -> None:
    path = tmp_path / "generations.jsonl"
    text = '"x"' if line == "{" else json.dumps(line)
    path.write_text(json.dumps({**GOOD, "id": "first"}) + "\n\n" + text + "\n")
    with pytest.raises(UserError) as raised:
        read_generations(Manifest.describe(tmp_path, kind="generations"))
    assert str(raised.value).startswith(f"generations: {path} line 3: ")
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_torn_line_and_an_empty_file(home: Home, tmp_path: Path) -> None:
    path = tmp_path / "generations.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + json.dumps(GOOD)[:20])
    with pytest.raises(UserError, match=r"line 2: is not JSON .*; write one object a line"):
        read_generations(Manifest.describe(tmp_path, kind="generations"))
    path.write_text("\n")
    with pytest.raises(UserError, match="has no example; generate for a set that is not empty"):
        read_generations(Manifest.describe(tmp_path, kind="generations"))
    path.unlink()
    (tmp_path / "other.txt").write_text("x")
    with pytest.raises(UserError, match=r"no file 'generations.jsonl'"):
        read_generations(Manifest.describe(tmp_path, kind="generations"))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"metrics": ()}, "at least 1 item"),
        ({"metrics": ("rouge1", "rouge1")}, "names one twice"),
        ({"metrics": ("bleu",)}, "rougeLsum"),
        ({"confidence": 1.0}, "less than 1"),
        ({"resamples": 10}, "greater than or equal to 100"),
        ({"bertscore": {"encoder": "x", "layer": -1}}, "greater than or equal to 0"),
    ],
)
def test_configs_that_mean_nothing(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        GenerationScoresConfig(**config)


def test_metrics_of_overlap_do_not_import_torch() -> None:
    code = "import sys, modelmill.components.evaluation.generation; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "nltk", "matplotlib"} & set(done.stdout.split())
