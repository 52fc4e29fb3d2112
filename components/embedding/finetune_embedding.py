"""Step `finetune_embedding`: an embedding model tuned on pairs, so that questions lie near the texts to find.

This process imports no torch: what the training processes do is in `contrastive`, where they run says the launcher.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modelmill.components.core import tracking
from modelmill.components.core.errors import UserError
from modelmill.components.core.manifest import Manifest
from modelmill.components.core.model_folder import digest_of, model_folder
from modelmill.components.core.step import StepResult, step_options
from modelmill.components.embedding.config import CONTRASTIVE, EmbeddingTrainingConfig
from modelmill.components.embedding.pairs import read_pairs, track_pairs
from modelmill.components.training.config import ParallelConfig, TrainingConfig
from modelmill.components.training.journal import track_outcome
from modelmill.components.training.launch import Launcher, TrainingJob, TrainingResult, current_launcher
from modelmill.components.training.worker import RankContext, run_rank

MODULE = "modelmill.components.embedding.finetune_embedding"
MODEL_FOLDER = "model"
logger = logging.getLogger("modelmill")


@step_options(resumable=True, device=True)
def finetune_embedding(
    config: EmbeddingTrainingConfig,
    output: Path,
    *,
    pairs: Manifest,
    base: Manifest,
    launcher: Launcher | None = None,
) -> StepResult:
    """Tune an embedding model on the training pairs with the trainer of sentence-transformers.

    Writes `model/`, a folder that sentence-transformers and transformers load, and `history.jsonl`. Checkpoints lie
    beside `output`, and a second call goes on from the newest: what comes out is the same as without the interruption.

    Args:
        config: loss, sizes, schedule.
        output: the artifact's folder.
        pairs: manifest of `prepare_pairs`.
        base: manifest of a model (`model/`), of sentence-transformers or of transformers.
        launcher: where the training processes run; default this machine.

    Returns:
        kind `model`; counts `dimension`, `max_sequence_length`, `parameters`; metadata `flavor` (`embedding`),
        `method` (the loss), `weights_digest`, `base_digest`, `dataset_digest`.

    Raises:
        UserError: base, pairs, section and machine do not fit together, or training diverged.
        TrainingStoppedError: it was told to stop.
        RankFailedError: a training process crashed.
    """
    place, folder, digest = launcher or current_launcher(), model_folder(base).absolute(), digest_of(base)
    steps = _steps(config, pairs)
    training = engine(config, steps)
    place.check(training)
    _announce(config, steps, digest, pairs)
    job = TrainingJob(
        module=MODULE,
        spec={
            "base": str(folder),
            "config": config.model_dump(mode="json"),
            "pairs": pairs.model_dump(mode="json"),
            "output": str(output.absolute()),
        },
        training=training,
        scratch=output.parent.absolute(),
        exports=(output.absolute() / MODEL_FOLDER,),
    )
    result = place.launch(job)
    track_outcome(output, result.metrics, steps)
    metadata = {
        **result.metadata,
        "flavor": "embedding",
        "method": config.loss,
        "base_digest": digest,
        "dataset_digest": pairs.digest,
    }
    return StepResult("model", counts=result.counts, metrics=result.metrics, metadata=metadata)


def train(ranks: RankContext, spec: Mapping[str, Any], training: TrainingConfig) -> TrainingResult:
    """What one rank does."""
    from modelmill.components.embedding import contrastive

    config = EmbeddingTrainingConfig.model_validate(spec["config"])
    pairs = Manifest.model_validate(spec["pairs"])
    return contrastive.train(ranks, config, pairs, Path(spec["base"]), Path(spec["output"]), training.steps)


def _steps(config: EmbeddingTrainingConfig, pairs: Manifest) -> int:
    """Optimizer steps, after checks that the pairs can fill batches.

    Raises:
        UserError: they cannot, or the loss needs scores that they do not have.
    """
    if config.loss == "cosent" and not pairs.metadata.get("scored"):
        raise UserError(
            "training.loss: cosent orders pairs by their scores, and these have none; name pairs.source.fields.score"
        )
    together = config.loss in CONTRASTIVE
    train = read_pairs(pairs, "train", together=together)
    # A text that stands in two pairs of a batch would be its own wrong answer.
    usable = min(len({pair[side] for pair in train}) for side in ("question", "positive")) if together else len(train)
    if usable < config.batch_size:
        raise UserError(
            f"training.batch_size: {config.batch_size} pairs need as many different texts, and the training split has"
            f" {usable}; use at most {usable}, or more pairs"
        )
    if config.validate_every is not None and not read_pairs(pairs, "validation", together=True):
        raise UserError(
            f"training.validate_every: {config.validate_every}, and there are no validation pairs; raise"
            " pairs.validation_fraction or leave validate_every out"
        )
    if config.steps is not None:
        return config.steps
    assert config.epochs is not None
    return max(1, round(config.epochs * (len(train) // config.batch_size)))


def engine(config: EmbeddingTrainingConfig, steps: int) -> TrainingConfig:
    """What the launcher needs to know of the section."""
    return TrainingConfig(
        steps=steps,
        global_batch_size=config.batch_size,
        micro_batch_size=config.batch_size // config.processes_per_node,
        parallel=ParallelConfig(processes_per_node=config.processes_per_node),
        learning_rate=config.learning_rate,
        min_learning_rate=0.0,
        precision=config.precision,
        accelerator=config.accelerator,
        threads_per_process=config.threads_per_process,
        seed=config.seed,
    )


def _announce(config: EmbeddingTrainingConfig, steps: int, digest: str, pairs: Manifest) -> None:
    count = pairs.counts["train_pairs"]
    summary = {
        "loss": config.loss,
        "steps": steps,
        "batch_size": config.batch_size,
        "train_pairs": count,
        "epochs": round(steps * config.batch_size / count, 2),
        "world_size": config.processes_per_node,
    }
    logger.info("%s", ", ".join(f"{key} {value}" for key, value in summary.items()))
    tracking.log_params({**summary, "base_digest": digest})
    track_pairs(pairs, "train", *(["validation"] if config.validate_every is not None else []))


if __name__ == "__main__":
    run_rank(train, sys.argv)
