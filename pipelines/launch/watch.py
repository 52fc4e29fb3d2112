"""From the events of a run to what a person sees: the state of every step, and two ways of showing it."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

from modelmill.components.core.events import read_lines

_LINE_INTERVAL = 5.0  # seconds between two progress lines of one step when output is not a terminal
_SETTLED = ("finished", "reused", "failed", "cancelled")


@dataclass
class StepView:
    """One step as its events describe it.

    Attributes:
        state: `waiting`, `running`, `finished`, `reused`, `failed` or `cancelled`.
        began, ended: times of its last start and end; seconds: its duration once it has ended.
        message, done, total: its last progress report, or the reason of its failure.
        fault: `user`, `crash` or `cancelled` when it failed.
    """

    name: str
    state: str = "waiting"
    began: float | None = None
    ended: float | None = None
    seconds: float | None = None
    message: str = ""
    done: float | None = None
    total: float | None = None
    fault: str = ""
    counts: Mapping[str, int] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    uri: str = ""

    @property
    def settled(self) -> bool:
        return self.state in _SETTLED

    @property
    def elapsed(self) -> float | None:
        """Seconds it took, or has taken so far."""
        if self.seconds is not None or self.began is None:
            return self.seconds
        return max(0.0, time.time() - self.began)


class RunView:
    """The steps of a run, kept up to date from its `events.jsonl`."""

    def __init__(self, folder: Path, steps: Iterable[str]) -> None:
        self.steps = {name: StepView(name) for name in steps}
        self.fault = ""  # the driver's own failure, when no step is to blame
        self.message = ""
        self._path = folder / "events.jsonl"
        self._offset = 0

    def refresh(self) -> list[StepView]:
        """Read what was added since the last call; returns the steps that changed, one entry a change."""
        changed = []
        for offset, event in read_lines(self._path, self._offset):
            self._offset = offset
            if step := self._apply(event):
                changed.append(step)
        return changed

    def _apply(self, event: Mapping[str, Any]) -> StepView | None:
        name, kind = event["step"], event["event"]
        if not name:
            self.fault, self.message = event.get("kind", "crash"), event.get("message", "")
            return None
        step = self.steps.setdefault(name, StepView(name))
        if kind == "started":
            step.state, step.began, step.seconds, step.message = "running", event["time"], None, ""
            step.done = step.total = None
        elif kind == "progress":
            step.message, step.done, step.total = event.get("message", ""), event.get("done"), event.get("total")
        elif kind in ("finished", "reused"):
            step.state, step.message, step.uri = kind, "", event.get("uri", "")
            step.counts, step.metrics = event.get("counts", {}), event.get("metrics", {})
        elif kind == "failed":
            step.fault, step.message = event.get("kind", "crash"), event.get("message", "")
            step.state = "cancelled" if step.fault == "cancelled" else "failed"
        if step.settled and kind != "progress":
            step.ended = event["time"]
            step.seconds = None if step.began is None else step.ended - step.began
        return step

    @property
    def running(self) -> list[StepView]:
        return [step for step in self.steps.values() if step.state == "running"]

    @property
    def failed(self) -> list[StepView]:
        return [step for step in self.steps.values() if step.state == "failed"]

    @property
    def done(self) -> list[str]:
        """Names of the steps whose output exists."""
        return [step.name for step in self.steps.values() if step.state in ("finished", "reused")]

    @property
    def complete(self) -> bool:
        return bool(self.steps) and len(self.done) == len(self.steps)


def duration(seconds: float | None) -> str:
    """`0.4 s`, `12 s`, `3 min 05 s` or `2 h 04 min`."""
    if seconds is None:
        return ""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


class Display(Protocol):
    """Shows a run while it goes."""

    def update(self, view: RunView, changed: list[StepView]) -> None:
        """Show the current state; called several times a second."""

    def note(self, text: str) -> None:
        """Say one line about the run as a whole."""

    def close(self) -> None:
        """Leave the screen in order."""


class Silent:
    """Shows nothing: for callers that read the result."""

    def update(self, view: RunView, changed: list[StepView]) -> None:
        return

    def note(self, text: str) -> None:
        return

    def close(self) -> None:
        return


class PlainLines:
    """One line a change, for logs and pipes; progress of a step at most every five seconds."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._shown: dict[str, tuple[str, float]] = {}
        self._closed = False

    def update(self, view: RunView, changed: list[StepView]) -> None:
        for step in {step.name: step for step in changed}.values():
            state, last = self._shown.get(step.name, ("", 0.0))
            now = time.monotonic()
            if step.state == state and (not step.message or now - last < _LINE_INTERVAL):
                continue
            self._shown[step.name] = (step.state, now)
            self.note(self._sentence(step))

    def _sentence(self, step: StepView) -> str:
        parts = [f"{step.name}: {step.state}"]
        if step.settled:
            parts.append(f"after {duration(step.elapsed)}")
        if step.message:
            parts.append(f"- {step.message}{_share(step)}")
        return " ".join(parts)

    def note(self, text: str) -> None:
        if self._closed:
            return
        try:
            print(f"[{time.monotonic() - self._began:7.1f} s] {text}", flush=True)
        except OSError:  # the reader has gone (`| head`, a closed terminal): the run goes on
            self._closed = True

    def close(self) -> None:
        return


def _share(step: StepView) -> str:
    if step.done is None or not step.total:
        return ""
    return f" ({100 * step.done / step.total:.0f} %)"


class LiveTable:
    """A table that redraws in place: step, state, elapsed time, progress."""

    _STYLES: ClassVar[Mapping[str, str]] = {
        "waiting": "dim",
        "running": "bold cyan",
        "finished": "green",
        "reused": "blue",
        "failed": "bold red",
        "cancelled": "yellow",
    }

    def __init__(self) -> None:
        from rich.console import Console
        from rich.live import Live

        self._live = Live(console=Console(), auto_refresh=False, transient=False)
        self._notes: list[str] = []
        self._view: RunView | None = None
        self._closed = False
        self._drawn = 0.0
        self._live.start()

    def update(self, view: RunView, changed: list[StepView]) -> None:
        self._view = view
        now = time.monotonic()
        if changed or now - self._drawn > 0.25:
            self._drawn = now
            self._draw()

    def note(self, text: str) -> None:
        self._notes = [*self._notes[-2:], text]
        self._draw()

    def close(self) -> None:
        self._draw()
        if not self._closed:
            try:
                self._live.stop()
            except OSError:
                self._closed = True

    def _draw(self) -> None:
        if self._closed:
            return
        try:
            self._live.update(self._render(), refresh=True)
        except OSError:  # a closed terminal: the run goes on
            self._closed = True

    def _render(self) -> Any:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
        for step in self._view.steps.values() if self._view else ():
            style = self._STYLES[step.state]
            bar: ProgressBar | str = ""
            if step.state == "running" and step.total:
                bar = ProgressBar(total=step.total, completed=step.done or 0.0, width=20)
            message = Text(step.message, overflow="ellipsis", no_wrap=True)
            table.add_row(Text(step.name, style), Text(step.state, style), duration(step.elapsed), bar, message)
        return Group(table, *(Text(note, "dim") for note in self._notes))


def display() -> Display:
    """The way that suits standard output: a live table on a terminal, plain lines elsewhere."""
    return LiveTable() if sys.stdout.isatty() else PlainLines()
