"""What preference tuning says while it goes: the points of every run, and the rewards beside the losses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from modelmill.components.core import tracking
from modelmill.components.finetuning.dpo_objective import PreferenceObjective
from modelmill.components.training.journal import Journal
from modelmill.components.training.worker import RankContext


class PreferenceJournal(Journal):
    """A journal that adds the rewards up over all ranks, which call it together, and counts in pairs."""

    def __init__(self, path: Path, steps: int, objective: PreferenceObjective, ranks: RankContext) -> None:
        super().__init__(path, steps, enabled=ranks.is_main)
        self._objective, self._ranks = objective, ranks

    def trained(self, record: dict[str, Any], timings: dict[str, float]) -> None:
        record = {**record, "pairs": record["tokens"], **self._objective.trained(self._ranks)}
        del record["tokens"]
        super().trained(record, {})
        if self.enabled:
            rates = {name.replace("tokens", "pairs"): value for name, value in timings.items()}
            tracking.log_metrics(rates, step=record["step"])

    def validated(self, step: int, loss: float) -> None:
        self._write({"step": step, "validation_loss": loss, **self._objective.validated(self._ranks)}, {})
