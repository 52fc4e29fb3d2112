"""Ending a run's processes: all of them, also those in a session of their own or orphaned by their parent.

Two independent traces lead to a process of a run: it descends from the driver (which is a subreaper on Linux,
so orphans come back to it), and its environment names the run folder. A process found by either belongs to the run.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

from modelmill.components.core.events import RUN_VARIABLE

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_POLL = 0.05  # seconds
_STUCK = 30.0  # seconds after the grace before a process that SIGKILL does not end is given up
GRACE = 20.0  # seconds: a training step saves a checkpoint when it is told to stop


def keep_tree_together() -> None:
    """Adopt orphaned descendants, so that they stay in this process's tree, and wake up when the parent dies.

    The parent freezes this process before it ends the run; killed just then, it could not thaw it again. (Linux only.)
    """
    if sys.platform == "linux":
        _prctl(_PR_SET_CHILD_SUBREAPER, 1)
        _prctl(_PR_SET_PDEATHSIG, signal.SIGCONT)


def die_with_parent(number: int, parent: int) -> None:
    """Receive a signal when the parent dies, or now when it is gone already (Linux only)."""
    _prctl(_PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:
        os.kill(os.getpid(), number)


def _prctl(option: int, value: int) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def reap_orphans() -> None:
    """Collect ended children nobody waited for."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return


def run_processes(folder: Path, root: int) -> list[psutil.Process]:
    """Living processes of a run, without its root, this process and this process's ancestors."""
    spared = {os.getpid(), root, *(parent.pid for parent in psutil.Process().parents())}
    found = {process.pid: process for process in psutil.process_iter() if _belongs(process, str(folder))}
    with suppress(psutil.Error):  # the root may be gone; the environment still tells its processes
        found.update((child.pid, child) for child in psutil.Process(root).children(recursive=True))
    return [process for pid, process in found.items() if pid not in spared and _living(process)]


def _belongs(process: psutil.Process, folder: str) -> bool:
    try:
        return process.environ().get(RUN_VARIABLE) == folder
    except (psutil.Error, OSError):
        return False


def _living(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _signal(process: psutil.Process, number: int) -> None:
    try:
        process.send_signal(number)
    except (psutil.Error, OSError):
        return


def stop_run(
    folder: Path,
    root: int,
    *,
    grace: float = GRACE,
    hurry: Callable[[], bool] = lambda: False,
) -> None:
    """End every process of a run: SIGTERM, a time of grace, then SIGKILL until none is left.

    When the caller is not the root itself, the root is frozen first so that it starts no further step, and told to
    end last: it then collects its dead children.

    Args:
        folder: the run folder, as in the processes' environment.
        root: process id of the driver.
        grace: seconds between SIGTERM and SIGKILL.
        hurry: asked while waiting; True ends the time of grace (a second Ctrl-C).
    """
    if root != os.getpid():
        _send(root, signal.SIGSTOP)
    told: set[int] = set()
    deadline = time.monotonic() + grace
    while processes := run_processes(folder, root):
        late = time.monotonic() >= deadline or hurry()
        for process in processes:
            if late:
                _signal(process, signal.SIGKILL)
            elif process.pid not in told:
                told.add(process.pid)
                _signal(process, signal.SIGTERM)
        if time.monotonic() > deadline + _STUCK:
            break  # not even SIGKILL ends a process inside the kernel (dead network disk)
        time.sleep(_POLL)
    if root != os.getpid():
        _send(root, signal.SIGTERM)
        _send(root, signal.SIGCONT)


def _send(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return
