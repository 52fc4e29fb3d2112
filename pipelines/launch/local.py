"""Run a pipeline on this machine: start, watch, end, and tell the truth about how it went.

The command owns three processes: the driver, which lets kfp run the steps (`launch.driver`), the delivery, which
brings tracking points to MLflow, and itself. Whatever happens to one of them, the others end or finish their work:
a signal to the command ends the driver and everything below it, the driver notices when the command is killed, and
points that could not be delivered stay in the run folder.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from modelmill.components.core.errors import UserError, disk_error
from modelmill.components.core.events import RUN_VARIABLE, STEP_VARIABLE
from modelmill.components.core.home import HOME_VARIABLE, Home
from modelmill.components.core.recipe import Recipe
from modelmill.components.core.step import FINISHED_VARIABLE, FRESH_VARIABLE, RECIPE_VARIABLE
from modelmill.pipelines import catalog as catalogs
from modelmill.pipelines import plan
from modelmill.pipelines.launch import tracker
from modelmill.pipelines.launch.causes import Cancellation, blame
from modelmill.pipelines.launch.processes import GRACE, run_processes, stop_run
from modelmill.pipelines.launch.runs import Run, RunRecord, all_runs, new_run_id
from modelmill.pipelines.launch.watch import Display, RunView, Silent

_TEMPORARY = "modelmill-"
_POLL = 0.1  # seconds between two looks at the events
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True)
class RunResult:
    """How a run ended.

    Attributes:
        state: `succeeded`, `failed` or `cancelled`.
        exit_code: 0 only when every step succeeded; 2 a user's mistake, 1 another failure, 128 + signal number.
        message: what went wrong, in one line.
        tracking: what MLflow does not hold and why, in one line; empty when it holds everything.
        links: pages about the run elsewhere, each with its name.
    """

    run: Run
    view: RunView
    state: str
    exit_code: int
    message: str = ""
    tracking: str = ""
    links: tuple[tuple[str, str], ...] = ()


@dataclass
class _Signals:
    """Signals the command received since it took them over."""

    received: list[int] = field(default_factory=list)
    since: float = 0.0  # time of the first one

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Note signals instead of dying; only the main thread of a program may do this."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.since = self.since or time.time()
        self.received.append(number)


@dataclass(frozen=True)
class _Options:
    """How to run, as told by the caller: see `run_local`."""

    display: Display
    grace: float
    fresh: bool = False
    deliver: bool = True


def run_local(
    recipe: Recipe,
    *,
    reference: str = "",
    catalog: catalogs.Catalog | None = None,
    home: Home | None = None,
    display: Display | None = None,
    grace: float = GRACE,
    fresh: bool = False,
    deliver: bool = True,
) -> RunResult:
    """Run a recipe's pipeline here and wait for it.

    Args:
        recipe: made by `catalog.load`.
        reference: how the user named the recipe; recorded with the run.
        catalog: where its pipeline is found; default the current one.
        home: where runs and outputs lie; default `$MODELMILL_HOME` or `.modelmill`.
        display: shows the run while it goes; default nothing.
        grace: seconds a step has to end by itself when the run is cancelled.
        fresh: compute every step again, also those whose output exists.
        deliver: bring the tracking points to MLflow; False leaves them in the run's spool for later.

    Raises:
        UserError: nothing was started: the disk refuses, an input is missing, the pipeline is not known.
    """
    home = home or Home.current()
    recipe.check_local()
    pipeline = (catalog or catalogs.current()).pipeline(recipe.pipeline)
    record = RunRecord(
        run_id=new_run_id(recipe.name),
        name=recipe.name,
        pipeline=recipe.pipeline,
        recipe=reference,
        recipe_hash=recipe.hash,
        dag=pipeline.dag,
        cwd=os.getcwd(),
        steps=recipe.tasks(),
        headline=recipe.headline(),
    )
    options = _Options(display or Silent(), grace, fresh, deliver)
    return _Launch(home, record, recipe, plan.sections(recipe), options).execute()


def resume_local(
    run: Run,
    *,
    catalog: catalogs.Catalog | None = None,
    home: Home | None = None,
    display: Display | None = None,
    grace: float = GRACE,
    deliver: bool = True,
) -> RunResult:
    """Continue a run that failed, was cancelled or was interrupted: a new run, linked to the old one.

    Steps that had finished are taken from the store with the sections they had, also when the code changed since,
    and also those with side effects such as a registration. The others get their section anew, so that their
    results carry the code that makes them. An unchanged training step goes on from its last checkpoint.

    Raises:
        UserError: the run succeeded, is still running, or is being resumed by another run.
    """
    home = home or Home.current()
    _refuse(run, home)
    old = run.record
    recipe = plan.stored_recipe(run.folder, catalog)
    recipe.check_local()
    os.chdir(old.cwd)
    if Path(old.temporary).name.startswith(_TEMPORARY):  # left by a power cut
        shutil.rmtree(old.temporary, ignore_errors=True)
    view = RunView(run.folder, old.steps)
    view.refresh()
    finished = sorted({*old.finished_before, *view.done})
    sections = plan.sections(recipe, keep=run.sections(), finished=finished, store=home.store)
    record = RunRecord(
        run_id=new_run_id(old.name),
        name=old.name,
        pipeline=old.pipeline,
        recipe=old.recipe,
        recipe_hash=old.recipe_hash,
        dag=old.dag,
        cwd=old.cwd,
        steps=recipe.tasks(),
        headline=old.headline,
        resumed_from=old.run_id,
        finished_before=finished,
    )
    options = _Options(display or Silent(), grace, deliver=deliver)
    return _Launch(home, record, recipe, sections, options).execute()


def _refuse(run: Run, home: Home) -> None:
    if run.state == "succeeded":
        raise UserError(f"run: {run.id} succeeded; there is nothing to resume, start anew with `modelmill run`")
    if run.alive:
        raise UserError(f"run: {run.id} is still running (pid {run.record.pid}); end it with Ctrl-C or `kill` first")
    if not Path(run.record.cwd).is_dir():
        raise UserError(
            f"run: {run.id} was started in {run.record.cwd}, which is gone; start anew with `modelmill run`"
        )
    for other in all_runs(home):
        if other.record.resumed_from == run.id and other.state == "running":
            raise UserError(f"run: {run.id} is being resumed by {other.id}; wait for it or end it first")


class _Launch:
    """One run from its folder to its result."""

    def __init__(
        self,
        home: Home,
        record: RunRecord,
        recipe: Recipe,
        sections: Mapping[str, str],
        options: _Options,
    ) -> None:
        self.home, self.recipe, self.options = home, recipe, options
        self.display, self.grace = options.display, options.grace
        self.temporary = Path(tempfile.mkdtemp(prefix=_TEMPORARY))
        record.started, record.pid, record.temporary = time.time(), os.getpid(), str(self.temporary)
        files = {"recipe.yaml": recipe.resolved_yaml(), "sections.json": json.dumps(sections, indent=1) + "\n"}
        try:
            self.run = Run.create(home, record, files)
        except BaseException:
            self.temporary.rmdir()
            raise
        self.view = RunView(self.run.folder, record.steps)
        self.signals = _Signals()

    def execute(self) -> RunResult:
        lock = self.run.hold()
        try:
            with self.signals.taken():
                return self._execute(lock)
        finally:
            os.close(lock)
            self.display.close()
            shutil.rmtree(self.temporary, ignore_errors=True)

    def _execute(self, lock: int) -> RunResult:
        self.display.note(f"run {self.run.id}")
        environment = self._environment()
        driver, lifeline = self._start_driver(environment, lock)
        try:
            delivery = tracker.Delivery(self.run, environment, start=self.options.deliver)
            (self.run.folder / "environment.txt").write_text(tracker.environment_report() + "\n")
            tracker.announce(self.run, self.recipe)
            self._follow(driver)
        except BaseException as error:  # also a disk that fills up under the launcher itself
            stop_run(self.run.folder, driver.pid, grace=0)
            driver.wait()
            self._mark("cancelled" if isinstance(error, KeyboardInterrupt) else "failed", 1, str(error))
            raise (disk_error(error, self.home.root) or error) if isinstance(error, OSError) else error from None
        finally:
            os.close(lifeline)
        return self._conclude(driver, delivery)

    def _environment(self) -> dict[str, str]:
        """Environment of the run's processes.

        Temporary files go to a short private folder (a long one would break Unix sockets), since kfp leaves one a
        step behind. PYTHONSAFEPATH keeps a `random.py` in the working directory from shadowing the real one. Without
        its search for plugins pydantic starts 15 ms earlier in every step.
        """
        own = {
            RUN_VARIABLE: str(self.run.folder),
            HOME_VARIABLE: str(self.home.root),
            RECIPE_VARIABLE: self.recipe.hash,
            FINISHED_VARIABLE: ",".join(self.run.record.finished_before),
            FRESH_VARIABLE: "1" if self.options.fresh else "",
            "TMPDIR": str(self.temporary),
            "PYTHONSAFEPATH": "1",
            "PYTHONUNBUFFERED": "1",
            "PYTHONUTF8": "1",
            "PYDANTIC_DISABLE_PLUGINS": os.environ.get("PYDANTIC_DISABLE_PLUGINS", "1"),
        }
        inherited = {key: value for key, value in os.environ.items() if key not in (STEP_VARIABLE, *own)}
        return {**inherited, **own}

    def _start_driver(self, environment: Mapping[str, str], lock: int) -> tuple[subprocess.Popen[bytes], int]:
        """Start the driver in a session of its own; it holds the run's lock and the reading end of our lifeline."""
        listen, lifeline = os.pipe()
        command = [sys.executable, "-m", "modelmill.pipelines.launch.driver"]
        command += [str(self.run.folder), str(listen), str(self.grace)]
        try:
            with (self.run.folder / "driver.log").open("ab") as log:
                driver = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    start_new_session=True,
                    pass_fds=(listen, lock),
                )
        finally:
            os.close(listen)
        return driver, lifeline

    def _follow(self, driver: subprocess.Popen[bytes]) -> None:
        while driver.poll() is None:
            with suppress(subprocess.TimeoutExpired):
                driver.wait(_POLL)
            self.display.update(self.view, self.view.refresh())
            if self.signals.received and driver.poll() is None:
                self._cancel(driver)

    def _cancel(self, driver: subprocess.Popen[bytes]) -> None:
        name = signal.Signals(self.signals.received[0]).name
        self.display.note(f"{name}: ending the steps, up to {self.grace:.0f} s (once more to end them at once)")
        heard = len(self.signals.received)
        stop_run(
            self.run.folder,
            driver.pid,
            grace=self.grace,
            hurry=lambda: len(self.signals.received) > heard,
        )
        try:
            driver.wait(5)
        except subprocess.TimeoutExpired:
            driver.kill()
            driver.wait()

    def _conclude(self, driver: subprocess.Popen[bytes], delivery: tracker.Delivery) -> RunResult:
        left = run_processes(self.run.folder, driver.pid)
        if left:  # a step's forgotten background process, or the steps of a driver that was killed
            stop_run(self.run.folder, driver.pid, grace=min(self.grace, 2.0))
        self.display.update(self.view, self.view.refresh())
        state, code, message = self._judge(driver.returncode)
        tracker.conclude(self.run, tracker.outputs(self.view), state)
        self._mark(state, code, message)
        self.display.update(self.view, self.view.refresh())
        self._await(delivery)
        return RunResult(self.run, self.view, state, code, message, delivery.outcome())

    def _judge(self, returncode: int) -> tuple[str, int, str]:
        """State, exit code and reason of a run whose driver has ended; steps that could not, get their end here."""
        if returncode == 0 and not self.view.failed:
            return "succeeded", 0, ""
        if self.signals.received:
            number = self.signals.received[0]
            reason = f"cancelled by {signal.Signals(number).name}"
            blame(self.run, self.view, cancelled=Cancellation(reason, self.signals.since))
            return "cancelled", 128 + number, reason
        message = blame(self.run, self.view, driver=returncode)
        faults = {step.fault for step in self.view.failed} | {self.view.fault}
        return "failed", 2 if "user" in faults else 1, message

    def _mark(self, state: str, code: int, message: str) -> None:
        mark(self.run, state, code, message)

    def _await(self, delivery: tracker.Delivery) -> None:
        """Wait for MLflow, but not for long and not against the user's will."""
        heard, deadline = len(self.signals.received), time.monotonic() + tracker.DELIVERY_SECONDS
        noted = time.monotonic() + 2
        while delivery.pending and time.monotonic() < deadline and len(self.signals.received) == heard:
            if noted and time.monotonic() > noted:
                self.display.note("waiting for MLflow")
                noted = 0.0
            time.sleep(_POLL / 4)


def mark(run: Run, state: str, code: int | None, message: str) -> None:
    """Write a run's end to its record."""
    record = run.record
    record.state, record.exit_code, record.message, record.ended = state, code, message, time.time()
    try:
        run.save()
    except OSError as error:
        raise (disk_error(error, run.folder) or error) from None


def abandon(run: Run, since: float) -> None:
    """Write the end of a run whose command was killed at a time; called by the driver after it ended the steps."""
    view = RunView(run.folder, run.record.steps)
    view.refresh()
    reason = "the modelmill command was killed"
    blame(run, view, cancelled=Cancellation(reason, since))
    tracker.conclude(run, tracker.outputs(view), "cancelled")
    mark(run, "cancelled", None, reason)
