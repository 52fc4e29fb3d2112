"""Judge a language model on text it never saw, against n-gram models counted on what it did see."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modelmill.components.core import events, tracking
from modelmill.components.core.errors import UserError
from modelmill.components.core.manifest import Manifest
from modelmill.components.core.model_folder import model_folder
from modelmill.components.core.step import StepResult, step_options
from modelmill.components.data.loader import open_rows
from modelmill.components.evaluation.baselines import KneserNeyBigram, UnigramModel, row_losses
from modelmill.components.evaluation.config import EvaluationConfig
from modelmill.components.evaluation.report import render_report, verdict

logger = logging.getLogger("modelmill")
_PROMPT_ROWS = 1024  # held-out rows searched for beginnings of documents
Losses = NDArray[np.float64]


@step_options(device=True)
def evaluate_heldout(config: EvaluationConfig, output: Path, *, model: Manifest, tokens: Manifest) -> StepResult:
    """Score a model on the test split, compare it with the baselines, let it write, and report.

    Writes `evaluation.json`, `samples.json`, `report.html` and its figures (`loss.svg`, `learning_rate.svg`,
    and `grad_norm.svg` if the model's history has it). Perplexity is `exp(loss)`; bits per byte are `loss / ln 2 *
    tokens / bytes`, with the bytes of UTF-8 text that the tokens stand for, so that models with different tokenizers
    can be compared.

    Args:
        config: what to score and what to sample.
        output: an empty folder.
        model: manifest of an exported model with its tokenizer (`model/`) and `history.jsonl`.
        tokens: manifest of the packed token rows the model was trained on.

    Raises:
        UserError: the test split is empty, the model does not fit the tokens, or its loss is not finite.
    """
    # Imported here, so that a reused evaluation does not pay for torch and matplotlib.
    from modelmill.components.evaluation.figures import curves
    from modelmill.components.evaluation.scoring import load_decoder, model_row_losses, write_samples

    folder = model_folder(model)
    decoder = load_decoder(folder, tokens)
    rows, vocab_size = _test_rows(config, tokens), tokens.counts["vocab_size"]

    training = open_rows(tokens, "train")
    counted = _evenly(training, -(-config.baseline_tokens // (training.shape[1] - 1)))
    events.progress("counting the baselines")
    unigram, bigram = UnigramModel.fit(counted, vocab_size), KneserNeyBigram.fit(counted, vocab_size)
    losses = {
        "model": model_row_losses(decoder, rows, config.batch_size),
        "bigram": row_losses(bigram, rows),
        "unigram": row_losses(unigram, rows),
    }
    if not np.isfinite(losses["model"]).all():
        raise UserError(
            "model: its loss on the test split is not finite, so training diverged; lower training.learning_rate"
        )
    evaluation: dict[str, Any] = {
        "scored": _scored(rows, tokens),
        "scores": _scores(losses, vocab_size, tokens),
        "comparison": {name: _difference(losses["model"], losses[name]) for name in ("bigram", "unigram")},
        "validation": _validation(model, tokens, {"bigram": bigram, "unigram": unigram}, config.max_rows),
        "baselines": {
            "tokens": int(counted.shape[0] * (counted.shape[1] - 1)),
            "training_tokens": tokens.counts["train_tokens"],
            "pairs": len(bigram.codes),
            "discount": bigram.discount,
            "lower_discount": bigram.lower_discount,
        },
        "provenance": _provenance(model, tokens),
    }
    samples = write_samples(config, decoder, folder, rows[:_PROMPT_ROWS], tokens)
    _write_json(output / "evaluation.json", evaluation)
    _write_json(output / "samples.json", samples)
    figures = curves(_history(model), evaluation["validation"])
    for name, figure in figures.items():
        (output / f"{name}.svg").write_text(figure + "\n", encoding="utf-8")
    (output / "report.html").write_text(render_report(evaluation, samples, figures), encoding="utf-8")
    metrics = _metrics(evaluation)
    _track(output, metrics, tokens)
    logger.info("%s", verdict(evaluation)[1])
    counts = {"rows": len(rows), "tokens": evaluation["scored"]["tokens"], "samples": len(samples)}
    digests = ("weights_digest", "dataset_digest", "tokenizer_digest")
    return StepResult("evaluation", counts, metrics, {name: evaluation["provenance"][name] for name in digests})


def _evenly(rows: NDArray[np.integer], limit: int | None) -> NDArray[np.integer]:
    """At most `limit` rows, evenly spaced over the split."""
    if limit is None or limit >= len(rows):
        return rows
    return rows[np.arange(limit) * len(rows) // limit]


def _test_rows(config: EvaluationConfig, tokens: Manifest) -> NDArray[np.integer]:
    if not tokens.counts.get("test_rows"):
        raise UserError("tokens: the test split has no row; raise the corpus' test share or give it more text")
    return _evenly(open_rows(tokens, "test"), config.max_rows)


def _bits_per_byte(loss: float, tokens: Manifest, split: str) -> float:
    """Nats a token as bits a byte, by the tokens and bytes of the whole split."""
    return loss / math.log(2) * tokens.counts[f"{split}_tokens"] / tokens.counts[f"{split}_bytes"]


def _scored(rows: NDArray[np.integer], tokens: Manifest) -> dict[str, Any]:
    whole = len(rows) == tokens.counts["test_rows"]
    ratio = tokens.counts["test_bytes"] / tokens.counts["test_tokens"]
    basis = f"Bits per byte use {ratio:.3f} bytes per token, "
    basis += "counted on these rows." if whole else "the mean of the whole test split, of which these rows are a part."
    size = {"rows": len(rows), "split_rows": tokens.counts["test_rows"], "tokens": len(rows) * (rows.shape[1] - 1)}
    return {**size, "bytes_per_token": ratio, "basis": basis}


def _scores(losses: Mapping[str, Losses], vocab_size: int, tokens: Manifest) -> dict[str, dict[str, float]]:
    scores = {}
    for name, values in losses.items():
        loss = float(values.mean())
        scores[name] = {"loss": loss, "standard_error": _standard_error(values)}
    scores["uniform"] = {"loss": math.log(vocab_size)}
    for score in scores.values():
        score["perplexity"] = math.exp(min(score["loss"], 700.0))  # a diverged model must not overflow
        score["bits_per_byte"] = _bits_per_byte(score["loss"], tokens, "test")
    return scores


def _standard_error(values: Losses) -> float:
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else 0.0


def _difference(model: Losses, other: Losses) -> dict[str, float]:
    """Mean of model minus other over rows, and its standard error: rows are hard or easy for both alike."""
    return {"difference": float((model - other).mean()), "standard_error": _standard_error(model - other)}


def _validation(
    model: Manifest, tokens: Manifest, baselines: Mapping[str, UnigramModel | KneserNeyBigram], limit: int | None
) -> dict[str, dict[str, float]]:
    """The baselines on the validation split, beside the loss the training step measured there."""
    if not tokens.counts.get("validation_rows"):
        return {}
    rows = _evenly(open_rows(tokens, "validation"), limit)
    losses = {name: float(row_losses(baseline, rows).mean()) for name, baseline in baselines.items()}
    if "validation_loss" in model.metrics:
        losses = {"model": model.metrics["validation_loss"], **losses}
    return {
        name: {"loss": loss, "bits_per_byte": _bits_per_byte(loss, tokens, "validation")}
        for name, loss in losses.items()
    }


def _history(model: Manifest) -> list[dict[str, Any]]:
    if not any(entry.path == "history.jsonl" for entry in model.files):
        return []
    return [json.loads(line) for line in model.path("history.jsonl").read_text().splitlines() if line]


def _provenance(model: Manifest, tokens: Manifest) -> dict[str, Any]:
    return {
        "weights_digest": str(model.metadata.get("weights_digest", "")),
        "dataset_digest": str(model.metadata.get("dataset_digest") or tokens.digest),
        "tokenizer_digest": str(model.metadata.get("tokenizer_digest", "")),
        "parameters": model.counts.get("parameters", 0),
        "optimizer_steps": model.counts.get("steps"),
        "tokens_trained_on": model.counts.get("tokens"),
        "processes": model.counts.get("world_size"),
        "vocabulary": tokens.counts["vocab_size"],
        "sequence_length": tokens.counts["sequence_length"],
        "training_split_tokens": tokens.counts["train_tokens"],
        "training_split_bytes": tokens.counts["train_bytes"],
        "test_split_tokens": tokens.counts["test_tokens"],
        "test_split_bytes": tokens.counts["test_bytes"],
        "code": model.code,
    }


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def _metrics(evaluation: Mapping[str, Any]) -> dict[str, float]:
    scores, validation = evaluation["scores"], evaluation["validation"]
    metrics = {
        "test_loss": scores["model"]["loss"],
        "test_loss_standard_error": scores["model"]["standard_error"],
        "perplexity": scores["model"]["perplexity"],
        "bits_per_byte": scores["model"]["bits_per_byte"],
    }
    for name in ("unigram", "bigram"):
        metrics[f"{name}_loss"] = scores[name]["loss"]
        metrics[f"{name}_bits_per_byte"] = scores[name]["bits_per_byte"]
    for name, score in validation.items():
        prefix = "" if name == "model" else f"{name}_"
        metrics[f"{prefix}validation_loss"] = score["loss"]
        metrics[f"{prefix}validation_bits_per_byte"] = score["bits_per_byte"]
    return metrics


def _track(output: Path, metrics: Mapping[str, float], tokens: Manifest) -> None:
    tracking.log_metrics(metrics)
    for file in sorted(output.iterdir()):
        tracking.log_artifact(file, "evaluation")
    profile = {name: tokens.counts[f"test_{name}"] for name in ("rows", "tokens", "bytes")}
    tracking.log_dataset(name="test", digest=tokens.digest, source=tokens.uri, context="test", profile=profile)
