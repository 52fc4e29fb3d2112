"""Step `evaluate_retrieval`: how well a model finds the held-out texts by their questions.

The texts of all held-out pairs are the corpus, and every question is asked of all of it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from modelmill.components.core import events, tracking
from modelmill.components.core.errors import UserError
from modelmill.components.core.manifest import Manifest, json_digest
from modelmill.components.core.model_folder import digest_of, model_folder
from modelmill.components.core.step import StepResult, step_options
from modelmill.components.embedding.config import RetrievalConfig
from modelmill.components.embedding.pairs import read_pairs, track_pairs
from modelmill.components.embedding.retrieval import Found, Held, rank, score
from modelmill.components.evaluation.records import SCORES_FILE, write_scores

logger = logging.getLogger("modelmill")


@step_options(device=True)
def evaluate_retrieval(config: RetrievalConfig, output: Path, *, model: Manifest, pairs: Manifest) -> StepResult:
    """Score an embedding model on the questions of a split.

    Writes `scores.jsonl` for the gate, with `recall_at_1`, `recall_at_5`, `recall_at_10`, `mrr_at_10`, `ndcg_at_10`
    and `cosine` of the true pairs, for every question; `retrieval.json` with
    their means; and `report.md`.

    Args:
        config: split and batch size.
        output: an empty folder.
        model: manifest of a model (`model/`), of sentence-transformers or of transformers.
        pairs: manifest of `prepare_pairs`.

    Returns:
        kind `scores`; metadata `weights_digest`, `dataset_digest`, `scoring`.

    Raises:
        UserError: the split has no pair that belongs together, or the model has parts that are not known here.
    """
    held = Held.of(read_pairs(pairs, config.split, together=True))
    if not held.ids:
        raise UserError(
            f"evaluation.split: {config.split} has no pair that belongs together; hold more out or use another split"
        )
    found = rank(*_vectors(config, model, held), held.relevant)
    scores = score(found)
    digests = [json_digest([held.corpus_ids[place] for place in places])[:16] for places in held.relevant]
    write_scores(output / SCORES_FILE, held.ids, scores, digests)
    means = {name: float(values.mean()) for name, values in scores.items()}
    counts = {"questions": len(held.ids), "corpus": len(held.corpus)}
    record = {"split": config.split, "counts": counts, "metrics": means}
    (output / "retrieval.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (output / "report.md").write_text(_report(config, held, found, means), encoding="utf-8")
    logger.info("%s", ", ".join(f"{name} {value:.4f}" for name, value in means.items()))
    tracking.log_metrics(means)
    tracking.log_artifact(output / "report.md")
    track_pairs(pairs, config.split)
    scoring = {"split": config.split, "corpus": json_digest(held.corpus_ids)[:16]}
    metadata = {"weights_digest": digest_of(model), "dataset_digest": pairs.digest, "scoring": scoring}
    return StepResult("scores", counts=counts, metrics=means, metadata=metadata)


def _vectors(config: RetrievalConfig, model: Manifest, held: Held) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Of the questions and of the corpus, each [.., dimension] and of length 1."""
    import torch

    from modelmill.components.embedding.encoder import embed, load_encoder

    encoder = load_encoder(model_folder(model), "cuda" if torch.cuda.is_available() else "cpu")
    total = len(held.questions) + len(held.corpus)
    events.progress(f"embedding {total} texts", 0, total)
    questions = embed(encoder, held.questions, config.batch_size)
    events.progress(f"embedding {total} texts", len(questions), total)
    corpus = embed(encoder, held.corpus, config.batch_size)
    events.progress(f"embedding {total} texts", total, total)
    return questions, corpus


def _report(config: RetrievalConfig, held: Held, found: Found, means: Mapping[str, float]) -> str:
    lines = [f"{len(held.ids):,} {config.split} questions, each asked of {len(held.corpus):,} texts.", ""]
    lines += ["| metric | mean |", "| --- | ---: |", *(f"| {name} | {value:.4f} |" for name, value in means.items())]
    worst = sorted(range(len(held.ids)), key=lambda place: (-int(found.ranks[place].min()), held.ids[place]))
    if config.num_examples:
        lines += [
            "",
            "Answered worst:",
            "",
            "| question | belongs to it | rank | found instead |",
            "| --- | --- | ---: | --- |",
        ]
    for place in worst[: config.num_examples]:
        best = int(found.ranks[place].argmin())
        texts = (held.questions[place], held.corpus[held.relevant[place][best]], held.corpus[found.nearest[place]])
        asked, belongs, instead = (" ".join(text.split()).replace("|", "\\|") for text in texts)
        if found.ranks[place][best] == 1:
            instead = ""
        lines.append(f"| {asked} | {belongs} | {found.ranks[place][best]} | {instead} |")
    return "\n".join(lines) + "\n"
