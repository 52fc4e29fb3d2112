"""The stability monitor: spikes, alarms, and steps whose update must not happen.

What decides about a step stays on the device, so that no step waits for an answer: the monitor turns the step's
gradient norm into a flag that the optimizer takes as `found_inf`. What it found is read at logged steps, all at once,
and only then becomes counts and records.

Definitions (the Llama 2 pretraining on Trainium described by AWS). The running mean covers the gradient norms of the
last `window` updates before a step, 20 in the article. A norm above that mean plus `spike_margin` (0.1) is a spike,
which lasts until a norm is below again. The alarm is a norm above `alarm_ratio` (3) times the lowest so far, or a
spike that lasts longer than `max_spike_steps`. Until the window is full there is neither spike nor alarm.

A step that is not finite belongs to no mean and neither ends a spike nor makes it longer. With `skip_step` the norms
of skipped spikes stay out of the mean too, so that one high norm does not hide the next. A lasting shift would then
never end: from the step after `max_spike_steps` on, updates are taken again, and the mean follows the shift.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from modelmill.components.training.options import StabilityConfig


@dataclass
class Findings:
    """What happened since the last look.

    Attributes:
        events: records for `history.jsonl`: a skipped update (`skipped`: `nonfinite` or `spike`), and the first step
            after a spike (`spike_start`, `spike_length`).
        alarm: what the first alarm was about, None without one.
        nonfinite_start: first step of the longest run of steps whose loss or gradient was infinite or nan.
        nonfinite_steps: length of that run, 0 without one.
    """

    events: list[dict[str, Any]] = field(default_factory=list)
    alarm: str | None = None
    nonfinite_start: int = 0
    nonfinite_steps: int = 0


@dataclass
class _Account:
    """Counts of the whole run as of the last look, and what is going on."""

    spikes: int = 0  # begun
    spike_start: int = 0  # of the newest one
    spike_length: int = 0  # of the newest one, so far
    spiking: bool = False
    skipped_steps: int = 0
    alarms: int = 0
    nonfinite: int = 0  # steps in a row, up to the newest


@dataclass(frozen=True)
class _Row:
    """One step as read back from the device; `mean`, `lowest` are from before it, `length` is from after it."""

    norm: float
    mean: float
    lowest: float
    length: float
    finite: float
    skipped: float
    alarm: float


class StabilityMonitor:
    """Watches the gradient norm, and on request the loss. Ranks that see the same numbers find the same."""

    def __init__(self, config: StabilityConfig, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        """
        Args:
            config: what counts as a spike or an alarm, and whether spikes are skipped.
            device: where norms and losses lie.
            dtype: to compute in.
        """
        self.config, self.device, self.dtype = config, device, dtype
        self.load({})

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what `state` returned; an empty one is the start of a run."""
        window = self.config.window
        norms, losses = state.get("norms", [])[-window:], state.get("losses", [])[-window:]
        lowest = state.get("lowest_grad_norm")
        self._norms = self._tensor([0.0] * (window - len(norms)) + norms)  # newest last
        self._losses = self._tensor([0.0] * (window - len(losses)) + losses)
        self._updates = torch.tensor(len(norms), device=self.device)  # norms in the window
        self._length = torch.tensor(state.get("length", 0), device=self.device)  # steps of the spike going on
        self._lowest = self._tensor(math.inf if lowest is None else lowest)
        self._rows: list[tuple[int, Tensor]] = []
        self._account = _Account(**{own.name: state[own.name] for own in fields(_Account) if own.name in state})
        self._last: _Row | None = None

    def state(self) -> dict[str, Any]:
        """Everything later findings depend on, as JSON values; waits for the device. Look before you ask."""
        updates, lowest = int(self._updates.item()), self._lowest.item()
        kept = slice(self.config.window - updates, None)
        return {
            "norms": self._norms[kept].tolist(),
            "losses": self._losses[kept].tolist() if self.config.loss_spike is not None else [],
            "lowest_grad_norm": lowest if math.isfinite(lowest) else None,
            "length": int(self._length.item()),
            **asdict(self._account),
        }

    @torch.no_grad()
    def observe(self, step: int, norm: Tensor, loss: Tensor | None = None) -> Tensor:
        """Judge a step between its backward pass and its update, without waiting for the device.

        Args:
            step: number of the step, from 1.
            norm: of the whole gradient before clipping, a scalar with the same bits on every rank. It must be nan or
                infinite whenever the loss of any rank is.
            loss: mean over all ranks, a scalar; needed with `loss_spike` only.

        Returns:
            A scalar in fp32 on the device: 1.0 if the optimizer must leave everything as it is, else 0.0.

        Raises:
            ValueError: `loss_spike` is set and there is no loss.
        """
        config = self.config
        norm = norm.to(self.dtype)
        finite = torch.isfinite(norm)
        full = self._updates == config.window
        mean = self._norms.sum() / self._updates.clamp(min=1)
        above = norm > mean + config.spike_margin
        if config.loss_spike is not None:
            if loss is None:
                raise ValueError("loss_spike needs the loss of every step")
            loss = loss.to(self.dtype)
            finite = finite & torch.isfinite(loss)
            deviation, loss_mean = torch.std_mean(self._losses)
            above = above | (loss > loss_mean + config.loss_spike * deviation)
        above = above & full & finite
        length = torch.where(finite, (self._length + 1) * above, self._length)
        lasting = length > config.max_spike_steps
        alarm = full & finite & (lasting | (norm > config.alarm_ratio * self._lowest))
        skipped = ~finite
        if config.action == "skip_step":
            skipped = skipped | (above & ~lasting)
        row = [norm, mean, self._lowest, *(flag.to(self.dtype) for flag in (length, finite, skipped, alarm))]
        self._rows.append((step, torch.stack(row)))
        self._norms = torch.where(skipped, self._norms, torch.cat([self._norms[1:], norm.view(1)]))
        if config.loss_spike is not None and loss is not None:
            self._losses = torch.where(skipped, self._losses, torch.cat([self._losses[1:], loss.view(1)]))
        self._updates = (self._updates + ~skipped).clamp(max=config.window)
        self._lowest = torch.where(finite, torch.minimum(self._lowest, norm), self._lowest)
        self._length = length
        return skipped.to(torch.float32)

    def look(self) -> Findings:
        """What the steps since the last look brought; the one place that waits for the device."""
        found = Findings()
        if self._rows:
            values = torch.stack([row for _, row in self._rows]).tolist()
            for (step, _), numbers in zip(self._rows, values, strict=True):
                self._note(step, _Row(*numbers), found)
            self._rows = []
        return found

    def series(self) -> dict[str, float]:
        """Numbers as of the last look, by the names of their series."""
        account, last = self._account, self._last
        counts: dict[str, float] = {
            "spikes": account.spikes,
            "spike_length": account.spike_length,
            "skipped_steps": account.skipped_steps,
            "alarms": account.alarms,
        }
        if last is None:
            return counts
        lowest = min(last.lowest, last.norm) if last.finite else last.lowest
        return {
            **({"grad_norm_mean": last.mean} if math.isfinite(last.lowest) else {}),  # there was an update before
            **({"lowest_grad_norm": lowest} if math.isfinite(lowest) else {}),
            **counts,
        }

    @property
    def in_spike(self) -> bool:
        """Whether a spike was going on at the last look."""
        return self._account.spiking

    def _note(self, step: int, row: _Row, found: Findings) -> None:
        account, config = self._account, self.config
        account.nonfinite = 0 if row.finite else account.nonfinite + 1
        if account.nonfinite > found.nonfinite_steps:
            found.nonfinite_start, found.nonfinite_steps = step - account.nonfinite + 1, account.nonfinite
        if row.skipped:
            account.skipped_steps += 1
            found.events.append({"step": step, "skipped": "spike" if row.finite else "nonfinite"})
        if row.length and not account.spiking:
            account.spikes += 1
            account.spike_start = step
        if account.spiking and not row.length:
            length = account.spike_length
            found.events.append({"step": step, "spike_start": account.spike_start, "spike_length": length})
        if row.length:
            account.spike_length = int(row.length)
        account.spiking = bool(row.length)
        if row.alarm:
            account.alarms += 1
            if row.length > config.max_spike_steps:
                alarm = f"at step {step} a spike has lasted {int(row.length)} steps, since step {account.spike_start}"
            else:
                alarm = (
                    f"gradient norm {row.norm:.3g} at step {step} is more than alarm_ratio"
                    f" {config.alarm_ratio:g} x the lowest so far, {row.lowest:.3g}"
                )
            found.alarm = found.alarm or alarm
        self._last = row

    def _tensor(self, values: float | list[float]) -> Tensor:
        return torch.tensor(values, dtype=self.dtype, device=self.device)
