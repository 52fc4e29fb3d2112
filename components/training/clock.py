"""Wall time of a run by what it was spent on."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Clock:
    """Wall time of a run by what it was spent on, in seconds."""

    spent: dict[str, float] = field(default_factory=lambda: {"data": 0.0, "validation": 0.0, "checkpoint": 0.0})
    started: float = field(default_factory=time.perf_counter)

    @contextmanager
    def on(self, part: str) -> Iterator[None]:
        """Count the time inside the block as a part's."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.spent[part] += time.perf_counter() - began

    @property
    def training(self) -> float:
        """Seconds of training steps, waiting for data included, validation and checkpoints not."""
        return time.perf_counter() - self.started - self.spent["validation"] - self.spent["checkpoint"]
