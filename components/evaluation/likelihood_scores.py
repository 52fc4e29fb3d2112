"""What the steps that score by likelihood write: losses of examples as `scores.jsonl` and metrics. Torch-free."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from modelmill.components.core import tracking
from modelmill.components.core.manifest import Manifest
from modelmill.components.evaluation.config import LikelihoodConfig
from modelmill.components.evaluation.records import SCORES_FILE, write_scores
from modelmill.components.evaluation.resampling import bootstrap_ratio_interval

logger = logging.getLogger("modelmill")


@dataclass(frozen=True)
class Losses:
    """Losses of examples.

    Attributes:
        ids: unique, [n].
        digests: of the scored texts, [n].
        nats: summed over an example's scored tokens, [n].
        tokens: how many were scored, [n], at least one each.
        bytes: of UTF-8 text that they stand for, [n], at least one each.
    """

    ids: Sequence[str]
    digests: Sequence[str]
    nats: NDArray[np.float64]
    tokens: NDArray[np.integer]
    bytes: NDArray[np.integer]


def write_losses(
    config: LikelihoodConfig, output: Path, name: str, losses: Losses, data: Manifest
) -> tuple[dict[str, int], dict[str, float]]:
    """Write `scores.jsonl` with `<name>_loss` and `<name>_bits_per_byte`; returns counts and metrics of the whole."""
    bits = losses.nats / math.log(2)
    sums = {"loss": (losses.nats, losses.tokens), "bits_per_byte": (bits, losses.bytes)}
    above = np.stack([top for top, _ in sums.values()], axis=1)
    below = np.stack([bottom for _, bottom in sums.values()], axis=1).astype(np.float64)
    lower, upper = bootstrap_ratio_interval(
        above, below, confidence=config.confidence, resamples=config.resamples, seed=config.seed
    )
    values, metrics = {}, dict[str, float]()
    for place, kind in enumerate(sums):
        full = f"{name}_{kind}"
        values[full] = above[:, place] / below[:, place]
        metrics[full] = float(above[:, place].sum() / below[:, place].sum())
        metrics |= {f"{full}_lower": float(lower[place]), f"{full}_upper": float(upper[place])}
        metrics[f"{full}_mean"] = float(values[full].mean())
    write_scores(output / SCORES_FILE, losses.ids, values, losses.digests)
    counts = {"examples": len(losses.ids), "tokens": int(losses.tokens.sum()), "bytes": int(losses.bytes.sum())}
    tracking.log_metrics(metrics)
    tracking.log_artifact(output / SCORES_FILE, "scores")
    tracking.log_dataset(name=data.kind, digest=data.digest, source=data.uri, context=config.split, profile=counts)
    logger.info("%s", ", ".join(f"{full} {metrics[full]:.4f}" for full in values))
    return counts, metrics
