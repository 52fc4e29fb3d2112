"""A home of its own for every test, the sample catalog, and the command as a user starts it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from modelmill.components.core.home import Home
from modelmill.components.core.recipe import Recipe
from modelmill.pipelines import catalog
from modelmill.pipelines.launch.local import RunResult, resume_local, run_local
from modelmill.pipelines.launch.runs import Run

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-m", "modelmill.pipelines.cli"]


@pytest.fixture(scope="session")
def shared_store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tracking store for tests that do not look into it: making one takes seconds."""
    return f"sqlite:///{tmp_path_factory.mktemp('tracking')}/mlflow.db"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared_store: str) -> Home:
    """An empty home, in the environment of this process and of everything it starts."""
    for name in ("MLFLOW_RUN_ID", "MODELMILL_RUN_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", shared_store)
    monkeypatch.setenv("MODELMILL_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MODELMILL_CATALOG", "tests.pipelines.sample.catalog:CATALOG")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return Home.current()


def recipe(**settings: object) -> Recipe:
    """The sample recipe with `count__behaviour="crash"` standing for `--set count.behaviour=crash`."""
    overrides = [f"{key.replace('__', '.')}={value}" for key, value in settings.items()]
    return catalog.load("words", overrides)


def run(**settings: object) -> RunResult:
    """Run the sample here, its points left in the spool."""
    return run_local(recipe(**settings), reference="words", grace=1.0, deliver=False)


def resume(old: Run) -> RunResult:
    return resume_local(old, grace=1.0, deliver=False)


def states(result: RunResult) -> dict[str, str]:
    return {step.name: step.state for step in result.view.steps.values()}


def modelmill(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    """Run the command to its end."""
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=120, **options)  # type: ignore[call-overload]


def wait_for(condition: Callable[[], object], seconds: float = 30.0) -> None:
    """Wait until something holds; fail with the condition's name when it does not."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{condition} did not hold within {seconds} s"
        time.sleep(0.02)


def living(pids: list[int]) -> list[int]:
    """Those processes of a list that run; a zombie does not."""
    found = []
    for pid in pids:
        try:
            if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                found.append(pid)
        except psutil.NoSuchProcess:
            continue
    return found


def noted(scratch: Path) -> list[int]:
    """Process ids the sample step noted."""
    return [int(word) for word in (scratch / "pids").read_text().split()]


def leftovers(home: Home) -> list[str]:
    """Command lines of processes that belong to a run of this home."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("MODELMILL_RUN_DIR", "").startswith(f"{home.root}{os.sep}"):
                found.append(" ".join(process.cmdline()))
        except psutil.Error:
            continue
    return found
