"""The training loop: one for pretraining, fine-tuning and adapters. What one step does, in order:

1. take the global batch's part of this rank, fetched while the previous step ran;
2. for each micro-batch: forward and backward, gradients averaged over the data-parallel ranks with the last one;
3. clip the norm of the whole gradient, set the learning rate of the step, update the weights;
4. at logged steps only, read loss and norm back from the device and report them;
5. when due: validation, checkpoint; when told to stop: checkpoint, and out.

Nothing between two logged steps waits for the device.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from modelmill.components.core.errors import UserError
from modelmill.components.training.checkpoint import Checkpoints, Progress
from modelmill.components.training.clock import Clock
from modelmill.components.training.config import TrainingConfig
from modelmill.components.training.feed import Batches, Feed
from modelmill.components.training.journal import Journal
from modelmill.components.training.optimizer import make_optimizer, set_learning_rate
from modelmill.components.training.schedule import learning_rate
from modelmill.components.training.worker import RankContext, StopRequestedError

Objective = Callable[[nn.Module, Tensor], Tensor]
"""Model and micro-batch [b, T + 1] of int64 tokens on the device to the mean loss over its targets, a scalar.

Every micro-batch weighs the same, so each must hold the same number of targets.
"""


@dataclass(frozen=True)
class TrainingData:
    """What a run reads.

    Attributes:
        batches: the training split.
        validation: rows [R, T + 1] of the validation split, the same on every rank; may be empty.
    """

    batches: Batches
    validation: np.ndarray


class TrainingLoop:
    """Trains a model that lies on this rank's device."""

    def __init__(
        self,
        *,
        model: nn.Module,
        objective: Objective,
        data: TrainingData,
        config: TrainingConfig,
        ranks: RankContext,
        checkpoints: Checkpoints,
        journal: Journal,
        flops_per_token: float = 0.0,
        peak_flops: float | None = None,
    ) -> None:
        """
        Args:
            model: the same weights on every rank.
            objective: what is minimised.
            data: rows of both splits.
            config: the training section.
            ranks: who this rank is.
            checkpoints: where the state is kept.
            journal: where points go.
            flops_per_token: floating-point operations of forward and backward for one token.
            peak_flops: dense peak of one device in the run's precision, None when it is not known.
        """
        self.model, self.objective, self.data, self.config, self.ranks = model, objective, data, config, ranks
        self.checkpoints, self.journal = checkpoints, journal
        self.flops_per_token, self.peak_flops = flops_per_token, peak_flops
        self.optimizer = make_optimizer(model, config)
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.wrapped = _data_parallel(model, ranks)
        self.progress = Progress()
        self.clock = Clock()
        # First step whose gradient was not finite, -1 for none; kept on the device so that looking costs nothing.
        self.first_bad_step = torch.full((), -1, dtype=torch.int64, device=ranks.device)
        self.mark = (0.0, 0)  # training seconds and tokens at the last logged step

    def run(self) -> dict[str, float]:
        """Train from the newest checkpoint to the last step.

        Returns:
            Metrics of the run: losses, throughput, times.

        Raises:
            UserError: the loss or the gradient became infinite or nan.
            StopRequestedError: a rank was told to stop; the checkpoint of the last finished step is on the disk.
        """
        config = self.config
        self.progress = self.checkpoints.load_latest(self.model, self.optimizer)
        self.journal.resume(self.progress.step)
        first = self.progress
        if first.step:
            self.journal.say("going on after step %d", first.step)
        self.clock, self.mark = Clock(), (0.0, first.tokens)
        self.model.train()
        with Feed(self.data.batches, self.ranks, range(first.step, config.steps)) as feed:
            while self.progress.step < config.steps:
                with self.clock.on("data"):
                    rows = next(feed)
                loss, norm = self._train_step(rows)
                self._after_step(loss, norm)
        seconds = self.clock.training
        return {**self._summary(first, seconds), **self.journal_metrics()}

    def _train_step(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """One optimizer step on this rank's rows [b, T + 1]; returns its loss (this rank's mean) and gradient norm."""
        config, step = self.config, self.progress.step
        rows = rows.to(self.ranks.device, non_blocking=True)
        micro_batches = rows.split(config.micro_batch_size)
        self.optimizer.zero_grad(set_to_none=True)
        losses = []
        for index, micro_batch in enumerate(micro_batches):
            with self._gradient_sync(index == len(micro_batches) - 1):
                with self._autocast():
                    loss = self.objective(self.wrapped, micro_batch) / len(micro_batches)
                loss.backward()
            losses.append(loss.detach())
        total = torch.stack(losses).sum()
        if config.clip_norm is None:
            norm = nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        else:
            norm = nn.utils.clip_grad_norm_(self.parameters, config.clip_norm)
        set_learning_rate(self.optimizer, learning_rate(step, config))
        self.optimizer.step()
        bad = (self.first_bad_step < 0) & ~torch.isfinite(norm + total)
        self.first_bad_step = torch.where(bad, step + 1, self.first_bad_step)
        tokens = config.global_batch_size * (rows.shape[1] - 1)
        self.progress = Progress(step + 1, self.progress.tokens + tokens)
        return total, norm

    def _after_step(self, loss: Tensor, norm: Tensor) -> None:
        config, step = self.config, self.progress.step
        last = step == config.steps
        if step % config.log_every == 0 or step == 1 or last:
            self._report(loss, norm)
        if last or (config.validate_every and step % config.validate_every == 0):
            self._validate()
        stop = self.ranks.stop.requested()
        # The last step is checkpointed too: what follows, the export, may fail.
        if stop or last or (config.checkpoint_every and step % config.checkpoint_every == 0):
            self._checkpoint()
        if stop and not last:
            raise StopRequestedError(f"after step {step} of {config.steps}")

    def _report(self, loss: Tensor, norm: Tensor) -> None:
        self._refuse_bad_numbers()
        # The one read of the device between two logged steps.
        values = torch.stack([self._mean(loss), norm.to(loss.dtype)]).tolist()
        progress, training = self.progress, self.clock.training
        seconds, tokens = training - self.mark[0], progress.tokens - self.mark[1]
        self.mark = (training, progress.tokens)
        record = {
            "step": progress.step,
            "loss": values[0],
            "learning_rate": learning_rate(progress.step - 1, self.config),
            "grad_norm": values[1],
            "tokens": progress.tokens,
        }
        self.journal.trained(record, self._speed(tokens, seconds))

    def _validate(self) -> None:
        """Mean loss over the validation rows, each read by one rank."""
        config, ranks = self.config, self.ranks
        rows = self.data.validation[: config.validation_rows]
        if not len(rows):
            return
        self._refuse_bad_numbers()
        ranks.accelerator.synchronize()
        with self.clock.on("validation"), torch.no_grad():
            self.model.eval()
            sums = torch.zeros(2, dtype=torch.float64, device=ranks.device)
            mine = rows[ranks.data_rank :: ranks.data_degree]
            for start in range(0, len(mine), config.micro_batch_size):
                part = torch.from_numpy(np.ascontiguousarray(mine[start : start + config.micro_batch_size], np.int64))
                with self._autocast():
                    loss = self.objective(self.model, part.to(ranks.device))
                sums[0] += loss.double() * len(part)
                sums[1] += len(part)
            if ranks.world_size > 1:
                dist.all_reduce(sums)
            self.model.train()
            self.journal.validated(self.progress.step, float(sums[0] / sums[1]))

    def _checkpoint(self) -> None:
        self._refuse_bad_numbers()
        self.ranks.accelerator.synchronize()
        with self.clock.on("checkpoint"):
            self.checkpoints.save(self.progress, self.model, self.optimizer)

    def _refuse_bad_numbers(self) -> None:
        # Ranks see the same norm, but only their own loss: they must agree, or some would wait for ever.
        worst = self.first_bad_step.clone()
        if self.ranks.world_size > 1:
            dist.all_reduce(worst, op=dist.ReduceOp.MAX)
        if (step := int(worst.item())) >= 0:
            rate = learning_rate(step - 1, self.config)
            raise UserError(
                f"training.learning_rate: the loss or its gradient became infinite or nan at step {step}, at learning"
                f" rate {rate:.3g}; lower training.learning_rate or raise training.warmup_steps"
            )

    def _mean(self, value: Tensor) -> Tensor:
        """Mean over the data-parallel ranks."""
        if self.ranks.world_size == 1:
            return value
        value = value.clone()
        dist.all_reduce(value)
        return value / self.ranks.world_size

    def _speed(self, tokens: int, seconds: float) -> dict[str, float]:
        """Throughput, and model FLOPs utilisation when the device's peak is known.

        MFU (PaLM, arXiv:2204.02311, appendix B) = tokens/s x FLOPs a token / (devices x peak FLOP/s of one).
        """
        rate = tokens / max(seconds, 1e-9)
        per_device = rate / self.ranks.world_size
        speed = {"tokens_per_second": rate, "tokens_per_second_per_device": per_device}
        if self.peak_flops:
            speed["mfu"] = per_device * self.flops_per_token / self.peak_flops
        return speed

    def _summary(self, first: Progress, seconds: float) -> dict[str, float]:
        spent = self.clock.spent
        peak = torch.tensor(float(self.ranks.accelerator.peak_memory()), dtype=torch.float64, device=self.ranks.device)
        if self.ranks.world_size > 1:
            dist.all_reduce(peak, op=dist.ReduceOp.MAX)
        summary = {
            "training_seconds": seconds,
            "validation_seconds": spent["validation"],
            "checkpoint_seconds": spent["checkpoint"],
            "data_wait_share": spent["data"] / max(seconds, 1e-9),
            "peak_memory_bytes": peak.item(),
        }
        if self.progress.step > first.step:
            summary |= self._speed(self.progress.tokens - first.tokens, seconds)
        return summary

    def journal_metrics(self) -> dict[str, float]:
        """Losses as last reported, on rank 0."""
        names = {"loss": "train_loss", "validation_loss": "validation_loss", "grad_norm": "grad_norm"}
        return {names[key]: value for key, value in self.journal.latest.items() if key in names}

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.config.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.ranks.device.type, dtype=torch.bfloat16)

    def _gradient_sync(self, last: bool) -> AbstractContextManager[Any]:
        """Average gradients over the ranks with the last micro-batch only."""
        if last or not isinstance(self.wrapped, DistributedDataParallel):
            return nullcontext()
        return self.wrapped.no_sync()


def _data_parallel(model: nn.Module, ranks: RankContext) -> nn.Module:
    """Have gradients averaged over the data-parallel ranks; a single rank needs no wrapper."""
    if ranks.world_size == 1:
        return model
    devices = None if ranks.device.type == "cpu" else [ranks.device]
    # Buffers are constants here. torch 2.13 renamed the option that keeps them from being sent with every step.
    known = inspect.signature(DistributedDataParallel).parameters
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    options: dict[str, Any] = {buffers: False}
    return DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True, **options)
