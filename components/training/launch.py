"""Where a training job runs. The step says what: a module, its spec, processes; a launcher says where.

Every launcher returns the same `TrainingResult`, written by rank 0. The local one starts torchrun as a child of
the step; launchers for a cluster submit the same job elsewhere. Torch-free: the step's own process needs no torch.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict

from modelmill.components.core import events
from modelmill.components.core.errors import UserError
from modelmill.components.training.config import TrainingConfig
from modelmill.components.training.options import GPU_ATTENTION
from modelmill.components.training.processes import PARENT_VARIABLE, available_cores, describe_exit

LAUNCHED_VARIABLE = "MODELMILL_LAUNCHED"  # when the launcher began, seconds since the epoch
LAUNCHER_VARIABLE = "MODELMILL_LAUNCHER"  # `module:class` and its configuration, JSON; see `current_launcher`
STOPPED_EXIT = 75  # a rank that was told to stop and saved its checkpoint (EX_TEMPFAIL: try again)
_BOOTSTRAP = "modelmill.components.training.torchrun"
_LAST_LINES = 15
logger = logging.getLogger("modelmill")


@dataclass(frozen=True)
class TrainingJob:
    """What to run.

    Attributes:
        module: run with `python -m` in every process, its only argument the path of the job file.
        spec: what the module needs, as JSON.
        training: layout, threads, precision and accelerator are read from it.
        scratch: folder for the job file, logs and the result; it survives a failed attempt.
        exports: folders that the ranks write at their end; what a cut-off attempt left of them is removed before the
            next one starts, and only then: a launcher may come back to an attempt that is still going on.
    """

    module: str
    spec: Mapping[str, Any]
    training: TrainingConfig
    scratch: Path
    exports: tuple[Path, ...] = ()

    def text(self) -> str:
        """Content of the job file: all that the ranks are told."""
        return json.dumps({"training": self.training.model_dump(mode="json"), **self.spec})


class TrainingResult(BaseModel):
    """What rank 0 reports when training is done.

    `counts`, `metrics` and `metadata` become those of the artifact, see `Manifest`.
    """

    model_config = ConfigDict(extra="forbid")

    counts: dict[str, int] = {}
    metrics: dict[str, float] = {}
    metadata: dict[str, Any] = {}


class TrainingStoppedError(RuntimeError):
    """Training was told to stop (SIGTERM, SIGINT) and kept its checkpoint."""


class RankFailedError(RuntimeError):
    """A training process crashed or was killed; the message says which, how, and its last words."""


class Launcher(Protocol):
    """A place where training jobs run."""

    def check(self, training: TrainingConfig) -> None:
        """Refuse what this place cannot do, before anything starts.

        Raises:
            UserError: one line naming the field, its value and what would do.
        """

    def launch(self, job: TrainingJob) -> TrainingResult:
        """Run a job to its end.

        Raises:
            UserError: the user's mistake, as a rank found it.
            TrainingStoppedError: it was told to stop and can be resumed.
            RankFailedError: a process crashed.
        """


def current_launcher(text: str | None = None) -> Launcher:
    """The launcher that the profile of the run asks for in `MODELMILL_LAUNCHER`, else the local one.

    The variable holds `{"launcher": "module:class", "config": {...}}`; the class has `from_config(config)`, so a place
    is imported only where it is used.

    Args:
        text: the content; None reads the variable.

    Raises:
        UserError: the variable does not name a launcher of this installation, or its configuration is wrong.
    """
    text = os.environ.get(LAUNCHER_VARIABLE) if text is None else text
    if not text:
        return LocalLauncher()
    try:
        chosen = json.loads(text)
        module, _, name = chosen["launcher"].partition(":")
        if not module.startswith("modelmill.components.launchers."):
            raise ValueError(f"{module!r} is no launcher")
        return getattr(importlib.import_module(module), name).from_config(chosen["config"])
    except (ImportError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{LAUNCHER_VARIABLE}: {error}; run through a profile, or unset it") from None


@dataclass
class RankFiles:
    """Names of the files a job's processes and their launcher exchange, below the job's scratch folder."""

    scratch: Path
    job: Path = field(init=False)
    result: Path = field(init=False)
    exits: Path = field(init=False)
    logs: Path = field(init=False)

    def __post_init__(self) -> None:
        self.job, self.result = self.scratch / "job.json", self.scratch / "result.json"
        self.exits, self.logs = self.scratch / "exits.json", self.scratch / "ranks"

    def failure(self, rank: int) -> Path:
        """Why a rank ended, written by the rank itself."""
        return self.scratch / f"failure-{rank}.json"

    def prepare(self, job: TrainingJob) -> None:
        """Remove what an earlier attempt left, and write the job file of the next."""
        for path in (self.result, *self.scratch.glob("exits*.json"), *self.scratch.glob("failure-*.json")):
            path.unlink(missing_ok=True)
        for folder in (self.logs, *job.exports):
            shutil.rmtree(folder, ignore_errors=True)
        self.job.write_text(job.text())

    def records(self, world_size: int) -> list[dict[str, Any]]:
        """What the ranks say about their end, the earliest first: `rank`, `kind`, `message`, `time`."""
        found = [read_json(self.failure(rank), None) for rank in range(world_size)]
        return sorted((record for record in found if record), key=lambda record: record["time"])


class LocalLauncher:
    """torchrun on this machine, as a child process that never outlives the step.

    SIGTERM and SIGINT are passed on: every rank finishes its step and saves a checkpoint. A second SIGINT kills. The
    kernel picks the rendezvous port, so an occupied one is never met.
    """

    def __init__(self, grace_seconds: int = 15) -> None:
        """
        Args:
            grace_seconds: between the end of one rank and SIGKILL for those that have not followed it.
        """
        self.grace_seconds = grace_seconds

    def check(self, training: TrainingConfig) -> None:
        parallel = training.parallel
        if parallel.nodes > 1:
            raise UserError(
                f"training.parallel.nodes: {parallel.nodes} machines need a cluster launcher; this run is local: use 1"
            )
        if parallel.pipeline > 1:
            raise UserError(
                f"training.parallel.pipeline: {parallel.pipeline} is not implemented by the local engine, which has no"
                " pipeline schedule; use 1, and shard or tensor to spread the weights"
            )
        gpu_attention = training.attention in GPU_ATTENTION
        if training.accelerator in ("cuda", "neuron") or training.precision == "fp8-mixed" or gpu_attention:
            # Only what a machine may lack is worth torch's import here; the ranks choose and check again.
            from modelmill.components.training.accelerator import select_accelerator

            found = select_accelerator(training.accelerator, parallel.processes_per_node, training.precision)
            if gpu_attention and found.name != "cuda":
                raise UserError(
                    f"training.attention: {training.attention!r} needs an NVIDIA GPU, and this run is on {found.name};"
                    f" use auto, math, sdpa{' or flash' if found.name == 'cpu' else ''}"
                )

    def launch(self, job: TrainingJob) -> TrainingResult:
        self.check(job.training)
        files = RankFiles(job.scratch)
        files.prepare(job)
        events.progress(f"starting {job.training.parallel.world_size} processes")
        process = subprocess.Popen(
            self._command(job, files),
            env=self._environment(job.training),
            start_new_session=True,  # a signal to our group must reach the ranks once, through us
        )
        try:
            with _forward_signals(process) as received:
                code = process.wait()
        finally:
            if process.poll() is None:  # an exception went through us: the ranks follow torchrun
                process.kill()
                process.wait()
        if code == 0:
            return TrainingResult.model_validate_json(files.result.read_bytes())
        raise _failure(files, job.training.parallel.world_size, code, received)

    def _command(self, job: TrainingJob, files: RankFiles) -> list[str]:
        torchrun = [sys.executable, "-m", _BOOTSTRAP, str(files.exits), str(self.grace_seconds)]
        rendezvous = ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"]
        rendezvous += [f"--rdzv-id={os.getpid()}", "--max-restarts=0", "--nnodes=1"]
        processes = [f"--nproc-per-node={job.training.parallel.processes_per_node}"]
        # Every rank has its log, and what rank 0 says is shown as well.
        logs = [f"--log-dir={files.logs}", "--redirects=3", "--tee=0:3"]
        return [*torchrun, *rendezvous, *processes, *logs, "-m", job.module, str(files.job)]

    def _environment(self, training: TrainingConfig) -> dict[str, str]:
        own = {PARENT_VARIABLE: str(os.getpid()), **rank_variables(training, available_cores(), time.time())}
        # Without it gloo resolves the host's name, which fails or waits on a laptop off the network.
        loopback = {"GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo"}
        return {**loopback, **RANK_DEFAULTS, **os.environ, **own}


RANK_DEFAULTS = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # what torch's deterministic mode asks of cuBLAS
    "TOKENIZERS_PARALLELISM": "false",
}
"""Variables of training processes unless a place or a user sets them otherwise."""


def rank_variables(training: TrainingConfig, cores: int, launched: float) -> dict[str, str]:
    """Variables that every training process gets, wherever it runs.

    Args:
        training: the training section.
        cores: that the processes of one machine share.
        launched: when the launcher began, seconds since the epoch.
    """
    # Ranks that each start a thread a core would spend their time waiting for one another.
    threads = training.threads_per_process or max(1, cores // training.parallel.processes_per_node)
    return {
        LAUNCHED_VARIABLE: repr(launched),
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "PYTHONUNBUFFERED": "1",  # a killed rank's last lines are in its log
        # Neuron devices round each cast to bf16 stochastically or none; with fp32 weights that would be a mistake.
        "NEURON_RT_STOCHASTIC_ROUNDING_EN": str(int(training.precision == "bf16-stochastic")),
        "NEURON_RT_STOCHASTIC_ROUNDING_SEED": str(training.seed),
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE": "rank ${rank}: ",
    }


@contextmanager
def _forward_signals(process: subprocess.Popen[bytes]) -> Iterator[list[int]]:
    """Pass SIGTERM and SIGINT on as SIGTERM, a second SIGINT as SIGKILL; yields the signals received.

    A second SIGTERM changes nothing: whoever ends a run may well send it to this process and again to its parent.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received  # only the main thread may set handlers; whoever runs us in a thread handles signals
        return

    def forward(number: int, _frame: object) -> None:
        received.append(number)
        hurry = number == signal.SIGINT and received.count(number) > 1
        process.send_signal(signal.SIGKILL if hurry else signal.SIGTERM)

    before = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _failure(files: RankFiles, world_size: int, code: int, received: list[int]) -> Exception:
    """What to raise for a job that ended badly: the cause, not the ranks that fell over after it."""
    records = files.records(world_size)
    if mistakes := [record for record in records if record["kind"] == "user"]:
        return UserError(mistakes[0]["message"])
    stopped = next((record for record in records if record["kind"] == "stopped"), None)
    if stopped or received:
        name = signal.Signals(received[0]).name if received else "SIGTERM"
        what = stopped["message"] if stopped else "before the first step was done"
        return TrainingStoppedError(f"training was stopped by {name} {what}; run it again to go on")
    exits = {entry["rank"]: entry["exit_code"] for entry in read_json(files.exits, [])}
    # torchrun ends the remaining ranks with SIGTERM; a rank that another signal killed is the cause, otherwise the
    # one that raised first: the others lost their connection to it.
    killed = [rank for rank, exit_code in exits.items() if exit_code < 0 and exit_code != -signal.SIGTERM]
    rank = killed[0] if killed else records[0]["rank"] if records else next(iter(exits), None)
    if rank is None:
        return RankFailedError(f"torchrun failed: {describe_exit(code)}; see the lines above")
    told = next((record["message"] for record in records if record["rank"] == rank), "")
    how = told or describe_exit(exits.get(rank, code))
    return RankFailedError(
        f"rank {rank} of {world_size} failed: {how}; the end of its log:\n{_last_lines(files, rank)}"
    )


def read_json(path: Path, missing: Any) -> Any:
    """Content of a JSON file, or `missing` where there is none or it is damaged."""
    with suppress(OSError, ValueError):
        return json.loads(path.read_bytes())
    return missing


def _last_lines(files: RankFiles, rank: int) -> str:
    """The end of what a rank wrote: its output, then its errors, where a traceback stands."""
    lines: list[str] = []
    for name in ("stdout", "stderr"):
        for log in files.logs.glob(f"*/attempt_0/{rank}/{name}.log"):
            lines += log.read_text(errors="replace").splitlines()[-_LAST_LINES:]
    return "\n".join(f"  {line}" for line in lines) or "  (empty)"
