"""How a step runs, the same on a laptop and in a pod: decode, reuse or compute, publish, report.

A step is a plain function

    def pack_tokens(config: PackingConfig, output: Path, *, corpus: Manifest, tokenizer: Manifest) -> StepResult

that writes its data below `output`. `run_step` gives it its own section of the recipe and the upstream
manifests, and publishes the folder under a key made of all that decides its content (Marin's executor works
the same way): the section, the upstream digests, the code and the state of outside inputs. A finished key is
never computed twice; an unfinished one keeps its folder, so that a step with checkpoints goes on from them.
"""

from __future__ import annotations

import fcntl
import inspect
import json
import logging
import os
import shutil
import subprocess
import sys
import time
import traceback
import typing
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from modelmill.components.core import events, pod, replay, tracking
from modelmill.components.core.code import code_digest, source_digest
from modelmill.components.core.errors import UserError, disk_error
from modelmill.components.core.home import Home
from modelmill.components.core.manifest import Manifest, canonical_json, json_digest
from modelmill.components.core.store import open_store

RECIPE_VARIABLE = "MODELMILL_RECIPE_HASH"
FINISHED_VARIABLE = "MODELMILL_FINISHED_STEPS"  # steps that finished in the run this one resumes, with commas
FRESH_VARIABLE = "MODELMILL_FRESH"  # set to anything: compute every step again
IMAGE_VARIABLE = "MODELMILL_IMAGE"  # reference of the container image the step runs in; unset outside a cluster
USER_ERROR_EXIT = 2
logger = logging.getLogger("modelmill")


@dataclass(frozen=True)
class StepResult:
    """What a step function says about the files it wrote: see `Manifest` for the fields."""

    kind: str
    counts: dict[str, int] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)


StepFunction = Callable[..., StepResult]


@dataclass(frozen=True)
class StepOptions:
    """How `run_step` treats a function; set with `@step_options`."""

    reuse: bool = True  # False for side effects such as registering: they run every time
    resumable: bool = False  # True keeps the unfinished folder of a failed attempt
    device: bool = False  # True for a step that runs a model: a cluster gives its pod a device
    launches: bool = False  # True for a step that starts training processes: a cluster gives it a launcher


def step_options(
    *, reuse: bool = True, resumable: bool = False, device: bool = False, launches: bool = False
) -> Callable[[StepFunction], StepFunction]:
    """Mark a step function with its options."""

    def mark(function: StepFunction) -> StepFunction:
        function.step_options = StepOptions(reuse, resumable, device, launches)  # type: ignore[attr-defined]
        return function

    return mark


def options_of(function: StepFunction) -> StepOptions:
    return getattr(function, "step_options", StepOptions())


def section(
    step: str,
    config: BaseModel,
    function: StepFunction | str,
    fingerprint: str | None = "",
    *,
    elsewhere: bool = False,
) -> str:
    """The one string a pipeline passes to a step.

    Args:
        step: name of the step in the pipeline (the function's name unless it is used twice).
        config: the step's own section of the recipe.
        function: the step function, or `module:name` so that a caller need not import it.
        fingerprint: state of what the step reads from outside (versions, sizes, times, digests). None: the step looks
            when it runs, where it runs, as a scheduled run must.
        elsewhere: the step runs in an image, so its code is its sources and not this machine's libraries.
    """
    module = function.partition(":")[0] if isinstance(function, str) else function.__module__
    record = {
        "step": step,
        "config": config.model_dump(mode="json"),
        "code": source_digest(module) if elsewhere else code_digest(module),
        "fingerprint": fingerprint,
    }
    return canonical_json(record)


def output_key(section_json: str, upstream: Mapping[str, str]) -> str:
    """Key of a step's output (24 hex digits) from its section and the digests of its inputs by name."""
    return json_digest([json.loads(section_json), dict(upstream)])[:24]


def finished_manifest(store: Path, step: str, key: str) -> Manifest | None:
    """Manifest of a finished output whose files are still there, or None.

    Args:
        store: the home's folder of outputs; where `MODELMILL_STORE` names a prefix in S3, that is asked instead.
        step: the step's name.
        key: of the output.

    Raises:
        UserError: S3 cannot be asked.
    """
    return open_store(store).find(step, key)


def run_step(
    function: StepFunction,
    section_json: str,
    inputs: Mapping[str, str],
    outputs: Mapping[str, str],
    values: Mapping[str, Any] | None = None,
    number: int | None = None,
) -> Manifest:
    """Run one step: what every KFP shell calls.

    Args:
        function: the step function.
        section_json: made by `section`.
        inputs: parameter name to path of an upstream manifest.
        outputs: `manifest` and file names inside the artifact, each to the path KFP wants a copy at.
        values: parameters that only the engine knows, such as how the steps before ended; part of the output's key.
        number: of this task where a loop of the pipeline runs the step several times; it then has events, a log and
            tracking points of its own, under `events.task_name`.

    Exits the process with code 2 after one line on a user's mistake, so that no traceback hides it.
    """
    record = json.loads(section_json)
    name = events.task_name(record["step"], number)
    os.environ[events.STEP_VARIABLE] = name
    with pod.entered(name, values or {}), _log_file(name) as console, _explained(console):
        began = time.monotonic()
        events.emit("started", pid=os.getpid())
        pod.check_code(function.__module__, record["code"])
        run = events.run_directory()
        tracking.record("start", run=run.name if run else "")
        reusable = _may_reuse(name, options_of(function))
        manifest, reused = _produce(function, section_json, record, inputs, values or {}, reusable)
        _hand_over(manifest, outputs)
        tracking.record("end", status="FINISHED")
        summary: dict[str, Any] = {"counts": manifest.counts, "metrics": manifest.metrics, "uri": manifest.uri}
        events.emit("reused" if reused else "finished", seconds=round(time.monotonic() - began, 3), **summary)
        return manifest


def _produce(
    function: StepFunction,
    section_json: str,
    record: dict[str, Any],
    inputs: Mapping[str, str],
    values: Mapping[str, Any],
    reusable: bool,
) -> tuple[Manifest, bool]:
    upstream = {parameter: Manifest.read(path) for parameter, path in inputs.items()}
    config = _config_type(function).model_validate(record["config"])
    key = output_key(section_json, _decided_at_run_time(record, config, upstream, values))
    name, folder = record["step"], Home.current().store
    store, partial = open_store(folder), folder / name / f"{key}.partial"
    tracking.log_params(record["config"])
    with _exclusive(folder / name, key):
        done = store.find(name, key) if reusable else None
        if done is not None:
            logger.info("reusing %s", done.uri)
            replay.replay(done, store.points(done))
            return done, True
        waiting = _unpublished(partial) if reusable else None
        if waiting is not None:
            logger.info("publishing what an earlier attempt made")
            replay.replay(waiting, partial / replay.POINTS)
            return store.publish(partial, waiting, replace=False), True
        store.check(name)
        made = _compute(function, config, {**upstream, **values}, partial, key, record)
        return store.publish(partial, made, replace=not reusable), False


def _decided_at_run_time(
    record: Mapping[str, Any], config: BaseModel, upstream: Mapping[str, Manifest], values: Mapping[str, Any]
) -> dict[str, str]:
    """What enters an output's key beside its section: inputs, the engine's values, the image, the state outside."""
    digests = {parameter: manifest.digest for parameter, manifest in upstream.items()}
    digests |= {name: json_digest(value) for name, value in values.items()}
    if image := os.environ.get(IMAGE_VARIABLE):
        digests["$image"] = image
    fingerprint = getattr(config, "fingerprint", None)
    if record["fingerprint"] is None and callable(fingerprint):
        digests["$fingerprint"] = fingerprint()
    return digests


def _may_reuse(name: str, options: StepOptions) -> bool:
    """Whether a finished output may be taken; a resumed run does not repeat the side effects of its predecessor."""
    if os.environ.get(FRESH_VARIABLE):
        return False
    # A cluster tells only that a loop's step had finished, not which of its tasks; one that had not has no output.
    finished = os.environ.get(FINISHED_VARIABLE, "").split(",")
    return options.reuse or name in finished or events.step_of(name) in finished


def _compute(
    function: StepFunction,
    config: BaseModel,
    arguments: Mapping[str, Any],
    partial: Path,
    key: str,
    record: dict[str, Any],
) -> Manifest:
    """Run the function into an unfinished folder."""
    options = options_of(function)
    if partial.exists() and (not options.resumable or os.environ.get(FRESH_VARIABLE)):
        shutil.rmtree(partial)
    (partial / "data").mkdir(parents=True, exist_ok=True)
    try:
        result = function(config, partial / "data", **arguments)
    except BaseException:
        if not options.resumable:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    manifest = Manifest.describe(
        partial / "data",
        kind=result.kind,
        counts=result.counts,
        metrics=result.metrics,
        metadata=result.metadata,
        step=record["step"],
        key=key,
        code=record["code"],
        recipe=os.environ.get(RECIPE_VARIABLE, ""),
    )
    replay.keep(partial)
    return manifest


def _unpublished(partial: Path) -> Manifest | None:
    """What an attempt finished and could not bring to the store, every file of it as it was written."""
    try:
        manifest = Manifest.read(partial / "manifest.json")
        manifest.uri = str(partial / "data")
        manifest.folder()
    except UserError:
        return None
    return manifest


def _config_type(function: StepFunction) -> type[BaseModel]:
    hints = typing.get_type_hints(function)
    return hints[next(iter(inspect.signature(function).parameters))]


def _hand_over(manifest: Manifest, outputs: Mapping[str, str]) -> None:
    """Copy the manifest, and small files such as a report, to where KFP looks for them."""
    for name, target in outputs.items():
        if name == "manifest":
            manifest.write(target)
        else:
            Path(target).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(manifest.path(name), target)


@contextmanager
def _exclusive(folder: Path, key: str) -> Iterator[None]:
    """Let one process at a time produce a key; a second one waits and then reuses the result."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{key}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            events.progress("waiting for another run that makes the same output")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def _log_file(name: str) -> Iterator[int]:
    """Send this process's output (and its children's) to the step's log file; outside a run leave it alone.

    Yields the descriptor of the process's own stderr, for what a log file cannot take.
    """
    folder = events.run_directory()
    saved: tuple[int, int] | None = None
    copier: subprocess.Popen[bytes] | None = None
    if folder is not None:
        path = folder / "logs" / f"{name}.log"
        sys.stdout.flush()
        sys.stderr.flush()
        with suppress(OSError):  # a full or read-only disk: the step itself says so, on the console
            path.parent.mkdir(parents=True, exist_ok=True)
            if pod.active():  # its log is read while the home is not mounted where people are
                copier = pod.tee(path)
                assert copier.stdin is not None
                descriptor = os.dup(copier.stdin.fileno())
                copier.stdin.close()
            else:
                descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            saved = os.dup(1), os.dup(2)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            os.close(descriptor)
    layout = "%(asctime)s %(levelname)s %(message)s"
    logging.basicConfig(level=logging.INFO, format=layout, stream=sys.stderr, force=True)
    try:
        yield saved[1] if saved is not None else 2
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):  # what a full disk does not take goes to the console
                stream.flush()
        if saved is not None:  # a notebook or a test that runs several steps gets its output back
            for number, copy in enumerate(saved, start=1):
                os.dup2(copy, number)
                os.close(copy)
        if copier is not None:
            with suppress(subprocess.TimeoutExpired):  # a process the step forgot still holds the pipe
                copier.wait(5)


@contextmanager
def _explained(console: int) -> Iterator[None]:
    """Report whatever goes wrong inside, then leave with its exit code: 2 for a user's mistake, else 1."""
    try:
        yield
    except BaseException as error:
        known = disk_error(error, Home.current().root) if isinstance(error, OSError) else None
        _report_failure(known or error, console)
        raise SystemExit(USER_ERROR_EXIT if isinstance(known or error, UserError) else 1) from None


def _report_failure(error: BaseException, console: int) -> None:
    user = isinstance(error, UserError)
    message = str(error) if user else f"{type(error).__name__}: {error}"
    # A full disk must not hide the message that says so, so nothing here may fail.
    with suppress(OSError):
        if not user:
            traceback.print_exc()
        logger.error("%s", message)
    with suppress(OSError):
        tracking.record("end", status="FAILED")
    try:
        events.emit("failed", kind="user" if user else "crash", message=message)
    except OSError:
        with suppress(OSError):
            os.write(console, f"{message}\n".encode())
