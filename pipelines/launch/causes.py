"""Why a step ended when it could not say so itself: killed, out of memory, never imported."""

from __future__ import annotations

import re
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from modelmill.components.core.events import append_line, step_of
from modelmill.pipelines.launch.runs import Run
from modelmill.pipelines.launch.tracker import close_step
from modelmill.pipelines.launch.watch import RunView, StepView

_EXCEPTION = re.compile(r"^[\w.]*(Error|Exception|Exit|Interrupt)\b.*")
_TAIL = 64 * 1024  # bytes of a log that are searched for the reason


@dataclass(frozen=True)
class Cancellation:
    """Why and when a run was told to end; steps that fail from then on are not to blame."""

    reason: str
    time: float


def blame(run: Run, view: RunView, *, driver: int = 0, cancelled: Cancellation | None = None) -> str:
    """Give every step that ended without a word its `failed` event and its end in the spool.

    Args:
        run: the run.
        view: its steps, up to date; brought up to date again.
        driver: how the driver ended.
        cancelled: set when the run was cancelled; the steps that ran then count as cancelled too.

    Returns:
        What went wrong with the run, in one line; empty when it was cancelled.
    """
    task = _step_of(view.message, view) if view.fault == "step" else None
    for step in view.steps.values():
        silent = step.state == "running" or (step_of(step.name) == task and not step.settled)
        stopped = cancelled is not None and step.state == "failed" and (step.ended or 0.0) >= cancelled.time
        if not silent and not stopped:
            continue
        if cancelled is None:
            kind, reason = "crash", _cause(run, step)
        else:
            kind, reason = "cancelled", step.message if stopped else cancelled.reason
        event = {"time": time.time(), "step": step.name, "event": "failed", "kind": kind, "message": reason}
        append_line(run.folder / "events.jsonl", event)
        close_step(run, step.name, "KILLED" if cancelled else "FAILED")
    view.refresh()
    if cancelled:
        return ""
    if view.failed:
        return "; ".join(f"{step.name}: {step.message}" for step in view.failed)
    if view.fault and view.fault != "step":
        return view.message
    if view.fault == "step":
        return f"{view.message}: {last_words(run.folder / 'driver.log')}"
    return f"the driver {_ending(128 - driver if driver < 0 else driver)}; see {run.folder / 'driver.log'}"


def _step_of(task: str, view: RunView) -> str | None:
    """Step of a KFP task: the task is named as the step, with dashes."""
    return next((name for name in map(step_of, view.steps) if name.replace("_", "-") == task), None)


def _cause(run: Run, step: StepView) -> str:
    ending = _ending(_exit_code(run.folder / "exits", step_of(step.name)))
    if step.state == "running":
        return f"{ending}; see {run.log_path(step.name)}"
    return f"{ending} before it began: {last_words(run.folder / 'driver.log')}"


def _exit_code(path: Path, step: str) -> int | None:
    """Exit status the step's interpreter left: the last one under its name, else the last failure of all."""
    lines = [line.split() for line in path.read_text().splitlines()] if path.exists() else []
    failures = [(int(words[0]), words[1:]) for words in lines if words and words[0] != "0"]
    named = [code for code, words in failures if words == [step]]
    codes = named or [code for code, _ in failures]
    return codes[-1] if codes else None


def _ending(code: int | None) -> str:
    if code is None:
        return "ended without an exit status"
    if code == 128 + signal.SIGKILL:
        return "was killed by SIGKILL (out of memory, or `kill -9`)"
    if code > 128:
        try:
            return f"was killed by {signal.Signals(code - 128).name}"
        except ValueError:
            pass
    return f"exited with code {code}"


def last_words(log: Path) -> str:
    """The last exception a log shows, else its last line."""
    if not log.exists():
        return "no output"
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - _TAIL))
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    exceptions = [line for line in lines if _EXCEPTION.match(line) and "Inner task failed" not in line]
    return (exceptions or lines or ["no output"])[-1][:500]
