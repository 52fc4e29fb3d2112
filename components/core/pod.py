"""What a step does first and last in a pod of Kubeflow Pipelines, where no command prepared a run for it.

All pods of a run mount the home at the same path. The run's folder is `<home>/runs/<KFP run id>`; whichever pod comes
first makes it and announces the run from a variable that every pod carries. Beside each step a process delivers the
tracking points of the whole run (one at a time, by a lock in the home), so MLflow gets one parent run however many
pods there are. Nobody watches a scheduled run: its exit handler ends the parent run.
"""

from __future__ import annotations

import base64
import fcntl
import importlib.util
import json
import os
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from modelmill.components.core import events, tracking
from modelmill.components.core.code import source_digest
from modelmill.components.core.errors import UserError, disk_error
from modelmill.components.core.home import Home
from modelmill.components.core.tracking import RUN_SPOOL

ANNOUNCEMENT_VARIABLE = "MODELMILL_ANNOUNCEMENT"  # made by `announcement`
ANY_CODE_VARIABLE = "MODELMILL_ANY_CODE"  # set to anything: run whatever code the image holds
_DELIVERY_SECONDS = 60  # wait for MLflow at the end of a step; the rest is delivered by the next pod
_STATES = {"SUCCEEDED": "FINISHED", "FAILED": "FAILED"}

_active = False


def announcement(record: Mapping[str, Any]) -> str:
    """What a pod must know to announce the run, as one short text for an environment variable.

    Args:
        record: `name`, `experiment`, `tags`, and `recipe` with the resolved recipe's values.
    """
    text = json.dumps(record, sort_keys=True, separators=(",", ":"))
    return base64.b64encode(zlib.compress(text.encode(), 9)).decode()


def read_announcement(text: str) -> dict[str, Any]:
    """The record that `announcement` packed."""
    return json.loads(zlib.decompress(base64.b64decode(text)))


def active() -> bool:
    """Whether this process is the step of a pod and has entered its run."""
    return _active


@contextmanager
def entered(step: str, values: Mapping[str, Any]) -> Iterator[None]:
    """Give a step's process the run it belongs to; does nothing outside a pod.

    Args:
        step: the step's name.
        values: the engine's values for the step. Only an exit handler receives a `status`: it knows how the run went.
    """
    global _active
    if not os.environ.get(events.RUN_ID_VARIABLE) or events.run_directory() is not None:
        yield
        return
    folder = _enter()
    _active, follower = True, _Follower(folder, step)
    try:
        yield
    finally:
        _active = False
        if "status" in values:
            _conclude(folder, str(values["status"].get("state", "")))
        follower.finish()
        os.environ.pop(events.RUN_VARIABLE, None)


def check_code(module: str, digest: str) -> None:
    """Refuse an image whose code is not what the pipeline was compiled from; does nothing outside a pod.

    Args:
        module: of the step function.
        digest: `source_digest` of the module where the pipeline was compiled.

    Raises:
        UserError: they differ.
    """
    if not _active or os.environ.get(ANY_CODE_VARIABLE):
        return
    held = source_digest(module)
    if held != digest:
        raise UserError(
            f"images: the image holds other code of {module} ({held}) than the pipeline was compiled from ({digest});"
            f" build the image anew and name it in the profile, or set environment.{ANY_CODE_VARIABLE} in the profile"
        )


def tee(path: Path) -> subprocess.Popen[bytes]:
    """A process that copies what it reads to a file and to this process's standard output, as `kubectl logs` needs."""
    return subprocess.Popen(["tee", "-a", "-i", str(path)], stdin=subprocess.PIPE, start_new_session=True)


def close_run(state: str) -> None:
    """End the run of this pod in MLflow: the exit handler of every pipeline that has none of its own.

    Args:
        state: KFP's state of all the other tasks, such as `SUCCEEDED`.
    """
    os.environ[events.STEP_VARIABLE] = RUN_SPOOL
    with entered("", {"status": {"state": state}}):
        print(f"the run ended: {state}", flush=True)


def _enter() -> Path:
    """Make and announce the run's folder, whichever pod comes first."""
    folder = Home.current().runs / os.environ[events.RUN_ID_VARIABLE]
    try:
        for name in ("logs", "spool"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        os.environ[events.RUN_VARIABLE] = str(folder)
        with (folder / "spool" / ".announce.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            _announce(folder)
    except OSError as error:
        os.environ.pop(events.RUN_VARIABLE, None)
        print(disk_error(error, folder) or f"MODELMILL_HOME: cannot use {folder} ({error})", file=sys.stderr)
        raise SystemExit(2) from None
    return folder


def _announce(folder: Path) -> None:
    """Write the run's first records, or its start alone when KFP retries a run that had ended."""
    kinds = [line.get("type") for _, line in events.read_lines(folder / "spool" / f"{RUN_SPOOL}.jsonl")]
    boundary = next((kind for kind in reversed(kinds) if kind in ("start", "end")), None)
    if boundary == "start":
        return
    text = os.environ.get(ANNOUNCEMENT_VARIABLE)
    known = read_announcement(text) if text else {}
    run, name = folder.name, known.get("name", "run")
    start = {"run_id": run, "name": f"{name} {run[:8]}", "experiment": known.get("experiment", "modelmill")}
    tracking.record("start", spool=RUN_SPOOL, **start)
    if boundary == "end" or not known:
        return
    recipe = folder / "recipe.yaml"
    import yaml  # JSON would do for a machine; this file is for people

    recipe.write_text(yaml.safe_dump(known["recipe"], sort_keys=False, allow_unicode=True))
    values = {key: value for key, value in known["recipe"].items() if key not in ("name", "description", "tracking")}
    tracking.record("params", spool=RUN_SPOOL, values=values)
    tracking.record("tags", spool=RUN_SPOOL, values={**known.get("tags", {}), "modelmill.kfp_run_id": run})
    tracking.record("artifact", spool=RUN_SPOOL, path=str(recipe), folder="")


def _conclude(folder: Path, state: str) -> None:
    """Write the run's end: the manifests of its steps and its status."""
    from modelmill.components.core.store import noted_folder

    with suppress(OSError):  # a full disk: the parent run stays open in MLflow
        outputs = {
            event["step"]: event["uri"] for _, event in events.read_lines(folder / "events.jsonl") if "uri" in event
        }
        for step, uri in outputs.items():
            manifest = noted_folder(uri) / "manifest.json"
            if manifest.is_file():
                tracking.record("artifact", spool=RUN_SPOOL, path=str(manifest), folder=f"manifests/{step}")
        tracking.record("end", spool=RUN_SPOOL, status=_STATES.get(state, "KILLED"))


class _Follower:
    """The process that delivers tracking points beside a step; whatever happens to it, the step goes on."""

    def __init__(self, folder: Path, step: str) -> None:
        # KFP's MLflow plugin opens a run for every task and names it here; ours are nested below, each in its own.
        only = ["--only", step] if step and os.environ.get("MLFLOW_RUN_ID") else []
        self._command = [
            sys.executable,
            "-m",
            f"{__package__}.delivery",
            str(folder),
            *only,
        ]  # no part of a step's code
        self._process: subprocess.Popen[bytes] | None = None
        if importlib.util.find_spec("mlflow") is not None:
            self._process = self._start("--follow")

    def _start(self, *arguments: str) -> subprocess.Popen[bytes] | None:
        with suppress(OSError):
            return subprocess.Popen([*self._command, *arguments], stdin=subprocess.DEVNULL, start_new_session=True)
        return None

    def finish(self) -> None:
        """Deliver what is left, but not for long: a server that is down must not hold the step's end."""
        if self._process is None:
            return
        deadline = time.monotonic() + _DELIVERY_SECONDS
        self._process.terminate()
        self._wait(self._process, deadline)
        if self._process.returncode < 0:  # it waited for another pod's delivery, or had not begun
            last = self._start()
            if last is not None:
                self._wait(last, deadline)

    def _wait(self, process: subprocess.Popen[bytes], deadline: float) -> None:
        try:
            process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
