"""Held-out retrieval: equal to the evaluator of sentence-transformers, in blocks, and judged by the gate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

from modelmill.components.core.errors import UserError
from modelmill.components.core.manifest import Manifest
from modelmill.components.embedding import retrieval
from modelmill.components.embedding.config import RetrievalConfig
from modelmill.components.embedding.encoder import embed, load_encoder
from modelmill.components.embedding.evaluate_retrieval import evaluate_retrieval
from modelmill.components.embedding.pairs import read_pairs
from modelmill.components.embedding.retrieval import Held, rank, score
from modelmill.components.evaluation.config import GateConfig
from modelmill.components.evaluation.gate import gate
from modelmill.components.evaluation.records import read_scores
from tests.components.embedding.samples import make_base, make_pairs, records

DEPTHS = [1, 5, 10]


def evaluate(folder: Path, model: Manifest, pairs: Manifest, **config: Any) -> Manifest:
    folder.mkdir(parents=True)
    result = evaluate_retrieval(RetrievalConfig(**config), folder, model=model, pairs=pairs)
    return Manifest.describe(
        folder, kind=result.kind, counts=result.counts, metrics=result.metrics, metadata=result.metadata
    )


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Questions that several texts belong to."""
    words = ("cat", "dog", "house", "tree", "fox")
    rows = [
        {"sentence1": f"the {a} {b}", "sentence2": f"{a} {b} {c}"} for a in words for b in words for c in words[:3]
    ]
    return make_pairs(
        tmp_path_factory.mktemp("several"), rows + records(60), test_fraction=0.9, validation_fraction=0.0
    )


@pytest.fixture(scope="module")
def judged(base: Manifest, several: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return evaluate(tmp_path_factory.mktemp("judged") / "base", base, several)


def test_metrics_are_those_of_the_library(base: Manifest, several: Manifest, judged: Manifest) -> None:
    held = Held.of(read_pairs(several, "test", together=True))
    assert max(len(places) for places in held.relevant) > 1
    evaluator = InformationRetrievalEvaluator(
        queries=dict(zip(held.ids, held.questions, strict=True)),
        corpus=dict(zip(held.corpus_ids, held.corpus, strict=True)),
        relevant_docs={
            identity: {held.corpus_ids[place] for place in places}
            for identity, places in zip(held.ids, held.relevant, strict=True)
        },
        mrr_at_k=[10],
        ndcg_at_k=[10],
        precision_recall_at_k=DEPTHS,
        show_progress_bar=False,
        write_csv=False,
    )
    model = load_encoder(Path(base.uri) / "model", "cpu")
    theirs = evaluator(model)
    for ours, name in [(f"recall_at_{depth}", f"cosine_recall@{depth}") for depth in DEPTHS]:
        assert judged.metrics[ours] == pytest.approx(theirs[name], abs=1e-12)
    assert judged.metrics["mrr_at_10"] == pytest.approx(theirs["cosine_mrr@10"], abs=1e-12)
    assert judged.metrics["ndcg_at_10"] == pytest.approx(theirs["cosine_ndcg@10"], abs=1e-12)
    assert 0 < judged.metrics["recall_at_1"] < judged.metrics["recall_at_10"] < 1


def test_mean_cosine_of_true_pairs(base: Manifest, several: Manifest, judged: Manifest) -> None:
    """Requirement 4.1: the published comparison, over every pair and not one."""
    rows = read_pairs(several, "test", together=True)
    model = load_encoder(Path(base.uri) / "model", "cpu")
    sides = [embed(model, [row[side] for row in rows], 64) for side in ("question", "positive")]
    cosines: dict[str, list[float]] = {}
    for row, value in zip(rows, (sides[0] * sides[1]).sum(axis=1), strict=True):
        cosines.setdefault(row["id"], []).append(float(value))
    expected = np.mean([np.mean(values) for values in cosines.values()])
    assert judged.metrics["cosine"] == pytest.approx(expected, abs=1e-6)


def test_scores_of_examples_average_to_the_metrics(judged: Manifest) -> None:
    scores = read_scores(judged, "scores")
    assert len(scores.ids) == judged.counts["questions"]
    for name, values in scores.values.items():
        assert values.mean() == pytest.approx(judged.metrics[name], abs=1e-12)


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    questions, corpus = (generator.normal(size=(count, 8)).astype(np.float32) for count in (23, 41))
    relevant = [np.sort(generator.choice(41, size=1 + n % 3, replace=False)) for n in range(23)]
    whole = rank(questions, corpus, relevant)
    monkeypatch.setattr(retrieval, "_BLOCK", 100)
    parts = rank(questions, corpus, relevant)
    assert all(np.array_equal(ours, theirs) for ours, theirs in zip(whole.ranks, parts.ranks, strict=True))
    assert np.array_equal(whole.nearest, parts.nearest)


def test_ranks_and_ties_by_hand() -> None:
    """Cosines 0.6, 1, 0.6, 0 and a tie that the first id wins."""
    corpus = np.array([[0.6, 0.8], [1, 0], [0.6, -0.8], [0, 1]], np.float32)
    found = rank(np.array([[1, 0]], np.float32), corpus, [np.array([0, 2])])
    assert found.ranks[0].tolist() == [2, 3]
    assert found.nearest.tolist() == [1]
    values = {name: float(value[0]) for name, value in score(found).items()}
    ideal = 1 + 1 / np.log2(3)
    assert values == pytest.approx(
        {
            "recall_at_1": 0,
            "recall_at_5": 1,
            "recall_at_10": 1,
            "mrr_at_10": 0.5,
            "ndcg_at_10": (1 / np.log2(3) + 1 / np.log2(4)) / ideal,
            "cosine": 0.6,
        }
    )


def test_batch_size_changes_nothing(base: Manifest, several: Manifest, judged: Manifest, tmp_path: Path) -> None:
    one = evaluate(tmp_path / "one", base, several, batch_size=1)
    assert one.metrics == pytest.approx(judged.metrics, abs=1e-6)


def test_a_model_does_not_beat_itself(judged: Manifest, tmp_path: Path) -> None:
    result = gate(GateConfig(metric="ndcg_at_10"), tmp_path, candidate=judged, reference=judged)
    assert result.metadata["passed"] is False


def test_other_pairs_are_not_compared(base: Manifest, pairs: Manifest, judged: Manifest, tmp_path: Path) -> None:
    other = evaluate(tmp_path / "other", base, pairs)
    with pytest.raises(UserError, match="corpus"):
        gate(GateConfig(metric="ndcg_at_10"), tmp_path, candidate=judged, reference=other)


def test_report_shows_what_was_found_instead(judged: Manifest) -> None:
    text = judged.path("report.md").read_text()
    assert f"| ndcg_at_10 | {judged.metrics['ndcg_at_10']:.4f} |" in text
    assert "Answered worst" in text


def test_an_empty_split_is_named(base: Manifest, several: Manifest, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"evaluation\.split: validation"):
        evaluate(tmp_path / "none", base, several, split="validation")


def test_a_model_with_other_parts_is_refused(tmp_path: Path) -> None:
    base = make_base(tmp_path)
    folder = tmp_path / "model"
    load_encoder(folder, "cpu").save_pretrained(str(folder), create_model_card=False)
    pooling = folder / "1_Pooling" / "config.json"
    pooling.write_text(json.dumps({**json.loads(pooling.read_text()), "pooling_mode": "max"}))
    with pytest.raises(UserError, match="pools by max; use one that pools by mean or cls"):
        load_encoder(folder, "cpu")
    assert base.kind == "model"
