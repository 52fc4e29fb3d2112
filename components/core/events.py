"""What a run reports while it goes: one JSON line an event, appended to `events.jsonl`.

The writer is a step (or its launcher), the reader is the command. A line is written with a single
`write` on a descriptor opened for appending, so lines of several processes never mix.
"""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RUN_VARIABLE = "MODELMILL_RUN_DIR"
STEP_VARIABLE = "MODELMILL_STEP"
RUN_ID_VARIABLE = "MODELMILL_RUN_ID"  # KFP's id of the run, in its pods
_PROGRESS_INTERVAL = 0.2  # seconds; a step may report as often as it likes

_last_progress = 0.0


def run_directory() -> Path | None:
    """Folder of the run this process belongs to, or None outside a run."""
    value = os.environ.get(RUN_VARIABLE)
    return Path(value) if value else None


def task_name(step: str, number: int | None = None) -> str:
    """Name of a step's task: the step's own, or `search_worker-2` of one among several of a loop."""
    return step if number is None else f"{step}-{number}"


def step_of(task: str) -> str:
    """Step of a task, by the task's name; a step's name has no dash."""
    return task.partition("-")[0]


def append_line(path: Path, record: dict[str, Any]) -> None:
    """Append one JSON record to a file.

    A disk that fills up in the middle leaves a torn line. The next record starts on a line of its own, so only the
    torn one is lost, and `read_lines` skips it.

    Raises:
        OSError: the record could not be written whole.
    """
    line = json.dumps(record, separators=(",", ":"), default=str).encode() + b"\n"
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            line = b"\n" + line
        if os.write(descriptor, line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    finally:
        os.close(descriptor)


def read_lines(path: Path, offset: int = 0) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (offset after the record, record) from a byte offset.

    A half-written tail is left for later. A line that is no JSON object, as a full disk leaves behind, is skipped.
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict):
                yield offset, record


def emit(event: str, *, step: str | None = None, **fields: Any) -> None:
    """Record an event of the current step (no-op outside a run).

    Args:
        event: `started`, `progress`, `reused`, `finished` or `failed`.
        step: the task's name; default the one this process runs.
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
