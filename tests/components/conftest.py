"""A fresh home for every test, an empty MLflow store that is made once, and a real tracking server."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from modelmill.components.core import events, tracking
from modelmill.components.core.home import Home


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    """A home of its own, outside any run."""
    for name in (
        "MLFLOW_TRACKING_URI",
        "MLFLOW_RUN_ID",
        "MLFLOW_REGISTRY_URI",
        events.RUN_VARIABLE,
        events.STEP_VARIABLE,
        "MODELMILL_STORE",
        "MODELMILL_CACHE",
        "MODELMILL_CACHE_GB",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MODELMILL_HOME", str(tmp_path / "home"))
    return Home.current()


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SQLite store without a run; creating one takes MLflow two seconds, copying it nothing."""
    from modelmill.components.core.mlflow_store import connect

    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    connect(f"sqlite:///{path}")
    return path


@pytest.fixture
def store_home(home: Home, empty_store: Path) -> Home:
    """A home whose embedded store exists already."""
    home.root.mkdir(parents=True)
    shutil.copyfile(empty_store, home.root / "mlflow.db")
    return home


class RunFolder:
    """A pipeline run's folder, and its records written as the launcher and the steps write them."""

    def __init__(self, home: Home, run_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.path = home.runs / run_id
        self.run_id = run_id
        self.path.mkdir(parents=True)
        self._monkeypatch = monkeypatch

    def enter(self, step: str = "") -> None:
        """Make this process belong to the run (and a step of it)."""
        self._monkeypatch.setenv(events.RUN_VARIABLE, str(self.path))
        self._monkeypatch.setenv(events.STEP_VARIABLE, step)

    def record(self, spool: str, kind: str, **fields: Any) -> None:
        self.enter(spool)
        tracking.record(kind, spool=spool, **fields)

    def begin(self, experiment: str = "tests") -> None:
        self.record(tracking.RUN_SPOOL, "start", run_id=self.run_id, name=f"run {self.run_id}", experiment=experiment)

    def end(self, status: str = "FINISHED") -> None:
        self.record(tracking.RUN_SPOOL, "end", status=status)


@pytest.fixture
def make_run(monkeypatch: pytest.MonkeyPatch) -> Callable[[Home, str], RunFolder]:
    def make(home: Home, run_id: str = "run-1") -> RunFolder:
        return RunFolder(home, run_id, monkeypatch)

    return make


class TrackingServer:
    """A real `mlflow server` on the loopback interface that can be killed and started again."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.folder, self.uri = folder, f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--backend-store-uri", f"sqlite:///{self.folder / 'mlflow.db'}", "--workers", "1"]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, env=environment, start_new_session=True, cwd=self.folder
            )
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=1).close()
                return
            except OSError:
                time.sleep(0.1)
        pytest.fail((self.folder / "server.log").read_text()[-2000:])

    def kill(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


@pytest.fixture
def tracking_server(tmp_path: Path, empty_store: Path) -> Iterator[TrackingServer]:
    folder = tmp_path / "server"
    folder.mkdir()
    shutil.copyfile(empty_store, folder / "mlflow.db")
    server = TrackingServer(folder)
    server.start()
    yield server
    server.kill()


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A `small_model.SmallModel`, built once."""
    from tests.components import small_model

    return small_model.build(tmp_path_factory.mktemp("small-model"))
