"""The training loop: one for pretraining, fine-tuning and adapters. What one step does, in order:

1. take the global batch's part of this rank, fetched while the previous step ran;
2. for each micro-batch: forward and backward, gradients averaged over the copies of the model with the last one;
3. clip the norm of the whole gradient (over all shards), have the stability monitor judge it, set the learning rate of
   the step, update the weights, or with a bad loss or norm leave them as they are;
4. at logged steps only, read loss and norm back from the device and report them, or on an alarm go back;
5. when due: validation, checkpoint; when told to stop: checkpoint, and out.

Nothing between two logged steps waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from modelmill.components.core.errors import UserError
from modelmill.components.training.checkpoint import Checkpoints, Progress
from modelmill.components.training.clock import Clock
from modelmill.components.training.config import TrainingConfig
from modelmill.components.training.feed import Batches, Feed
from modelmill.components.training.gradients import global_norm, scale_to_norm
from modelmill.components.training.journal import Journal
from modelmill.components.training.monitor import Findings, StabilityMonitor
from modelmill.components.training.optimizer import RateScale, make_optimizer, set_found_inf, start_step
from modelmill.components.training.precision import autocast
from modelmill.components.training.schedule import learning_rate
from modelmill.components.training.sharding import gradient_sync, replicate
from modelmill.components.training.worker import RankContext, StopRequestedError

Objective = Callable[[nn.Module, Tensor], Tensor]
"""Model and micro-batch of int64 rows [b, ...] on the device to a scalar.

Of rows [b, T + 1] of tokens, which all hold as many targets: the mean loss over the micro-batch's targets. Of
`WeightedBatches`: the sum over them, which the loop divides by the targets of the whole global batch, so that every
target weighs the same on however many ranks and in whichever micro-batch it is. Without a target that sum is 0, with
gradients of 0.
"""


@dataclass(frozen=True)
class TrainingData:
    """What a run reads.

    Attributes:
        batches: the training split; `WeightedBatches` are summed up, see `Objective`.
        validation: rows [R, ...] of the validation split, the same on every rank; may be empty.
        validation_targets: targets of each of those rows, [R], for `WeightedBatches`.
    """

    batches: Batches
    validation: np.ndarray
    validation_targets: np.ndarray | None = None


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
        rate_scale: RateScale | None = None,
    ) -> None:
        """
        Args:
            model: laid out by `prepare`, on its device and initialised; copies have the same weights.
            objective: what is minimised.
            data: rows of both splits.
            config: the training section.
            ranks: who this rank is.
            checkpoints: where the state is kept.
            journal: where points go.
            flops_per_token: floating-point operations of forward and backward for one token.
            peak_flops: dense peak of one device in the run's precision, None when it is not known.
            rate_scale: for parameters that learn at another rate than the schedule's.
        """
        self.model, self.objective, self.data, self.config, self.ranks = model, objective, data, config, ranks
        self.checkpoints, self.journal = checkpoints, journal
        self.flops_per_token, self.peak_flops = flops_per_token, peak_flops
        self.optimizer = make_optimizer(model, config, rate_scale)
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.wrapped = replicate(model, ranks.mesh, ranks.device)
        self.progress = Progress()
        self.clock = Clock()
        exact = any(parameter.dtype == torch.float64 for parameter in self.parameters)
        self.monitor = StabilityMonitor(config.stability, ranks.device, torch.float64 if exact else torch.float32)
        self.mark = (0.0, 0)  # training seconds and tokens at the last logged step

    def run(self) -> dict[str, float]:
        """Train from the newest checkpoint to the last step.

        Returns:
            Metrics of the run: losses, throughput, times.

        Raises:
            UserError: the loss or the gradient stayed infinite or nan, or one rollback after the other did not help.
            StopRequestedError: a rank was told to stop; the checkpoint of the last finished step is on the disk.
        """
        first = self.progress = self.checkpoints.load_latest(self.model, self.optimizer)
        self.monitor.load(first.stability)
        self.journal.resume(first.step, first.rollbacks)
        if first.step:
            self.journal.say("going on after step %d", first.step)
        elif self.config.stability.action == "rollback" and first == Progress():
            self._checkpoint()  # so that there is always one to go back to
        self.clock, self.mark = Clock(), (0.0, first.tokens)
        self.model.train()
        while self.progress.step < self.config.steps:
            self._train_on_from_cursor()
        seconds = self.clock.training
        return {**self._summary(first, seconds), **self.journal_metrics()}

    def _train_on_from_cursor(self) -> None:
        """Train on consecutive batches to the last step, or until the run went back and skips some."""
        start, left = self.progress.cursor, self.config.steps - self.progress.step
        with Feed(self.data.batches, self.ranks, range(start, start + left)) as feed:
            while self.progress.step < self.config.steps:
                with self.clock.on("data"):
                    rows, targets = next(feed)
                loss, norm = self._train_step(rows, targets)
                if self._after_step(loss, norm):
                    return

    def _train_step(self, rows: Tensor, targets: int | None) -> tuple[Tensor, Tensor]:
        """One optimizer step on this rank's rows [b, ...]; returns the loss and the norm of the gradient.

        The loss is this rank's part: its mean over the data-parallel ranks is that of the global batch.
        """
        config, step = self.config, self.progress.step
        rows = rows.to(self.ranks.device, non_blocking=True)
        micro_batches = rows.split(config.micro_batch_size)
        # Gradients are averaged over the data-parallel ranks, sums of losses as well: that takes the degree out again.
        divisor = len(micro_batches) if targets is None else targets / self.ranks.data_degree
        self.optimizer.zero_grad(set_to_none=True)
        losses = []
        for index, micro_batch in enumerate(micro_batches):
            with gradient_sync(self.wrapped, index == len(micro_batches) - 1):
                with self._autocast():
                    loss = self.objective(self.wrapped, micro_batch) / divisor
                losses.append(loss.detach())
                # 1 while all losses are finite, else nan: it makes the whole gradient nan, and averaging that tells
                # every other rank. So the norm alone says whether the step counts, the same on all ranks.
                loss.backward(torch.stack(losses).sum() * 0 + 1)
        total = torch.stack(losses).sum()
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        norm = global_norm(gradients, self.ranks.world_size)
        if config.clip_norm is not None:
            scale_to_norm(gradients, norm, config.clip_norm)
        start_step(self.optimizer, step, learning_rate(step, config))
        mean_loss = None if config.stability.loss_spike is None else self._mean(total)
        set_found_inf(self.optimizer, self.monitor.observe(step + 1, norm, mean_loss))
        self.optimizer.step()
        tokens = config.global_batch_size * (rows.shape[1] - 1) if targets is None else targets
        self.progress = replace(self.progress, step=step + 1, tokens=self.progress.tokens + tokens)
        return total, norm

    def _after_step(self, loss: Tensor, norm: Tensor) -> bool:
        """Report, validate, save, stop, as due; returns whether the run went back to a checkpoint."""
        config, step = self.config, self.progress.step
        last = step == config.steps
        log = step % config.log_every == 0 or step == 1 or last
        validate = last or (config.validate_every and step % config.validate_every == 0)
        # The last step is checkpointed too: what follows, the export, may fail.
        save = last or (config.checkpoint_every and step % config.checkpoint_every == 0)
        stop = self.ranks.stop.requested()
        went_back = bool(log or validate or save or stop) and self._act_on_findings()
        if not went_back:
            if log:
                self._report(loss, norm)
            if validate:
                self._validate()
            # Nobody wants to go back into a spike.
            if stop or last or (save and not (config.stability.action == "rollback" and self.monitor.in_spike)):
                self._checkpoint()
        if stop and self.progress.step < config.steps:
            raise StopRequestedError(f"after step {self.progress.step} of {config.steps}")
        return went_back

    def _report(self, loss: Tensor, norm: Tensor) -> None:
        # With what the monitor holds, all that is read of the device between two logged steps.
        sizes = [self._mean(loss), norm, global_norm(self.parameters, self.ranks.world_size)]
        values = torch.stack([value.to(loss.dtype) for value in sizes]).tolist()
        progress, training = self.progress, self.clock.training
        seconds, tokens = training - self.mark[0], progress.tokens - self.mark[1]
        self.mark = (training, progress.tokens)
        record = {
            "step": progress.step,
            "loss": values[0],
            "learning_rate": learning_rate(progress.step - 1, self.config),
            "grad_norm": values[1],
            "param_norm": values[2],
            "tokens": progress.tokens,
            **self.monitor.series(),
        }
        self.journal.trained(record, self._speed(tokens, seconds))

    def _validate(self) -> None:
        """Mean loss over the targets of the validation rows, each read by one rank (of one tensor group)."""
        config, ranks = self.config, self.ranks
        rows, weights = self.data.validation[: config.validation_rows], self.data.validation_targets
        if not len(rows):
            return
        ranks.accelerator.synchronize()
        with self.clock.on("validation"), torch.no_grad():
            self.model.eval()
            sums = torch.zeros(2, dtype=torch.float64, device=ranks.device)
            share, size = slice(ranks.data_rank, None, ranks.data_degree), config.micro_batch_size
            mine, held = rows[share], None if weights is None else weights[: len(rows)][share]
            # As many forward passes on every rank, since a sharded model gathers its weights in each: a rank that
            # has run out of rows sends another's through and counts them as none.
            for start in range(0, -(-len(rows) // ranks.data_degree), size):
                part = mine[start : start + size]
                tokens = torch.from_numpy(np.ascontiguousarray(part if len(part) else rows[:1], np.int64))
                with self._autocast():
                    loss = self.objective(self.model, tokens.to(ranks.device))
                if held is None:
                    sums[0] += loss.double() * len(part)
                    sums[1] += len(part)
                elif len(part):
                    sums[0] += loss.double()
                    sums[1] += int(held[start : start + size].sum())
            if ranks.world_size > 1:
                dist.all_reduce(sums)  # a tensor group's ranks add the same to both sums, which their ratio undoes
            self.model.train()
            self.journal.validated(self.progress.step, float(sums[0] / sums[1]))

    def _checkpoint(self) -> None:
        self.ranks.accelerator.synchronize()
        with self.clock.on("checkpoint"):
            progress = replace(self.progress, stability=self.monitor.state())
            self.checkpoints.save(progress, self.model, self.optimizer)

    def _act_on_findings(self) -> bool:
        """Read what the monitor found since it was last asked; returns whether the run went back to a checkpoint."""
        found, stability = self.monitor.look(), self.config.stability
        diverged = found.nonfinite_steps >= min(stability.max_nonfinite_steps, self.config.steps)
        if stability.action == "rollback":
            unstable = torch.tensor(int(diverged or found.alarm is not None), device=self.ranks.device)
            if self.ranks.world_size > 1:  # all or none
                dist.all_reduce(unstable, op=dist.ReduceOp.MAX)
            if unstable.item():
                self._roll_back(found)
                return True
        self.journal.watched(found.events, found.alarm)
        if diverged:
            raise UserError(
                f"training.learning_rate: {self._divergence(found)}; lower training.learning_rate or raise"
                " training.warmup_steps"
            )
        return False

    def _divergence(self, found: Findings) -> str:
        start, length = found.nonfinite_start, found.nonfinite_steps
        return (
            f"the loss or its gradient became infinite or nan at step {start} and was so for {length} steps in a row,"
            f" at learning rate {learning_rate(start - 1, self.config):.3g}"
        )

    def _roll_back(self, found: Findings) -> None:
        """Go back to the newest checkpoint, and on with batches after all that were seen since.

        PaLM (arXiv:2204.02311, section 5.1) restarted about 100 steps before a spike and left out the 200 to 500
        batches around it: what spikes is a batch together with the weights it meets.
        """
        came_from, stability = self.progress, self.config.stability
        reason = found.alarm or self._divergence(found)
        if came_from.rollbacks == stability.max_rollbacks:
            raise UserError(
                f"training.stability.max_rollbacks: {came_from.rollbacks} rollbacks did not help: {reason}; lower"
                " training.learning_rate, or raise training.stability.alarm_ratio or rollback_skip_batches"
            )
        with self.clock.on("checkpoint"):
            self.optimizer.state.clear()  # the checkpoint of step 0 holds none
            back = self.checkpoints.load_latest(self.model, self.optimizer)
        if back == Progress():
            raise UserError(
                f"checkpoints: no sound one is left in {self.checkpoints.folder} to go back to, and {reason};"
                " start the run again with training.stability.action log"
            )
        cursor = max(came_from.cursor, back.cursor + stability.rollback_skip_batches)
        rollbacks = came_from.rollbacks + 1
        self.progress = replace(back, skipped_batches=cursor - back.step, rollbacks=rollbacks)
        self.monitor.load(back.stability)
        self.mark = (self.clock.training, back.tokens)
        record = {"step": back.step, "rollbacks": rollbacks, "cursor": cursor, "alarm_step": came_from.step}
        self.journal.rolled_back(record, reason)

    def _mean(self, value: Tensor) -> Tensor:
        """Mean over the data-parallel ranks; a tensor group's ranks have the same value, so over all ranks too."""
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
        return autocast(self.config.precision, self.ranks.device.type)
