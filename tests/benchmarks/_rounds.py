"""Peers of a training benchmark in processes of their own, taking turns: the parent's side of `_turns`."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[2]
Command = Sequence[str]
"""Interpreter, module and name of a peer; mode, folder and steps follow it."""


def _start(command: Command, mode: str, folder: Path, steps: int, threads: int, log: IO[str]) -> subprocess.Popen[str]:
    limits = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    environment = {**os.environ, **limits, "TOKENIZERS_PARALLELISM": "false"}
    pipe, whole = subprocess.PIPE, [*command, mode, str(folder), str(steps)]
    return subprocess.Popen(whole, stdin=pipe, stdout=pipe, stderr=log, text=True, env=environment, cwd=ROOT)


def _finished(command: Command, process: subprocess.Popen[str], log: IO[str]) -> Any:
    """What a peer says last."""
    last = process.communicate()[0].strip().splitlines()[-1:]
    if process.returncode or not last:
        log.seek(0)
        raise SystemExit(f"{log.read()}\n{command[-1]} failed with exit code {process.returncode}")
    return json.loads(last[0])


def measure(command: Command, mode: str, folder: Path, steps: int, threads: int) -> Any:
    """Run one peer to its end; what `_turns.measure` printed."""
    with tempfile.TemporaryFile("w+") as log:
        return _finished(command, _start(command, mode, folder, steps, threads, log), log)


def one_round(
    commands: Mapping[str, Command], folder: Path, steps: int, threads: int, first: int, warm_up: int
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Seconds of each turn and growth of resident memory of every peer.

    Args:
        commands: of the peers.
        folder: weights and batches.
        steps: of each peer, the warm-up included; the first step is never timed.
        threads: of each peer.
        first: which peer begins a turn; another one in every turn, so that none always follows the same.
        warm_up: steps that are left out.
    """
    peers = list(commands)
    seconds: dict[str, list[float]] = {peer: [] for peer in peers}
    with ExitStack() as stack:
        logs = {peer: stack.enter_context(tempfile.TemporaryFile("w+")) for peer in peers}
        running = {
            peer: stack.enter_context(_start(commands[peer], "turns", folder, steps, threads, logs[peer]))
            for peer in peers
        }
        for peer, process in running.items():
            if not process.stdout or not process.stdout.readline():  # the first step is done
                _finished(commands[peer], process, logs[peer])
        for turn in range(1, steps):
            for place in range(len(peers)):
                peer = peers[(first + turn + place) % len(peers)]
                process = running[peer]
                assert process.stdin is not None
                assert process.stdout is not None
                process.stdin.write("go\n")
                process.stdin.flush()
                line = process.stdout.readline() or _finished(commands[peer], process, logs[peer])
                if turn >= warm_up:
                    seconds[peer].append(float(line))
        ends = {peer: _finished(commands[peer], process, logs[peer]) for peer, process in running.items()}
    return seconds, ends
