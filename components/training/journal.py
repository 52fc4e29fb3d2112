"""What a training run says while it goes: `history.jsonl`, tracking points, progress and the log. Rank 0 only."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from modelmill.components.core import events, tracking

HISTORY = "history.jsonl"
_SERIES = {"tokens_per_second", "tokens_per_second_per_device", "mfu", "grad_norm", "validation_loss"}
logger = logging.getLogger("modelmill")


def track_outcome(output: Path, metrics: Mapping[str, float], steps: int) -> None:
    """Track what a finished job left: its history, and the metrics that are one number and no series.

    Args:
        output: the artifact's folder, with `history.jsonl`.
        metrics: of the job's result. Throughput and losses are series already; a second last point would double them.
        steps: optimizer steps of the job.
    """
    tracking.log_artifact(output / HISTORY)
    tracking.log_metrics({name: value for name, value in metrics.items() if name not in _SERIES}, step=steps)


class Journal:
    """Reports points of a run.

    `history.jsonl` holds what the run's result depends on and nothing else, no timings: two runs with the same seed
    write the same bytes, interrupted or not. Its records have a `step` and are in the order of the steps:

        loss, learning_rate, grad_norm, param_norm, tokens, ...   a logged step; what is not finite is left out
        validation_loss                                           a validation after the step
        skipped                                                   the step's update was left out: "nonfinite", "spike"
        spike_start, spike_length                                 the first step after a spike of the gradient norm
        rollbacks, cursor, alarm_step                             the step the run went back to, the batch it went on
                                                                  with, and the step that made it
    """

    def __init__(self, path: Path, steps: int, *, enabled: bool) -> None:
        """
        Args:
            path: of `history.jsonl`.
            steps: optimizer steps of the whole run.
            enabled: whether this rank reports.
        """
        self.path, self.steps, self.enabled = path, steps, enabled
        self.latest: dict[str, float] = {}
        self._alarm: str | None = None

    def resume(self, step: int, rollbacks: int = 0) -> None:
        """Forget everything after a step, and rollbacks after the first so many: the run goes on from there."""
        if not self.enabled:
            return
        kept = [
            record
            for _, record in events.read_lines(self.path)
            if record["step"] <= step and record.get("rollbacks", 0) <= rollbacks
        ]
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        temporary.write_text("".join(_line(record) for record in kept))
        os.replace(temporary, self.path)
        self.latest = {}
        for record in kept:
            self._remember(record)

    def trained(self, record: dict[str, Any], timings: dict[str, float]) -> None:
        """A logged step: `step` and its numbers; and what depends on the machine."""
        self._write(record, timings)

    def watched(self, records: Sequence[dict[str, Any]], alarm: str | None) -> None:
        """What the stability monitor found since it was last asked.

        Args:
            records: skipped updates and spikes that are over, from `monitor.Findings`.
            alarm: what the first alarm is about; warned of when the time before was without one.
        """
        if not self.enabled:
            return
        self._append(records)
        for reason, words in (("nonfinite", "an infinite or nan loss or gradient"), ("spike", "a spike")):
            steps = [str(record["step"]) for record in records if record.get("skipped") == reason]
            if steps:
                plural = "s" if len(steps) > 1 else ""
                logger.warning("skipped the update of step%s %s: %s", plural, ", ".join(steps), words)
        if alarm and not self._alarm:
            logger.warning("training is unstable: %s", alarm)
            tracking.set_tags({"stability.alarm": alarm})
        self._alarm = alarm

    def rolled_back(self, record: dict[str, Any], reason: str) -> None:
        """The run went back.

        Args:
            record: `step` it went back to, `rollbacks` so far, `cursor` and `alarm_step`.
            reason: what the alarm was about.
        """
        if not self.enabled:
            return
        self.resume(record["step"], record["rollbacks"])
        self._append([record])
        self._alarm = None
        message = (
            f"rollback {record['rollbacks']} from step {record['alarm_step']} to step {record['step']},"
            f" on with batch {record['cursor']}: {reason}"
        )
        logger.warning("%s", message)
        tracking.set_tags({f"stability.rollback.{record['rollbacks']}": message})

    def validated(self, step: int, loss: float) -> None:
        """A validation after a step."""
        self._write({"step": step, "validation_loss": loss}, {})

    def say(self, message: str, *values: object) -> None:
        """A line in the log."""
        if self.enabled:
            logger.info(message, *values)

    def _write(self, record: dict[str, Any], timings: dict[str, float]) -> None:
        if not self.enabled:
            return
        lost = [name for name, value in record.items() if not math.isfinite(value)]
        if lost:  # JSON has no nan
            logger.warning("step %d: %s infinite or nan", record["step"], " and ".join(lost))
            record = {name: value for name, value in record.items() if name not in lost}
        self._append([record])
        step = record["step"]
        values = {name: value for name, value in record.items() if name != "step"}
        tracking.log_metrics({**values, **timings}, step=step)
        self._remember(record)
        message = f"step {step}/{self.steps} loss {self.latest.get('loss', float('nan')):.3f}"
        if (validation := self.latest.get("validation_loss")) is not None:
            message += f" val {validation:.3f}"
        events.progress(message, step, self.steps)
        speed = f" {timings['tokens_per_second']:,.0f} tokens/s" if timings else ""
        logger.info("%s%s", message, speed)

    def _append(self, records: Sequence[dict[str, Any]]) -> None:
        with self.path.open("a") as file:
            file.writelines(_line(record) for record in records)

    def _remember(self, record: dict[str, Any]) -> None:
        self.latest.update({k: v for k, v in record.items() if k != "step" and not isinstance(v, str)})


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, separators=(",", ":")) + "\n"
