"""The run as MLflow sees it: the records of the pipeline run itself, and the process that delivers everything."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modelmill.components.core import code
from modelmill.components.core.events import RUN_VARIABLE, append_line
from modelmill.components.core.home import Home
from modelmill.components.core.recipe import Recipe
from modelmill.components.core.store import noted_folder
from modelmill.components.core.tracking import RUN_SPOOL
from modelmill.pipelines.launch import backlog
from modelmill.pipelines.launch.runs import Run
from modelmill.pipelines.launch.watch import RunView

_DELIVERY = "modelmill.components.core.delivery"
_BACKLOG = "modelmill.pipelines.launch.backlog"
DELIVERY_SECONDS = 60.0  # wait for MLflow at the end of a run; then the delivery goes on by itself
_MLFLOW_STATUS = {"succeeded": "FINISHED", "failed": "FAILED", "cancelled": "KILLED", "interrupted": "KILLED"}


def record(folder: Path, kind: str, /, *, spool: str = RUN_SPOOL, **fields: Any) -> None:
    """Append a record to a spool of a run this process does not belong to."""
    (folder / "spool").mkdir(exist_ok=True)
    append_line(folder / "spool" / f"{spool}.jsonl", {"type": kind, "time": int(time.time() * 1000), **fields})


def git_commit(folder: Path) -> str | None:
    """Commit of a working tree (`-dirty` when it has changes), or None outside one."""
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def announce(run: Run, recipe: Recipe) -> None:
    """Write what is known of a run before its first step."""
    name = f"{recipe.name} {run.id[:15]}"
    record(run.folder, "start", run_id=run.id, name=name, experiment=recipe.tracking.experiment)
    # Not the name and description of the recipe: they are the run's name and note.
    values = recipe.model_dump(mode="json", exclude={"name", "description", "tracking"})
    record(run.folder, "params", values=values)
    tags = {
        "mlflow.note.content": recipe.description,
        "modelmill.recipe": run.record.recipe,
        "modelmill.recipe_hash": recipe.hash,
        "modelmill.code_version": code.package_version(),
    }
    if commit := git_commit(Path(run.record.cwd)):
        tags["modelmill.git_commit"] = commit
    if run.record.resumed_from:
        tags["modelmill.resumed_from"] = run.record.resumed_from
    record(run.folder, "tags", values={key: value for key, value in tags.items() if value})
    for file in ("recipe.yaml", "environment.txt"):
        record(run.folder, "artifact", path=str(run.folder / file), folder="")


def conclude(run: Run, steps: Mapping[str, str], state: str) -> None:
    """Write a run's end: the manifests of its steps (step -> output URI) and its status."""
    for name, uri in steps.items():
        manifest = noted_folder(uri) / "manifest.json"
        if uri and manifest.is_file():
            record(run.folder, "artifact", path=str(manifest), folder=f"manifests/{name}")
    record(run.folder, "end", status=_MLFLOW_STATUS[state])


def close_step(run: Run, step: str, status: str) -> None:
    """Write the end a step could not write itself."""
    record(run.folder, "end", spool=step, status=status)


def outputs(view: RunView) -> dict[str, str]:
    """Output URI of every step that has one."""
    return {step.name: step.uri for step in view.steps.values() if step.uri}


class Delivery:
    """The process that brings a run's spools to MLflow beside the run; absent when MLflow is not installed."""

    def __init__(self, run: Run, environment: Mapping[str, str], *, start: bool = True) -> None:
        self._log = run.folder / "delivery.log"
        self.process: subprocess.Popen[bytes] | None = None
        self._absent = "" if start else "left in spool/ for later (`modelmill ui` delivers)"
        if start and importlib.util.find_spec("mlflow") is None:
            self._absent = "MLflow is not installed (pip install 'modelmill[track]'); the points are in spool/"
        if self._absent:
            return
        # Without the run's variable it is none of the run's processes: a cancelled run is delivered too.
        self._environment = {key: value for key, value in environment.items() if key != RUN_VARIABLE}
        earlier = backlog.waiting(Home(run.folder.parent.parent))
        self.process = self._start(self._log, _DELIVERY, str(run.folder), "--follow")
        if earlier:
            self._start(run.folder / "backlog.log", _BACKLOG)

    def _start(self, path: Path, module: str, *arguments: str) -> subprocess.Popen[bytes]:
        with path.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment,
                start_new_session=True,
            )

    @property
    def pending(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def outcome(self) -> str:
        """One line on what MLflow holds: empty when it holds everything."""
        if self.process is None:
            return self._absent
        if self.pending:
            return "MLflow is slow; the delivery goes on in the background"
        if self.process.returncode == 0:
            return ""
        lines = self._log.read_text(errors="replace").splitlines() if self._log.exists() else []
        return lines[-1].removeprefix("warning: ") if lines else f"the delivery exited with {self.process.returncode}"


def environment_report() -> str:
    """Installed packages, one `name==version` a line, with the interpreter first."""
    from importlib.metadata import distributions

    names = {f"{each.metadata['Name']}=={each.version}" for each in distributions() if each.metadata["Name"]}
    return "\n".join([f"python=={sys.version.split()[0]} ({os.uname().sysname} {os.uname().machine})", *sorted(names)])
