"""What a run reports while it goes: one JSON line an event, appended to `events.jsonl`.

The writer is a step (or its launcher), the reader is the command. A line is written with a single
`write` on a descriptor opened for appending, so lines of several processes never mix.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RUN_VARIABLE = "MODELMILL_RUN_DIR"
STEP_VARIABLE = "MODELMILL_STEP"
_PROGRESS_INTERVAL = 0.2  # seconds; a step may report as often as it likes

_last_progress = 0.0


def run_directory() -> Path | None:
    """Folder of the run this process belongs to, or None outside a run."""
    value = os.environ.get(RUN_VARIABLE)
    return Path(value) if value else None


def append_line(path: Path, record: dict[str, Any]) -> None:
    """Append one JSON record to a file, whole or not at all."""
    line = json.dumps(record, separators=(",", ":"), default=str) + "\n"
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)


def read_lines(path: Path, offset: int = 0) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (offset after the record, record) from a byte offset; a half-written tail is left for later."""
    if not path.exists():
        return
    with path.open("rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            yield offset, json.loads(line)


def emit(event: str, *, step: str | None = None, **fields: Any) -> None:
    """Record an event of the current step (no-op outside a run).

    Args:
        event: `started`, `progress`, `reused`, `finished` or `failed`.
        step: the step's name; default the one this process runs.
        fields: anything JSON can hold.
    """
    folder = run_directory()
    if folder is None:
        return
    name = step or os.environ.get(STEP_VARIABLE, "")
    append_line(folder / "events.jsonl", {"time": time.time(), "step": name, "event": event, **fields})


def progress(message: str, done: float | None = None, total: float | None = None) -> None:
    """Say how far the current step is; calls closer than 0.2 s are dropped except the last one of a total."""
    global _last_progress
    now = time.monotonic()
    if now - _last_progress < _PROGRESS_INTERVAL and not (done is not None and done == total):
        return
    _last_progress = now
    emit("progress", message=message, done=done, total=total)
