"""Pretraining: the step, and what each of its training processes does.

The step's own process stays without torch: it checks the run, has a launcher start this module once a rank, and
turns the result record into the artifact. `python -m modelmill.components.llama.pretrain JOB.json` is a rank.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelmill.components.core import tracking
from modelmill.components.core.errors import UserError
from modelmill.components.core.manifest import Manifest, json_digest
from modelmill.components.core.step import StepResult, step_options
from modelmill.components.core.weights import weights_digest
from modelmill.components.llama.config import LlamaConfig, PretrainConfig, layout_problem
from modelmill.components.training.config import TrainingConfig, check_run
from modelmill.components.training.journal import HISTORY, Journal, track_outcome
from modelmill.components.training.launch import (
    LAUNCHED_VARIABLE,
    Launcher,
    TrainingJob,
    TrainingResult,
    current_launcher,
)
from modelmill.components.training.worker import RankContext, run_rank

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from modelmill.components.training.attention_kernels import AttentionKernel
    from modelmill.components.training.loop import Objective

MODULE = "modelmill.components.llama.pretrain"
logger = logging.getLogger("modelmill")


@step_options(resumable=True, launches=True)
def pretrain(
    config: PretrainConfig, output: Path, *, tokenizer: Manifest, tokens: Manifest, launcher: Launcher | None = None
) -> StepResult:
    """Train a Llama decoder from random weights on packed tokens.

    Writes `model/` (a Hugging Face folder with the tokenizer) and `history.jsonl`. Checkpoints lie beside `output`,
    and a second call goes on from the newest.

    Args:
        config: model and training.
        output: the artifact's folder.
        tokenizer: whose files go beside the weights.
        tokens: packed rows of the train and validation splits.
        launcher: where the training processes run; default this machine.

    Raises:
        UserError: model, training, data and machine do not fit together, or training diverged.
        TrainingStoppedError: it was told to stop.
        RankFailedError: a training process crashed.
    """
    training = config.training
    model = config.model.model_copy(update={"vocab_size": check_run(config.model, training, tokens)})
    result = launch_training(model, training, output, tokenizer=tokenizer.folder(), tokens=tokens, launcher=launcher)
    metadata = {**result.metadata, "dataset_digest": tokens.digest, "tokenizer_digest": tokenizer.digest}
    return StepResult(kind="model", counts=result.counts, metrics=result.metrics, metadata=metadata)


def launch_training(
    model: LlamaConfig,
    training: TrainingConfig,
    output: Path,
    *,
    tokenizer: Path,
    tokens: Manifest,
    launcher: Launcher | None,
    base: Path | None = None,
) -> TrainingResult:
    """Check a training and have it run by its ranks: what every step that trains the decoder does.

    Args:
        model: the architecture, its vocabulary known.
        training: the training section.
        output: the artifact's folder.
        tokenizer: folder whose files go beside the weights.
        tokens: packed rows of the train and validation splits.
        launcher: where the processes run; default this machine.
        base: Hugging Face folder with the first weights; None draws them from the seed.

    Raises:
        UserError: they do not fit together, or training diverged.
    """
    place, length, parallel = launcher or current_launcher(), tokens.counts["sequence_length"], training.parallel
    if problem := layout_problem(model, parallel.tensor, length, parallel.sequence_parallel):
        raise UserError(problem)
    place.check(training)
    for split in ("train", "validation"):
        tokens.path(f"{split}.bin")  # verified once here; the ranks find it verified
    _announce(model, training, tokens)
    job = TrainingJob(
        module=MODULE,
        spec={
            "model": model.model_dump(mode="json"),
            "tokens": tokens.model_dump(mode="json"),
            "tokenizer": str(tokenizer.absolute()),
            "base": None if base is None else {"folder": str(base.absolute()), "digest": weights_digest(base)},
            "output": str(output.absolute()),
        },
        training=training,
        scratch=output.parent.absolute(),
        exports=(output.absolute() / "model",),
    )
    result = place.launch(job)
    track_outcome(output, result.metrics, training.steps)
    return result


def _announce(model: LlamaConfig, training: TrainingConfig, tokens: Manifest) -> None:
    """Say and track what is about to be trained, and on what."""
    summary = _describe(model, training, tokens)
    logger.info("%s", ", ".join(f"{name} {value:,}" for name, value in summary.items()))
    tracking.log_params(summary)
    units = ("rows", "tokens", "bytes")
    tracking.log_splits(tokens, ("train", "validation"), name="tokens", suffix=".bin", units=units)


def _describe(model: LlamaConfig, training: TrainingConfig, tokens: Manifest) -> dict[str, int]:
    """The run in figures, as people ask for them before it starts."""
    length = tokens.counts["sequence_length"]
    tokens_per_step = training.global_batch_size * length
    return {
        "parameters": model.num_parameters(),
        "vocab_size": model.known_vocab_size,
        "steps": training.steps,
        "tokens_per_step": tokens_per_step,
        "training_tokens": training.steps * tokens_per_step,
        "dataset_tokens": tokens.counts["train_tokens"],
        "world_size": training.parallel.world_size,
        "data_parallel": training.parallel.data_degree,
        "shard": training.parallel.shard,
        "tensor_parallel": training.parallel.tensor,
        "accumulation_steps": training.accumulation_steps,
    }


def next_token_loss(model: nn.Module, rows: Tensor) -> Tensor:
    """Mean cross entropy of predicting every token of rows [b, T + 1] from those before it, a scalar in nats."""
    return model(rows[:, :-1], rows[:, 1:])


def masked_next_token_loss(model: nn.Module, rows: Tensor, *, eos: int) -> Tensor:
    """The same, each token from those before it in its own document.

    The first token of a document is predicted from the end-of-text before it, and so from the document that ended.
    """
    from modelmill.components.training.documents import document_ids

    return model(rows[:, :-1], rows[:, 1:], document_ids(rows[:, :-1], eos))


def train(ranks: RankContext, spec: Mapping[str, Any], training: TrainingConfig) -> TrainingResult:
    """What one rank does: build, train, and take part in the export that rank 0 writes."""
    from modelmill.components.data.loader import BatchSource, open_rows
    from modelmill.components.llama.huggingface import export_huggingface, load_weights
    from modelmill.components.llama.model import LlamaDecoder
    from modelmill.components.training.checkpoint import Checkpoints
    from modelmill.components.training.estimate import peak_flops
    from modelmill.components.training.loop import TrainingData, TrainingLoop
    from modelmill.components.training.prepare import prepare

    config, tokens = LlamaConfig.model_validate(spec["model"]), Manifest.model_validate(spec["tokens"])
    output, history = Path(spec["output"]), ranks.scratch / HISTORY
    attention = _attention(config, training, tokens, ranks.device)
    model = LlamaDecoder(config, device="meta")
    model.attention_kernel = attention
    prepare(model, ranks, training)
    model.to_empty(device=ranks.device)
    base = spec["base"]
    if base is None:
        model.init_weights(training.seed)
    else:
        model.reset_rope(ranks.device)
        load_weights(model, base["folder"])
    batches = BatchSource(open_rows(tokens, "train"), training.seed, training.global_batch_size)
    loop = TrainingLoop(
        model=model,
        objective=_objective(training, tokens),
        data=TrainingData(batches, open_rows(tokens, "validation")),
        config=training,
        ranks=ranks,
        checkpoints=Checkpoints(
            ranks.scratch / "checkpoints",
            digest=json_digest(
                [spec["model"], training.deciding(), tokens.digest, *([base["digest"]] if base else [])]
            ),
            keep=training.keep_checkpoints,
            rank=ranks.rank,
            world_size=ranks.world_size,
        ),
        journal=Journal(history, training.steps, enabled=ranks.is_main),
        flops_per_token=config.flops_per_token(tokens.counts["sequence_length"]),
        peak_flops=peak_flops(ranks.accelerator.device_name(), training.precision),
    )
    start = time.time() - float(os.environ[LAUNCHED_VARIABLE])
    metrics = {"start_seconds": start, **loop.run()}
    counts = {
        "parameters": config.num_parameters(),
        "steps": loop.progress.step,
        "tokens": loop.progress.tokens,
        "world_size": ranks.world_size,
    }
    began = time.perf_counter()
    export_huggingface(model, output / "model", tokenizer_folder=spec["tokenizer"])
    if not ranks.is_main:
        return TrainingResult(counts=counts, metrics=metrics)
    shutil.copyfile(history, output / HISTORY)
    metrics["export_seconds"] = time.perf_counter() - began
    return TrainingResult(
        counts=counts, metrics=metrics, metadata={"weights_digest": weights_digest(output / "model")}
    )


def _objective(training: TrainingConfig, tokens: Manifest) -> Objective:
    if not training.document_masking:
        return next_token_loss
    return partial(masked_next_token_loss, eos=int(tokens.metadata["eos_token_id"]))


def _attention(
    config: LlamaConfig, training: TrainingConfig, tokens: Manifest, device: torch.device
) -> AttentionKernel:
    """The attention kernel the run asks for, if this device has it."""
    import torch

    from modelmill.components.data.loader import open_rows
    from modelmill.components.training.attention import AttentionNeeds, select
    from modelmill.components.training.documents import most_documents

    def most() -> int:
        eos = int(tokens.metadata["eos_token_id"])
        return max(most_documents(open_rows(tokens, split), eos) for split in ("train", "validation"))

    needs = AttentionNeeds(
        device=device,
        dtype=torch.float32 if training.precision == "fp32" else torch.bfloat16,
        head_dim=config.head_dim,
        grouped=config.num_kv_heads != config.num_heads,
        masked=training.document_masking,
        deterministic=training.deterministic,
    )
    return select(training.attention, needs, most_documents=most)


if __name__ == "__main__":
    run_rank(train, sys.argv)
