"""Runs on Kubeflow Pipelines: submit, follow, resume, cancel; and what this machine remembers of them.

A run on a cluster has a folder here like any other: recipe, sections, profile, and events made from what the endpoint
says about its tasks. So a list of runs, a summary or a report reads one thing, wherever the run was.
"""

from __future__ import annotations

import json
import math
import os
import signal
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from modelmill.components.core.errors import UserError
from modelmill.components.core.events import append_line, read_lines, step_of
from modelmill.components.core.home import Home
from modelmill.pipelines import catalog as catalogs
from modelmill.pipelines import plan
from modelmill.pipelines.launch.kubeflow import ENDED, Endpoint, Version, ended_as
from modelmill.pipelines.launch.local import RunResult, mark
from modelmill.pipelines.launch.package import compile_recipe
from modelmill.pipelines.launch.platform_tasks import Placement, check_admissible, cluster_sections
from modelmill.pipelines.launch.runs import Run, RunRecord, new_run_id
from modelmill.pipelines.launch.watch import Display, RunView, Silent, StepView
from modelmill.pipelines.platform import Profile

_POLL = 3.0  # seconds between two looks at a run that is followed
_OUTAGE = 300.0  # seconds an endpoint may be away while a run is followed
_EXIT_CODES = {"succeeded": 0, "failed": 1, "cancelled": 130}


def submit(placement: Placement, *, home: Home | None = None, endpoint: Endpoint | None = None) -> Run:
    """Compile, upload and start a run of a recipe on a cluster.

    Args:
        placement: recipe and profile.
        home: where this machine remembers the run.
        endpoint: made from the profile unless given.

    Raises:
        UserError: the pair is not admissible, or the endpoint refuses; nothing was started.
    """
    check_admissible(placement.recipe, placement.profile)
    return _start(placement, cluster_sections(placement.recipe), home or Home.current(), endpoint)


def resume(run: Run, *, home: Home | None = None, endpoint: Endpoint | None = None) -> Run:
    """Continue a run that failed or was cancelled: a new run with the same sections, images and profile.

    What had finished is reused by its key, side effects included; an unfinished training step goes on from its last
    checkpoint, or from its training job where that still runs. Code that was mended since needs a new run.

    Raises:
        UserError: it has succeeded, or still runs.
    """
    profile = profile_of(run)
    endpoint = endpoint or Endpoint(profile)
    refresh(run, endpoint)
    check_resumable(run.id, run.state, run.id)
    recipe = plan.stored_recipe(run.folder)
    view = RunView(run.folder, run.record.steps)
    view.refresh()
    finished = tuple(sorted({*run.record.finished_before, *view.done}))
    placement = Placement(recipe, profile, run.record.recipe, finished)
    return _start(placement, run.sections(), home or Home.current(), endpoint, resumed_from=run.id)


def check_resumable(name: str, state: str, cancelled_as: str) -> None:
    """Refuse to resume what succeeded or still runs.

    Args:
        name: the run's.
        state: the run's.
        cancelled_as: what `modelmill cancel` calls it.

    Raises:
        UserError: one line with the fix.
    """
    if state == "succeeded":
        raise UserError(f"run: {name} succeeded; there is nothing to resume, start anew with `modelmill run`")
    if state == "running":
        raise UserError(f"run: {name} is still running; end it with `modelmill cancel {cancelled_as}` first")


def _start(
    placement: Placement,
    sections: Mapping[str, str],
    home: Home,
    endpoint: Endpoint | None,
    resumed_from: str | None = None,
) -> Run:
    recipe, profile = placement.recipe, placement.profile
    endpoint = endpoint or Endpoint(profile)
    version = upload(placement, sections, endpoint)
    experiment = endpoint.experiment(recipe.tracking.experiment)
    # Before the run starts: one that nobody remembers cannot be ended.
    run = remember(placement, sections, home, endpoint, resumed_from=resumed_from)
    try:
        run_id = endpoint.submit(
            version, name=run.id, experiment=experiment, account=profile.service_account, sections=sections
        )
    except BaseException as error:
        mark(run, "failed", 2, str(error))
        raise
    run.record.place |= {"run_id": run_id, "url": endpoint.run_url(run_id), "pipeline_version": version.name}
    run.save()
    return run


def remember(
    placement: Placement,
    sections: Mapping[str, str],
    home: Home,
    endpoint: Endpoint,
    *,
    name: str = "",
    started: float | None = None,
    place: Mapping[str, str] | None = None,
    resumed_from: str | None = None,
) -> Run:
    """Make the folder of a run on a cluster.

    Args:
        placement: recipe, profile, and what had finished before.
        sections: what its steps receive.
        home: where the folder is made.
        endpoint: where it runs.
        name: the run's; default a new one.
        started: default now.
        place: how KFP calls it, once it has begun there.
        resumed_from: run it continues.
    """
    recipe, profile = placement.recipe, placement.profile
    where = {"endpoint": endpoint.address, "profile": profile.name, "namespace": profile.namespace, "run_id": ""}
    record = RunRecord(
        run_id=name or new_run_id(recipe.name),
        name=recipe.name,
        pipeline=recipe.pipeline,
        recipe=placement.reference,
        recipe_hash=recipe.hash,
        dag=catalogs.current().pipeline(recipe.pipeline).dag,
        cwd=os.getcwd(),
        steps=[step.name for step in recipe.steps()],
        headline=recipe.headline(),
        started=time.time() if started is None else started,
        resumed_from=resumed_from,
        finished_before=list(placement.finished),
        place={**where, **(place or {})},
    )
    files = {
        "recipe.yaml": recipe.resolved_yaml(),
        "sections.json": json.dumps(sections, indent=1) + "\n",
        "profile.json": profile.model_dump_json(indent=1) + "\n",
    }
    return Run.create(home, record, files)


def upload(placement: Placement, sections: Mapping[str, str], endpoint: Endpoint) -> Version:
    """The pipeline version of a placed recipe, uploaded unless the endpoint has it."""
    recipe = placement.recipe
    with tempfile.TemporaryDirectory(prefix="modelmill-") as folder:
        package = Path(folder) / "pipeline.yaml"
        compile_recipe(recipe, sections, package, placement)
        return endpoint.upload(package, recipe.pipeline.replace("_", "-"), recipe.name, recipe.description)


def profile_of(run: Run) -> Profile:
    """The profile a run on a cluster was started with."""
    try:
        return Profile.model_validate_json((run.folder / "profile.json").read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"run: {run.folder} has lost its profile.json ({error}); name the profile anew") from None


def refresh(run: Run, endpoint: Endpoint, *, terminated: bool = False) -> RunView:
    """Bring the folder of a run up to date with what the endpoint says; returns its steps.

    Args:
        terminated: it was told to end, so its failure is that.
    """
    view = RunView(run.folder, run.record.steps)
    view.refresh()
    found = endpoint.run(run.record.place["run_id"])
    _note_tasks(run, view, found)
    view.refresh()
    state = ended_as(found)
    if terminated and state == "failed":
        state = "cancelled"
    if state and run.record.state == "running":
        mark(run, state, _EXIT_CODES[state], _why(view, found, state) if state != "succeeded" else "")
        if found.finished_at:
            run.record.ended = found.finished_at.timestamp()
            run.save()
    return view


def _why(view: RunView, found: Any, state: str) -> str:
    broken = "; ".join(f"{step.name}: {step.message}" for step in view.failed)
    message = found.error.message if found.error else ""
    return broken or message or f"the run is {state}"


def _note_tasks(run: Run, view: RunView, found: Any) -> None:
    """Append to the run's events what changed in its tasks."""
    details: dict[str, list[Any]] = {}
    for task in (found.run_details.task_details or []) if found.run_details else []:
        details.setdefault(str(task.display_name), []).append(task)
    inside = _events_in_home(run)
    for step in list(view.steps.values()):
        tasks = details.get(step.name.replace("_", "-"))
        if not tasks:
            continue
        said = inside.get(step.name, {})
        for event in _events(step, _telling(tasks, said), said):
            append_line(run.folder / "events.jsonl", {"step": step.name, **event})


def _telling(tasks: list[Any], said: Mapping[str, Any]) -> Any:
    """The task that tells the state of its step: those of a loop have one name, and one tried again is listed again.

    While one runs, the step does. One that failed for good tells, where the step itself `said` so.
    """
    running = [task for task in tasks if str(task.state) == "RUNNING"]
    if running:
        return min(running, key=lambda task: _seconds(task.start_time, math.inf))
    failed = [task for task in tasks if str(task.state) == "FAILED"] if said.get("event") == "failed" else []
    return max(failed or tasks, key=lambda task: _seconds(task.start_time, 0.0))


def _events(step: StepView, task: Any, inside: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What a task's state adds to what is known of its step."""
    state, now = str(task.state), time.time()
    began, ended = _seconds(task.start_time, now), _seconds(task.end_time, now)
    started = {"time": began, "event": "started"}
    if state == "RUNNING":
        again = step.settled and began > (step.ended or 0.0)
        return [started] if step.state == "waiting" or again else []
    if state not in ENDED or state == "SKIPPED" or (step.settled and (step.ended or 0.0) >= ended):
        return []
    events = [started] if step.state != "running" else []
    if state == "SUCCEEDED":
        kind = "reused" if inside.get("event") == "reused" else "finished"
        known = {name: inside[name] for name in ("counts", "metrics", "uri") if name in inside}
        return [*events, {"time": ended, "event": kind, **known}]
    cancelled = state == "CANCELED"
    message = inside.get("message") or (task.error.message if task.error else "") or state.lower()
    return [
        *events,
        {"time": ended, "event": "failed", "kind": "cancelled" if cancelled else "crash", "message": message},
    ]


def home_folder(run: Run) -> Path | None:
    """Folder of a run in the home of its cluster, where that is mounted here."""
    home = profile_of(run).home
    folder = Path(home.mount) / "runs" / run.record.place.get("run_id", "") if home else None
    return folder if folder is not None and run.record.place.get("run_id") and folder.is_dir() else None


def _events_in_home(run: Run) -> dict[str, dict[str, Any]]:
    """What steps said of their own end, where the home is mounted: metrics and the reason of a failure."""
    folder = home_folder(run)
    if folder is None:
        return {}
    lines = [event for _, event in read_lines(folder / "events.jsonl")]
    ends = {line["step"]: line for line in lines if line.get("event") in ("finished", "reused", "failed")}
    said: dict[str, dict[str, Any]] = {}
    for task, end in ends.items():
        step = step_of(task)
        if said.get(step, {}).get("event") == "failed":
            continue  # of a loop's tasks one that failed speaks for the step
        # What one task of a loop counted is not what the step did.
        said[step] = end if task == step else {name: end[name] for name in end if name not in ("counts", "metrics")}
    return said


def _seconds(moment: datetime | None, default: float) -> float:
    # The API's zero time is year 1: it has not happened yet.
    return moment.timestamp() if moment is not None and moment.year > 1970 else default


def follow(run: Run, endpoint: Endpoint, display: Display | None = None, poll: float = _POLL) -> RunResult:
    """Show a run until it ends; Ctrl-C stops showing it, and the run goes on.

    Raises:
        UserError: the endpoint stayed away for five minutes; the run goes on.
    """
    display = display or Silent()
    interrupted: list[int] = []
    with _noted(interrupted):
        try:
            view = _watch(run, endpoint, display, poll, interrupted)
        finally:
            display.close()
    return result(run, endpoint, view, interrupted[0] if interrupted else None)


def _watch(run: Run, endpoint: Endpoint, display: Display, poll: float, interrupted: list[int]) -> RunView:
    shown = RunView(run.folder, run.record.steps)
    display.note(f"run {run.id}: {run.record.place['url']}")
    away = 0.0
    while True:
        try:
            refresh(run, endpoint)
            away = 0.0
        except UserError as error:
            away = away or time.monotonic()
            if time.monotonic() - away > _OUTAGE:
                raise UserError(f"{error}; the run goes on, look with `modelmill runs`") from None
            display.note(f"waiting for the endpoint: {error}")
        display.update(shown, shown.refresh())
        if run.state != "running" or interrupted:
            return shown
        waited = time.monotonic() + poll
        while time.monotonic() < waited and not interrupted:
            time.sleep(min(0.1, poll))
            display.update(shown, [])


@contextmanager
def _noted(received: list[int]) -> Iterator[None]:
    """Note Ctrl-C instead of dying; only the main thread of a program may do this."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, lambda number, _: received.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def result(run: Run, endpoint: Endpoint, view: RunView, interrupted: int | None = None) -> RunResult:
    """The run as it is now, with where to look for it."""
    profile = profile_of(run)
    links = [("KFP", run.record.place["url"])]
    if tracking := profile.tracking.ui or profile.tracking.uri:
        links.append(("MLflow", tracking))
    state = run.state
    code = 128 + interrupted if interrupted and state == "running" else _EXIT_CODES.get(state, 0)
    message = run.record.message
    if interrupted and state == "running":
        message = f"the run goes on; end it with `modelmill cancel {run.id}`"
    return RunResult(run, view, state, code, message, links=tuple(links))
