"""The machine of the user: what can spoil a run here and can be seen before it starts."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from modelmill.components.core.errors import UserError
from modelmill.components.core.home import Home
from modelmill.pipelines.doctor.finding import Finding, Level, collect

_GIB = 2**30
_ABANDONED = 24 * 3600  # seconds after which a folder of an unfinished step is worth a word
_PACKAGES = {"torch": "train", "transformers": "train", "pyarrow": "train", "kfp": "kfp", "mlflow": "track"}


def examine(home: Home) -> list[Finding]:
    """Look at everything; a check that breaks is a finding, not an end."""
    checks: tuple[Callable[[Home], Iterator[Finding]], ...] = (
        _python,
        _packages,
        _lock,
        _machine,
        _disk,
        _torch,
        _store,
        _spools,
        _runs,
    )
    return collect(checks, home)


def _python(home: Home) -> Iterator[Finding]:
    version = platform.python_version()
    level: Level = "ok" if sys.version_info >= (3, 11) else "fail"
    kind = "virtual environment" if sys.prefix != sys.base_prefix else "system interpreter"
    yield Finding(
        level, "python", f"{version}, {kind} {sys.prefix}", "" if level == "ok" else "use Python 3.11 or newer"
    )


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _packages(home: Home) -> Iterator[Finding]:
    missing = {name: extra for name, extra in _PACKAGES.items() if _version(name) is None}
    if missing:
        extras = ",".join(sorted(set(missing.values())))
        yield Finding("warn", "packages", f"{', '.join(missing)} missing", f"pip install 'modelmill[{extras}]'")
    else:
        yield Finding("ok", "packages", ", ".join(f"{name} {_version(name)}" for name in _PACKAGES))
    kfp = _version("kfp")
    if kfp and tuple(int(part) for part in kfp.split(".")[:2]) < (2, 17):
        yield Finding("fail", "kfp", f"{kfp} has no usable local runner", "pip install 'kfp>=2.17,<3'")


def _lock(home: Home) -> Iterator[Finding]:
    """Compare what is installed with the lock, where there is one (a checkout has it, a wheel has not)."""
    lock = Path(__file__).resolve().parents[2] / "constraints.txt"
    if not lock.is_file():
        return
    other = []
    for line in lock.read_text().splitlines():
        name, _, wanted = line.partition("#")[0].strip().partition("==")
        installed = _version(name) if name and wanted else None
        if installed and installed.partition("+")[0] != wanted.strip().partition("+")[0]:
            other.append(f"{name} {installed} (lock: {wanted.strip()})")
    if other:
        shown = ", ".join(other[:4]) + (f" and {len(other) - 4} more" if len(other) > 4 else "")
        yield Finding(
            "warn", "lock", f"other versions than constraints.txt: {shown}", "rm .venv/.installed && make test"
        )
    else:
        yield Finding("ok", "lock", "installed versions are those of constraints.txt")


def _machine(home: Home) -> Iterator[Finding]:
    import psutil

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = psutil.virtual_memory()
    text = f"{cores} cores, {memory.available / _GIB:.1f} of {memory.total / _GIB:.1f} GiB memory free"
    if memory.available < 2 * _GIB:
        yield Finding("warn", "machine", text, "end other programs: the demo needs about 2 GiB")
    elif cores < 2:
        yield Finding("warn", "machine", text, "training starts two processes; expect it to be slow")
    else:
        yield Finding("ok", "machine", text)


def _disk(home: Home) -> Iterator[Finding]:
    place = home.root
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    fix = "set MODELMILL_HOME to a writable folder"
    if place != home.root and not os.access(place, os.W_OK):
        yield Finding(
            "fail", "disk", f"{home.root} cannot be made in {place}", "set MODELMILL_HOME to a writable folder"
        )
        return
    if place == home.root:
        try:
            with tempfile.NamedTemporaryFile(dir=place):
                pass
        except OSError as error:
            yield Finding("fail", "disk", f"{home.root} cannot be written ({error.strerror})", fix)
            return
    text = f"{free / _GIB:.1f} GiB free for {home.root}"
    if free < _GIB // 4:
        yield Finding("fail", "disk", text, "free space, or set MODELMILL_HOME to another disk")
    elif free < 2 * _GIB:
        yield Finding("warn", "disk", text, "free space; checkpoints and corpora need some")
    else:
        yield Finding("ok", "disk", text)


def _torch(home: Home) -> Iterator[Finding]:
    """Import torch and let one process form a group with itself, in a process of its own: a broken build may crash."""
    if importlib.util.find_spec("torch") is None:
        return
    code = (
        "import torch, torch.distributed as d\n"
        "d.init_process_group('gloo', store=d.HashStore(), rank=0, world_size=1)\n"
        "d.all_reduce(torch.ones(1)); d.destroy_process_group()\n"
        "print(torch.__version__, torch.get_num_threads(), torch.cuda.device_count())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        yield Finding(
            "fail", "torch", f"a gloo process group cannot be formed: {last}", "reinstall torch from the lock"
        )
        return
    version, threads, devices = done.stdout.split()
    yield Finding("ok", "torch", f"{version}, gloo works, {threads} threads, {devices} CUDA devices")


def _store(home: Home) -> Iterator[Finding]:
    from modelmill.components.core import mlflow_store

    if importlib.util.find_spec("mlflow") is None:
        return
    uri = mlflow_store.safe_uri(home.tracking_uri)
    database = mlflow_store.sqlite_path(home.tracking_uri)
    if database is not None and not database.exists():
        yield Finding("ok", "tracking", f"{uri}, made by the first run")
        return
    try:
        mlflow_store.connect(home.tracking_uri)
    except mlflow_store.StoreUnavailable as error:
        fix = "start the server or unset MLFLOW_TRACKING_URI; runs go on and keep their points meanwhile"
        yield Finding("fail", "tracking", f"{uri} cannot be used ({error})", fix)
    except UserError as error:
        yield Finding("fail", "tracking", str(error))
    else:
        yield Finding("ok", "tracking", f"{uri} answers")


def _spools(home: Home) -> Iterator[Finding]:
    from modelmill.pipelines.launch.backlog import waiting

    undelivered = waiting(home)
    if undelivered:
        text = f"points of {len(undelivered)} runs are not in MLflow (last: {undelivered[-1]})"
        yield Finding("warn", "spools", text, "`modelmill ui` and the next run deliver them")
    else:
        yield Finding("ok", "spools", "everything is delivered")


def _runs(home: Home) -> Iterator[Finding]:
    from modelmill.pipelines.launch.runs import all_runs

    runs = all_runs(home)
    resumed = {run.record.resumed_from for run in runs}
    dead = [run.id for run in runs if run.state == "interrupted" and run.id not in resumed]
    if dead:
        text = f"{len(dead)} runs died without an end (last: {dead[-1]})"
        yield Finding("warn", "runs", text, f"`modelmill resume {dead[-1]}`, or delete its folder in {home.runs}")
    else:
        yield Finding("ok", "runs", f"{len(runs)} runs, none died without an end")
    old = [path for path in home.store.glob("*/*.partial") if time.time() - path.stat().st_mtime > _ABANDONED]
    if old:
        text = f"{len(old)} unfinished step folders older than a day in {home.store}"
        yield Finding("warn", "store", text, "`modelmill prune --older-than 1d` shows them, `--yes` deletes them")
