"""What a training run says while it goes: `history.jsonl`, tracking points, progress and the log. Rank 0 only."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

from modelmill.components.core import events, tracking

logger = logging.getLogger("modelmill")


class Journal:
    """Reports points of a run.

    `history.jsonl` holds what the run's result depends on and nothing else, no timings: two runs with the same seed
    write the same bytes, interrupted or not.
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

    def resume(self, step: int) -> None:
        """Forget everything after a step: the run goes on from there."""
        if not self.enabled:
            return
        kept = [record for _, record in events.read_lines(self.path) if record["step"] <= step]
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        temporary.write_text("".join(_line(record) for record in kept))
        os.replace(temporary, self.path)
        for record in kept:
            self._remember(record)

    def trained(self, record: dict[str, Any], timings: dict[str, float]) -> None:
        """A logged step: `step`, `loss`, `learning_rate`, `grad_norm`, `tokens`; and what depends on the machine."""
        self._write(record, timings)

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
        with self.path.open("a") as file:
            file.write(_line(record))
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

    def _remember(self, record: dict[str, Any]) -> None:
        self.latest.update({name: value for name, value in record.items() if name != "step"})


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, separators=(",", ":")) + "\n"
