"""Score what a model wrote against its references, keep each example's scores, and report with intervals."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modelmill.components.core import events, tracking
from modelmill.components.core.manifest import Manifest
from modelmill.components.core.step import StepResult
from modelmill.components.evaluation.config import BertScoreConfig, GenerationScoresConfig
from modelmill.components.evaluation.page import html_table, markdown_table, page, text
from modelmill.components.evaluation.records import SCORES_FILE, Generation, read_generations, write_scores
from modelmill.components.evaluation.resampling import bootstrap_interval
from modelmill.components.evaluation.rouge import METRICS as ROUGE_METRICS
from modelmill.components.evaluation.rouge import Rouge
from modelmill.components.evaluation.text_metrics import (
    best_chrf_counts,
    chrf,
    chrf_counts,
    corpus_chrf,
    exact_match,
    token_f1,
)

logger = logging.getLogger("modelmill")
_PROGRESS = 500  # examples between two reports of progress
Values = dict[str, NDArray[np.float64]]


def score_generations(config: GenerationScoresConfig, output: Path, *, generations: Manifest) -> StepResult:
    """Score predictions against their references.

    Writes `scores.jsonl` (see `records`), `report.md` and `report.html`. The metrics of the manifest are means over
    examples, with `<metric>_lower` and `<metric>_upper` around each; `chrf_corpus` is chrF of all examples' counts
    together, as `sacrebleu` reports it for a corpus.

    Args:
        config: which metrics, and how intervals are drawn.
        output: an empty folder.
        generations: manifest of an artifact with `generations.jsonl`, see `records`.

    Raises:
        UserError: an example is malformed, or there is none; or the encoder cannot be used.
    """
    examples = read_generations(generations)
    values, metrics = _overlap(config, examples)
    counts = {"examples": len(examples), "empty_predictions": sum(not e.prediction.strip() for e in examples)}
    scoring: dict[str, Any] = {"use_stemmer": config.use_stemmer}  # what the numbers depend on, see `records`
    metadata: dict[str, Any] = {"generations_digest": generations.digest, "scoring": scoring}
    for name in ("weights_digest", "dataset_digest"):
        if name in generations.metadata:
            metadata[name] = generations.metadata[name]
    if "decoding" in generations.metadata:  # of `generate`
        scoring["decoding"] = generations.metadata["decoding"]
    if config.bertscore is not None:
        scored, counts["truncated_texts"], scoring["encoder_digest"] = _bertscore(config.bertscore, examples)
        scoring |= config.bertscore.model_dump(mode="json", include={"layer", "idf", "max_length"})
        values |= scored
    columns = np.stack(list(values.values()), axis=1)
    lower, upper = bootstrap_interval(
        columns, confidence=config.confidence, resamples=config.resamples, seed=config.seed
    )
    for name, mean, low, high in zip(values, columns.mean(axis=0), lower, upper, strict=True):
        metrics |= {name: float(mean), f"{name}_lower": float(low), f"{name}_upper": float(high)}
    digests = [example.references_digest for example in examples]
    write_scores(output / SCORES_FILE, [example.id for example in examples], values, digests)
    _report(config, output, examples, values, metrics, counts)
    _track(output, metrics, generations, counts)
    logger.info("%s", ", ".join(f"{name} {metrics[name]:.4f}" for name in values))
    return StepResult("scores", counts, metrics, metadata)


def _overlap(config: GenerationScoresConfig, examples: Sequence[Generation]) -> tuple[Values, dict[str, float]]:
    """Scores of every example by metric, in the order asked for, and the scores of the corpus as a whole."""
    rouge = Rouge([name for name in config.metrics if name in ROUGE_METRICS], use_stemmer=config.use_stemmer)
    variants = {name: name == "chrf_plus_plus" for name in config.metrics if name.startswith("chrf")}
    found: Values = {name: np.empty(len(examples)) for name in config.metrics}
    corpus: dict[str, list[Any]] = {name: [] for name in variants}
    for place, example in enumerate(examples):
        for name, score in rouge.score(example.references, example.prediction).items():
            found[name][place] = score.fmeasure
        if "exact_match" in found:
            found["exact_match"][place] = exact_match(example.references, example.prediction)
        if "token_f1" in found:
            found["token_f1"][place] = token_f1(example.references, example.prediction)
        counts = chrf_counts(example.references, example.prediction) if variants else []
        for name, plus_plus in variants.items():
            best = best_chrf_counts(counts, plus_plus=plus_plus)
            corpus[name].append(best)
            found[name][place] = chrf(best, plus_plus=plus_plus)
        if (place + 1) % _PROGRESS == 0:
            events.progress("scoring generations", place + 1, len(examples))
    totals = {f"{name}_corpus": corpus_chrf(corpus[name], plus_plus=plus_plus) for name, plus_plus in variants.items()}
    return found, totals


def _bertscore(config: BertScoreConfig, examples: Sequence[Generation]) -> tuple[Values, int, str]:
    """BERTScore of every example, how many texts were cut, and the digest of the encoder's weights."""
    # Imported here, so that metrics of overlap do not pay for torch.
    from modelmill.components.core.weights import weights_digest
    from modelmill.components.evaluation.bertscore import Encoder, bert_scores
    from modelmill.components.evaluation.encoder_folder import encoder_folder

    encoder = Encoder(config)
    scores = bert_scores(
        encoder,
        [example.references for example in examples],
        [example.prediction for example in examples],
        idf=config.idf,
        batch_size=config.batch_size,
    )
    names = ("bertscore_precision", "bertscore_recall", "bertscore_f1")
    values = {name: scores[:, column] for column, name in enumerate(names)}
    return values, encoder.truncated, weights_digest(encoder_folder(config.encoder))


def _report(
    config: GenerationScoresConfig,
    output: Path,
    examples: Sequence[Generation],
    values: Values,
    metrics: dict[str, float],
    counts: dict[str, int],
) -> None:
    head = ["metric", "mean", f"{100 * config.confidence:g} % interval", "standard deviation"]
    rows = [
        [
            name,
            f"{metrics[name]:.5f}",
            f"{metrics[f'{name}_lower']:.5f} to {metrics[f'{name}_upper']:.5f}",
            f"{column.std(ddof=1) if len(column) > 1 else 0.0:.5f}",
        ]
        for name, column in values.items()
    ]
    notes = [
        f"{counts['examples']:,} examples, {counts['empty_predictions']:,} of them without a prediction. Intervals are"
        f" percentiles of {config.resamples:,} bootstrap resamples of the examples.",
        *(f"{name}: {metrics[name]:.3f}." for name in metrics if name.endswith("_corpus")),
    ]
    if counts.get("truncated_texts"):
        notes.append(f"{counts['truncated_texts']:,} texts were longer than the encoder reads and were cut.")
    lines = [f"# Scores of generated text\n\n{markdown_table(head, rows)}", *notes]
    (output / "report.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    parts = [html_table(head, rows), *(f"<p class=note>{text(note)}</p>" for note in notes)]
    parts += _samples(config.num_examples, examples, values)
    (output / "report.html").write_text(page("Scores of generated text", parts), encoding="utf-8")


def _samples(number: int, examples: Sequence[Generation], values: Values) -> list[str]:
    """Examples from the worst to the best by the first metric, ties in the order of the file."""
    if not number:
        return []
    name, column = next(iter(values.items()))
    order = np.argsort(column, kind="stable")
    ranks = np.unique(np.linspace(0, len(order) - 1, min(number, len(order))).round().astype(int))
    parts = [f"<h2>Examples, from the worst to the best {text(name)}</h2>"]
    for place in order[ranks]:
        example = examples[place]
        shown = [("prompt", example.prompt), *(("reference", reference) for reference in example.references)]
        shown.append((f"prediction, {name} {column[place]:.4f}", example.prediction or "(nothing)"))
        body = "".join(f"<h3>{text(kind)}</h3><div class=text>{text(content)}</div>" for kind, content in shown)
        parts.append(f"<div class=sample><h3>{text(example.id)}</h3>{body}</div>")
    return parts


def _track(output: Path, metrics: dict[str, float], generations: Manifest, counts: dict[str, int]) -> None:
    tracking.log_metrics(metrics)
    for file in sorted(output.iterdir()):
        tracking.log_artifact(file, "scores")
    tracking.log_dataset(
        name="generations", digest=generations.digest, source=generations.uri, context="test", profile=counts
    )
