"""What the launcher's processes need from the operating system. Torch-free."""

from __future__ import annotations

import ctypes
import math
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import NoReturn

PARENT_VARIABLE = "MODELMILL_PARENT_PID"
_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Have this process killed when its parent ends, however the parent ends.

    A step that is killed hard can forward no signal, and a training process that outlives it holds the device and
    may write into the folder of the next attempt. The parent puts its process id into `PARENT_VARIABLE`, so that
    one that is gone before this call is noticed as well. On Linux the kernel does it, elsewhere a thread looks
    once a second.
    """
    expected = int(os.environ.get(PARENT_VARIABLE, os.getppid()))
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    else:
        threading.Thread(target=_watch_parent, args=(expected,), daemon=True).start()
    if os.getppid() != expected:
        os.kill(os.getpid(), signal.SIGKILL)


def _watch_parent(expected: int) -> None:
    while os.getppid() == expected:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGKILL)


def leave_now(code: int) -> NoReturn:
    """End the process without taking the interpreter apart, which takes over half a second once torch is loaded.

    Everything that must be on the disk is written and closed before; only the standard streams are flushed here.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def available_cores() -> int:
    """Cores this process may use: its affinity, and in a container also its CPU quota (cgroup v2)."""
    affinity = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(affinity, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):  # no cgroup v2, or "max": no quota
        return affinity


def describe_exit(code: int) -> str:
    """An exit code in words: `exit code 3`, or `killed by SIGKILL`."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"
