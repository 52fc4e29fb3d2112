"""What each training process does: the trainer of sentence-transformers, told how this project stops and reports.

Every process takes its part of the same batches, and the ranking losses compare a question with the texts of all
processes, so that the trajectory does not depend on their number. A checkpoint counts once it is written whole.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer import losses
from torch import nn
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from modelmill.components.core.errors import UserError
from modelmill.components.core.manifest import Manifest
from modelmill.components.core.weights import weights_digest
from modelmill.components.embedding.config import CONTRASTIVE, EmbeddingTrainingConfig
from modelmill.components.embedding.encoder import embed, load_encoder
from modelmill.components.embedding.pairs import read_pairs
from modelmill.components.embedding.retrieval import Held, rank, score
from modelmill.components.training.journal import HISTORY, Journal
from modelmill.components.training.launch import LAUNCHED_VARIABLE, TrainingResult
from modelmill.components.training.worker import RankContext, StopRequestedError

_CHECKPOINTS, _WHOLE = "checkpoints", "whole"
_VALIDATION_BATCH = 64
logger = logging.getLogger("modelmill")


def train(
    ranks: RankContext, config: EmbeddingTrainingConfig, pairs: Manifest, base: Path, output: Path, steps: int
) -> TrainingResult:
    """Tune the model in `base` and write it to `output/model`; called by every rank.

    Raises:
        UserError: the base has parts that are not trained here, the pairs fill no batch, or training diverged.
        StopRequestedError: a rank was told to stop, and the checkpoint is written.
    """
    model = load_encoder(base, str(ranks.device), config.max_sequence_length)
    start = time.time() - float(os.environ[LAUNCHED_VARIABLE])
    checkpoints = ranks.scratch / _CHECKPOINTS
    newest = newest_checkpoint(checkpoints, clean=ranks.is_main)
    done = _step_of(newest) if newest else 0
    journal = Journal(ranks.scratch / HISTORY, steps, enabled=ranks.is_main)
    journal.resume(done)
    if newest:
        journal.say("going on from step %d", done)
    held = Held.of(read_pairs(pairs, "validation", together=True)) if config.validate_every is not None else None
    reporter = _Reporter(ranks, journal, config, steps, held)
    trainer = _Trainer(
        model=model,
        args=_arguments(ranks, config, checkpoints, steps),
        train_dataset=_dataset(pairs, config),
        loss=make_loss(model, config, ranks.world_size),
        callbacks=[reporter],
    )
    trainer.remove_callback(PrinterCallback)
    began = time.perf_counter()
    trainer.train(resume_from_checkpoint=str(newest) if newest else None)
    seconds, reached = time.perf_counter() - began, trainer.state.global_step
    if reached < steps and reporter.stopped:
        raise StopRequestedError(f"after step {reached} of {steps}")
    if reached < steps:
        raise UserError(f"training.batch_size: {config.batch_size} different pairs are never found; use a smaller one")
    return _finish(
        ranks,
        model,
        reporter,
        output,
        steps,
        {"start_seconds": start, "pairs_per_second": (steps - done) * config.batch_size / seconds},
    )


def make_loss(model: SentenceTransformer, config: EmbeddingTrainingConfig, world_size: int) -> nn.Module:
    """The loss of the section.

    Multiple negatives ranking: Henderson et al. 2017 (arXiv:1705.00652); cached: Gao et al. 2021 (arXiv:2101.06983).
    """
    if config.loss == "cosent":
        return losses.CoSENTLoss(model, scale=config.scale)
    options: dict[str, Any] = {"scale": config.scale, "gather_across_devices": world_size > 1}
    if config.mini_batch_size is not None:
        return losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=config.mini_batch_size, **options)
    if config.loss == "symmetric_ranking":
        options |= {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}
    return losses.MultipleNegativesRankingLoss(model, **options)


def newest_checkpoint(folder: Path, *, clean: bool) -> Path | None:
    """The newest checkpoint that is whole; called by all ranks together, one of them removes the others' remains."""
    found = sorted(folder.glob("checkpoint-*"), key=_step_of)
    whole = [path for path in found if (path / _WHOLE).exists()]
    dist.barrier()
    if clean:
        for path in set(found) - set(whole):
            shutil.rmtree(path)
    dist.barrier()
    return whole[-1] if whole else None


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.partition("-")[2])


def _dataset(pairs: Manifest, config: EmbeddingTrainingConfig) -> Dataset:
    together = config.loss in CONTRASTIVE
    rows = read_pairs(pairs, "train", together=together)
    columns = ["question", "positive"] if together else ["question", "positive", "score"]
    return Dataset.from_dict({name: [row[name] for row in rows] for name in columns})


def _arguments(
    ranks: RankContext, config: EmbeddingTrainingConfig, folder: Path, steps: int
) -> SentenceTransformerTrainingArguments:
    return SentenceTransformerTrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        # Every rank reads the same batches and takes its part of each: what is unique in a batch is so for all ranks.
        per_device_train_batch_size=config.batch_size,
        accelerator_config={"split_batches": True},
        batch_sampler="no_duplicates" if config.loss in CONTRASTIVE else "batch_sampler",
        dataloader_drop_last=True,
        dataloader_pin_memory=ranks.device.type != "cpu",
        learning_rate=config.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=round(config.warmup_fraction * steps),
        weight_decay=config.weight_decay,
        max_grad_norm=config.clip_norm,
        bf16=config.precision == "bf16-mixed",
        use_cpu=ranks.device.type == "cpu",
        seed=config.seed,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no" if config.checkpoint_every is None else "steps",
        save_steps=config.checkpoint_every or 500,
        save_total_limit=config.keep_checkpoints,
        report_to="none",
        disable_tqdm=True,
    )


class _Trainer(SentenceTransformerTrainer):
    """The trainer without the model card that it would write, which names places and times."""

    def add_model_card_callback(self, default_args_dict: dict[str, Any]) -> None:
        pass


class _Reporter(TrainerCallback):
    """Writes the journal, passes a request to stop on, and marks checkpoints that are whole."""

    def __init__(
        self, ranks: RankContext, journal: Journal, config: EmbeddingTrainingConfig, steps: int, held: Held | None
    ) -> None:
        self._ranks, self._journal, self._config, self._steps, self._held = ranks, journal, config, steps, held
        self.stopped = False
        self.latest: dict[str, float] = {}

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs, step = kwargs["logs"], state.global_step
        if "loss" not in logs:
            return
        loss = float(logs["loss"])
        if not math.isfinite(loss):
            rate = f"training.learning_rate: {self._config.learning_rate:g}"
            raise UserError(f"{rate} made the loss of step {step} {loss}; lower it, or warm up longer")
        self.latest["final_loss"] = loss
        if step % self._config.log_every == 0 or step in (1, self._steps):
            named = {name: float(logs[name]) for name in ("learning_rate", "grad_norm") if name in logs}
            self._journal.trained({"step": step, "loss": loss, **named}, {})
        every = self._config.validate_every
        if every is not None and (step % every == 0 or step == self._steps):
            self._validate(kwargs["model"], step)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if self._ranks.stop.requested() and state.global_step < self._steps:
            self.stopped = control.should_save = control.should_training_stop = True
        return control

    def _validate(self, model: SentenceTransformer, step: int) -> None:
        """Ask the validation questions, on rank 0; the others go on to the next step and wait there."""
        if self._held is None or not self._ranks.is_main:
            return
        questions, corpus = (
            embed(model, texts, _VALIDATION_BATCH) for texts in (self._held.questions, self._held.corpus)
        )
        model.train()
        value = float(score(rank(questions, corpus, self._held.relevant))["ndcg_at_10"].mean())
        self.latest["validation_ndcg_at_10"] = value
        self._journal.trained({"step": step, "validation_ndcg_at_10": value}, {})

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        dist.barrier()  # every rank has written its random state
        if self._ranks.is_main:
            (Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / _WHOLE).touch()


def _finish(
    ranks: RankContext,
    model: SentenceTransformer,
    reporter: _Reporter,
    output: Path,
    steps: int,
    timings: dict[str, float],
) -> TrainingResult:
    """What rank 0 writes and reports."""
    counts = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "dimension": int(model.get_embedding_dimension() or 0),
        "max_sequence_length": int(model.max_seq_length or 0),
        "steps": steps,
        "world_size": ranks.world_size,
    }
    result = TrainingResult(counts=counts, metrics={**timings, **reporter.latest})
    if ranks.is_main:
        began = time.perf_counter()
        model.save_pretrained(str(output / "model"), create_model_card=False)
        shutil.copyfile(ranks.scratch / HISTORY, output / HISTORY)
        result.metadata["weights_digest"] = weights_digest(output / "model")
        result.metrics["export_seconds"] = time.perf_counter() - began
    return result
