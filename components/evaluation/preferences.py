"""Step `score_preferences`: is the better answer of a held-out pair more likely to a model than the worse one?"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modelmill.components.core import events, tracking
from modelmill.components.core.errors import UserError
from modelmill.components.core.manifest import Manifest, json_digest
from modelmill.components.core.model_folder import digest_of, model_folder
from modelmill.components.core.step import StepResult, step_options
from modelmill.components.data.chat_template import open_template
from modelmill.components.data.conversations import Message
from modelmill.components.data.preference_rows import PreferenceRows, open_preferences, read_pairs
from modelmill.components.data.tokenizer_files import load_tokenizer
from modelmill.components.evaluation.batching import evenly
from modelmill.components.evaluation.preference_config import PreferenceScoresConfig
from modelmill.components.evaluation.records import SCORES_FILE, write_scores
from modelmill.components.evaluation.resampling import bootstrap_interval

logger = logging.getLogger("modelmill")
_COMPARED = 16  # pairs tokenised anew, to see that the rows were made with the model's tokenizer


@step_options(device=True)
def score_preferences(
    config: PreferenceScoresConfig, output: Path, *, model: Manifest, preferences: Manifest
) -> StepResult:
    """Compare how likely a model finds the two answers of each pair, whatever it would write itself.

    Writes `scores.jsonl` (see `records`), where higher is better: `preferred` (1 where log p(chosen) > log
    p(rejected), else 0), `margin` (that difference in nats) and `margin_per_token` (the difference of the means over
    each answer's tokens, which a longer answer does not lower). No reference is taken off: two models scored on the
    same pairs differ in their margins by the difference of their rewards over beta.

    Args:
        config: which pairs, and how intervals are drawn.
        output: an empty folder.
        model: manifest of an exported model with its tokenizer (`model/`).
        preferences: manifest of `prepare_preferences` with that tokenizer.

    Returns:
        kind `scores`; counts `examples`, `tokens`; metrics: the mean of each score with `_lower` and `_upper` of a
        bootstrap over the pairs; metadata `weights_digest`, `dataset_digest`, `scoring`.

    Raises:
        UserError: the split is empty, another tokenizer made the rows, a pair is longer than the model's positions, or
            a likelihood is not finite.
    """
    # Imported here, so that a reused step does not pay for torch.
    from modelmill.components.evaluation.language_model import load_language_model
    from modelmill.components.evaluation.likelihood import Window, window_losses

    folder = model_folder(model)
    rows = open_preferences(preferences, config.split)
    if not len(rows):
        raise UserError(
            f"preferences: the {config.split} split holds no pair; raise preferences.{config.split}_fraction, or give"
            f" it a source with `into: {config.split}`"
        )
    numbers = evenly(len(rows), config.max_pairs)
    wanted = set(numbers.tolist())
    records = [record for place, record in enumerate(read_pairs(preferences, config.split)) if place in wanted]
    _check_tokenizer(preferences, model, records, rows, numbers)
    windows = [
        Window(place, *rows.conversation(number, side))
        for place, number in enumerate(numbers.tolist())
        for side in (0, 1)
    ]
    events.progress("loading the model")
    judge = load_language_model(folder, config)
    judge.check_vocabulary(preferences.counts["vocab_size"])
    longest = max(len(window.tokens) for window in windows) - 1
    if judge.positions is not None and longest > judge.positions:
        raise UserError(
            f"preferences.sequence_length: a pair has {longest} tokens and the model {judge.positions} positions;"
            " prepare shorter rows"
        )
    ids = [record["id"] for record in records]
    nats = window_losses(judge, windows, ids, config.batch_tokens).reshape(-1, 2)
    values = _scores(nats, rows.targets[numbers])
    digests = [json_digest([record["chosen"], record["rejected"]])[:16] for record in records]
    write_scores(output / SCORES_FILE, ids, values, digests)
    metrics = _metrics(config, values)
    counts = {"examples": len(ids), "tokens": int(rows.targets[numbers].sum())}
    tracking.log_metrics(metrics)
    tracking.log_artifact(output / SCORES_FILE, "scores")
    tracking.log_dataset(
        name="preferences", digest=preferences.digest, source=preferences.uri, context=config.split, profile=counts
    )
    logger.info("%s", ", ".join(f"{name} {metrics[name]:.4f}" for name in values))
    metadata = {"weights_digest": digest_of(model), "dataset_digest": preferences.digest}
    return StepResult("scores", counts, metrics, {**metadata, "scoring": {"split": config.split}})


def _scores(nats: NDArray[np.float64], tokens: NDArray[np.integer]) -> dict[str, NDArray[np.float64]]:
    """Scores [n] from cross entropies and targets of both answers, [n, 2] each."""
    margin = nats[:, 1] - nats[:, 0]
    rates = nats / tokens
    return {
        "preferred": (margin > 0).astype(np.float64),
        "margin": margin,
        "margin_per_token": rates[:, 1] - rates[:, 0],
    }


def _metrics(config: PreferenceScoresConfig, values: dict[str, NDArray[np.float64]]) -> dict[str, float]:
    table = np.stack(list(values.values()), axis=1)
    lower, upper = bootstrap_interval(
        table, confidence=config.confidence, resamples=config.resamples, seed=config.seed
    )
    metrics: dict[str, float] = {}
    for place, (name, column) in enumerate(values.items()):
        metrics |= {name: float(column.mean())}
        metrics |= {f"{name}_lower": float(lower[place]), f"{name}_upper": float(upper[place])}
    return metrics


def _check_tokenizer(
    preferences: Manifest,
    model: Manifest,
    records: list[dict[str, Any]],
    rows: PreferenceRows,
    numbers: NDArray[np.integer],
) -> None:
    """Compare tokens as prepared with those that the model's tokenizer makes now."""
    tokenizer, size = load_tokenizer(model), preferences.counts["vocab_size"]
    fix = "prepare the preferences with this model's tokenizer"
    if size != tokenizer.vocab_size:
        raise UserError(
            f"preferences: were made with a tokenizer of {size} entries, the model's has {tokenizer.vocab_size}; {fix}"
        )
    template = open_template(preferences.metadata["template"], tokenizer)
    for place in evenly(len(records), _COMPARED).tolist():
        record, number = records[place], int(numbers[place])
        said = [Message(**message) for message in record["prompt"]] + [Message("assistant", record["chosen"])]
        prepared = rows.conversation(number, 0)[0].tolist()
        made = tokenizer.encoder.encode(template.render(said).text, add_special_tokens=False).ids
        if made[: len(prepared)] != prepared:
            raise UserError(f"preferences: pair {number + 1} was made with another tokenizer than the model's; {fix}")
