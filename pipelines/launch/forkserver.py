"""Start a step's process by forking one that has imported already what every step imports.

A step process needs 0.13 s of processor time before it reaches its own code: the interpreter, kfp's executor,
pydantic, our core. A server that has done this once forks the same process in milliseconds. It imports nothing a step
might want to configure first (no torch, no numpy), starts no thread, and each child takes over the arguments, the
environment and the working directory the step was started with, so that to the step nothing is different.

The other half is `forkclient`, which kfp starts instead of `python3`. When the driver is killed, the server and the
steps end with it. Whoever ends a run sends SIGTERM to all of its processes: the step alone acts on it, and gets it
once, since server and waiter stay until it has ended. Linux only; elsewhere a step starts by itself.
"""

from __future__ import annotations

import importlib
import os
import runpy
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

from modelmill.pipelines.launch.processes import die_with_parent

_PRELOADED = ("kfp.dsl.executor_main", "modelmill.components.core.step")
_MODULE = "modelmill.pipelines.launch.forkserver"
_LONGEST_ADDRESS = 100  # bytes; Unix sockets take 108


def start(address: Path, log: Path, exits: Path) -> subprocess.Popen[bytes] | None:
    """Start a server, or return None where there can be none.

    Args:
        address: path of the socket, in a folder only this user can enter.
        log: where the steps' output goes until they have a log of their own.
        exits: file that gets a line `<exit status> <component>` for each step.
    """
    if sys.platform != "linux" or len(os.fsencode(address)) > _LONGEST_ADDRESS:
        return None
    with socket.socket(socket.AF_UNIX) as listener, log.open("ab") as output:
        listener.bind(str(address))
        listener.listen()  # from now on a client waits, however long the imports take
        descriptor = listener.fileno()
        return subprocess.Popen(
            [sys.executable, "-m", _MODULE, str(descriptor), str(exits), str(os.getpid())],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "_KFP_RUNTIME": "true"},
            pass_fds=(descriptor,),
        )


def _serve(listener: socket.socket, exits: Path) -> list[str]:
    """Answer requests for ever; returns, in the process of a step, the arguments of that step."""
    while True:
        connection, _ = listener.accept()
        server = os.getpid()
        if os.fork():
            connection.close()  # the child answers; SIGCHLD is ignored, so it leaves no zombie
            continue
        listener.close()
        for number in (signal.SIGCHLD, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        die_with_parent(signal.SIGKILL, server)
        waiter = os.getpid()
        directory, arguments, environment = _receive(connection)
        step = os.fork()
        if step == 0:
            die_with_parent(signal.SIGTERM, waiter)
            connection.close()
            os.chdir(directory)
            os.environ.clear()
            os.environ.update(environment)
            return arguments
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # our end would be a second SIGTERM for the step
        _report(step, arguments, connection, exits)


def _receive(connection: socket.socket) -> tuple[str, list[str], Mapping[str, str]]:
    """A request: working directory, number of arguments, arguments, environment, separated by NUL."""
    with connection.makefile("rb") as stream:
        directory, count, *rest = stream.read().split(b"\0")
    arguments = [os.fsdecode(word) for word in rest[: int(count)]]
    pairs = (word.partition(b"=") for word in rest[int(count) :])
    return os.fsdecode(directory), arguments, {os.fsdecode(key): os.fsdecode(value) for key, _, value in pairs}


def _report(step: int, arguments: list[str], connection: socket.socket, exits: Path) -> None:
    """Wait for a step, note how it ended, tell the client, and end."""
    status = os.waitstatus_to_exitcode(os.waitpid(step, 0)[1])
    code = status if status >= 0 else 128 - status
    with exits.open("a") as file:
        file.write(f"{code} {_component(arguments)}\n")
    with suppress(OSError):  # the client may have been ended with the run
        connection.sendall(str(code).encode())
    os._exit(0)


def _leave(number: int, frame: object) -> None:
    """Start nothing more, and end with the last step; the kernel collects children, as SIGCHLD is ignored."""
    with suppress(ChildProcessError):
        while True:
            os.wait()
    os._exit(0)


def _component(arguments: list[str]) -> str:
    """Name of the component an executor command line runs."""
    return next((value for flag, value in pairwise(arguments) if flag == "--function_to_execute"), "")


def main() -> None:
    """Import, then serve; a forked step goes on here and ends like any Python process."""
    listener, exits = socket.socket(fileno=int(sys.argv[1])), Path(sys.argv[2])
    die_with_parent(signal.SIGKILL, int(sys.argv[3]))
    for name in _PRELOADED:
        importlib.import_module(name)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _leave)
    arguments = _serve(listener, exits)
    _, module, *words = arguments  # -m MODULE WORDS...
    Path("/proc/self/comm").write_text(_component(words)[:15])  # what `ps` and `top` call the process
    del sys.modules[module]  # runpy runs it afresh, as `python -m` does
    sys.argv = [module, *words]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
