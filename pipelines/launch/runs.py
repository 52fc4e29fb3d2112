"""The run index: one folder a run below `<home>/runs`, readable without any service.

recipe.yaml       the resolved recipe            events.jsonl    what the steps reported
sections.json     step -> its section            logs/           one file a step
run.json          state, times, exit code        driver.log      what kfp printed
environment.txt   installed packages             spool/          tracking records
workspace/        KFP's pipeline root            lock            held while the run is alive

A run is alive while a process holds `lock`. The kernel drops the lock with the last process that holds it, also
after SIGKILL or a power cut, in another container or after a reused process id; a recorded pid proves none of this.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from modelmill.components.core.errors import UserError, disk_error
from modelmill.components.core.home import Home

LATEST = "latest"
ENDED = ("succeeded", "failed", "cancelled")


@dataclass
class RunRecord:
    """Contents of `run.json`.

    Attributes:
        state: `running`, `succeeded`, `failed` or `cancelled` as last written; `Run.state` is the truth.
        recipe: the reference the run was started with (`laptop/llama-demo` or a path).
        dag: `module:function` of the pipeline.
        cwd: working directory, from which relative paths of the recipe count.
        steps: names of the steps in order.
        headline: `step.metric` names that sum the run up.
        resumed_from: run this one continues.
        finished_before: steps that had finished in the runs this one continues.
        temporary: folder of its temporary files, gone when the run has ended.
        exit_code: what `modelmill run` returned.
        place: where a run on a cluster is found: `endpoint`, `run_id` (of KFP), `profile`, `namespace`, `url`,
            `pipeline_version`; empty for a run on this machine.
    """

    run_id: str
    name: str
    pipeline: str
    recipe: str
    recipe_hash: str
    dag: str
    cwd: str
    steps: list[str]
    headline: list[str] = field(default_factory=list)
    state: str = "running"
    started: float = 0.0
    ended: float | None = None
    pid: int | None = None
    temporary: str = ""
    exit_code: int | None = None
    message: str = ""
    resumed_from: str | None = None
    finished_before: list[str] = field(default_factory=list)
    place: dict[str, str] = field(default_factory=dict)


class Run:
    """A run's folder and its record."""

    def __init__(self, folder: Path, record: RunRecord) -> None:
        self.folder = folder
        self.record = record

    @property
    def id(self) -> str:
        return self.record.run_id

    @classmethod
    def create(cls, home: Home, record: RunRecord, files: Mapping[str, str]) -> Run:
        """Make the folder of a new run, whole or not at all.

        Raises:
            UserError: the disk is full, read-only or forbidden.
        """
        folder = home.runs / record.run_id
        try:
            home.runs.mkdir(parents=True, exist_ok=True)
            folder.mkdir()
            for name in ("logs", "spool", "workspace"):
                (folder / name).mkdir()
            for name, text in files.items():
                _write_synced(folder / name, text)
            run = cls(folder, record)
            run.save()
        except OSError as error:
            shutil.rmtree(folder, ignore_errors=True)
            known = disk_error(error, home.root)
            raise known or UserError(
                f"MODELMILL_HOME: cannot write {home.runs} ({error.strerror}); set it to a folder you may write to"
            ) from None
        return run

    @classmethod
    def open(cls, folder: Path) -> Run:
        """Read a run's folder.

        Raises:
            UserError: its `run.json` is missing or damaged.
        """
        try:
            values = json.loads((folder / "run.json").read_text())
            return cls(folder, RunRecord(**values))
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"run: {folder} holds no readable run.json ({error}); delete the folder") from None

    def save(self) -> None:
        """Write `run.json` so that a reader sees all of it or nothing."""
        target = self.folder / "run.json"
        temporary = target.with_name(f".run.json.{os.getpid()}")
        _write_synced(temporary, json.dumps(asdict(self.record), indent=1) + "\n")
        os.replace(temporary, target)

    def hold(self) -> int:
        """Take the run's lock; it is held until every process that has the descriptor is gone."""
        descriptor = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        return descriptor

    @property
    def alive(self) -> bool:
        """Whether a process still works on the run."""
        try:
            descriptor = os.open(self.folder / "lock", os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)
        return False

    @property
    def state(self) -> str:
        """`running`, `succeeded`, `failed`, `cancelled`, or `interrupted` when it died without saying so.

        Of a run on a cluster it is what was seen last: see `kubeflow_runs.refresh`.
        """
        if self.record.state in ENDED or self.record.place:
            return self.record.state
        return "running" if self.alive else "interrupted"

    @property
    def seconds(self) -> float | None:
        """Wall time so far or in all; None when the run died at an unknown moment."""
        if self.record.ended is not None:
            return self.record.ended - self.record.started
        return time.time() - self.record.started if self.state == "running" else None

    def sections(self) -> dict[str, str]:
        """Step -> the section it received."""
        return json.loads((self.folder / "sections.json").read_text())

    def log_path(self, step: str) -> Path:
        return self.folder / "logs" / f"{step}.log"


def _write_synced(path: Path, text: str) -> None:
    """Write and reach the disk: a full disk or quota may only show when data is flushed."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def new_run_id(name: str) -> str:
    """A name that sorts by start time (UTC) and tells people what it is."""
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:32].strip("-") or "run"
    alphabet = "abcdefghjkmnpqrstuvwxyz23456789"
    random = "".join(secrets.choice(alphabet) for _ in range(4))
    return f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{slug}-{random}"


def all_runs(home: Home) -> list[Run]:
    """Runs from oldest to newest; folders without a readable record are left out."""
    found = []
    for folder in sorted(home.runs.glob("*/")) if home.runs.is_dir() else []:
        try:
            found.append(Run.open(folder))
        except UserError:
            continue
    return sorted(found, key=lambda run: (run.record.started, run.id))


def find_run(home: Home, reference: str) -> Run:
    """The run named `latest`, by id or by a part of the id that only one run has.

    Raises:
        UserError: no run, or several, answer to the name.
    """
    runs = all_runs(home)
    if not runs:
        raise UserError(f"run: there is no run in {home.runs}; start one with `modelmill run RECIPE`")
    if reference == LATEST:
        return runs[-1]
    on_cluster = [run for run in runs if run.record.place.get("run_id") == reference]
    matches = (
        on_cluster
        or [run for run in runs if run.id.startswith(reference)]
        or [run for run in runs if reference in run.id]
    )
    exact = [run for run in matches if run.id == reference]
    if len(exact or matches) == 1:
        return (exact or matches)[0]
    if not matches:
        raise UserError(f"run: no run is called {reference!r}; `modelmill runs` lists them, `latest` is the newest")
    shown = ", ".join(run.id for run in matches[-4:])
    raise UserError(f"run: {reference!r} is the start of {len(matches)} runs ({shown}); give more of the id")
