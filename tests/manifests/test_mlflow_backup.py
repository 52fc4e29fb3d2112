"""Backing up and restoring MLflow, with the commands of docs/operations.md, on real servers."""

from __future__ import annotations

import base64
import functools
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.components.forecasting.postgres import PASSWORD, running_server
from tests.manifests.conftest import named, pods

pytestmark = pytest.mark.slow
LOGIN = importlib.util.find_spec("flask_wtf") is not None
ADMIN = "admin", "a-password-of-16-characters"
MLFLOW = Path(sys.executable).with_name("mlflow")


@contextmanager
def server(arguments: list[str], database: str, folder: Path) -> Iterator[str]:
    """The server as its Deployment starts it, on a loopback port; yields its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    auth = folder / "basic_auth.ini"
    auth.write_text(
        "[mlflow]\ndefault_permission = READ\n"
        f"database_uri = {database}\nadmin_username = {ADMIN[0]}\nadmin_password = {ADMIN[1]}\n"
    )
    environment = os.environ | {
        "MLFLOW_BACKEND_STORE_URI": database,
        "MLFLOW_AUTH_CONFIG_PATH": str(auth),
        "MLFLOW_FLASK_SERVER_SECRET_KEY": "for-tests",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    here = {"0.0.0.0": "127.0.0.1", "5000": str(port), "--workers=2": "--workers=1"}
    filled = [functools.reduce(lambda text, pair: text.replace(*pair), here.items(), each) for each in arguments]
    with (folder / f"server-{port}.log").open("wb") as log:
        process = subprocess.Popen(
            [MLFLOW, "server", *filled], env=environment, stdout=log, stderr=log, cwd=folder, start_new_session=True
        )
    try:
        address = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 300  # for a busy machine; a quiet one needs 5
        while process.poll() is None and time.monotonic() < deadline:
            try:
                urllib.request.urlopen(f"{address}/health", timeout=2).close()
                break
            except OSError:
                time.sleep(0.2)
        else:
            raise AssertionError((folder / f"server-{port}.log").read_text()[-3000:])
        yield address
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def ask(address: str, path: str, body: dict[str, Any] | bytes | None = None, method: str | None = None) -> Any:
    """One request to MLflow's API as the administrator."""
    data = json.dumps(body).encode() if isinstance(body, dict) else body
    request = urllib.request.Request(address + path, data=data, method=method)
    request.add_header("Authorization", "Basic " + base64.b64encode(":".join(ADMIN).encode()).decode())
    if isinstance(body, dict):
        request.add_header("Content-Type", "application/json")
    with urllib.request.urlopen(request, timeout=30) as answer:
        content = answer.read()
    return json.loads(content) if content[:1] == b"{" else content


def postgres(program: str, url: str, *arguments: str) -> None:
    parts = urlsplit(url)
    environment = os.environ | {"PGPASSWORD": PASSWORD}
    place = ["-h", str(parts.hostname), "-p", str(parts.port), "-U", str(parts.username)]
    subprocess.run([program, *place, *arguments], check=True, env=environment, capture_output=True, timeout=60)


def test_a_server_comes_back_from_its_dump_and_its_artifacts(tmp_path: Path, overlays: dict[str, Any]) -> None:
    if not shutil.which("pg_dump") or not shutil.which("pg_restore"):
        pytest.skip("pg_dump and pg_restore are not installed here")
    (container,) = pods(overlays["kind"])["Deployment mlflow"]["spec"]["containers"]
    settings = named(overlays["kind"], "ConfigMap")["mlflow-server"]["data"]

    def arguments(artifacts: Path) -> list[str]:
        # The image has what the login needs (images/mlflow/requirements.txt), this environment perhaps not.
        given = [each for each in container["args"] if LOGIN or not each.startswith("--app-name")]
        values = {"$(ARTIFACTS_DESTINATION)": f"file://{artifacts}", "$(ALLOWED_HOSTS)": settings["allowed_hosts"]}
        filled = given
        for word, value in values.items():
            filled = [each.replace(word, value) for each in filled]
        return [*filled, f"--allowed-hosts={settings['allowed_hosts']},127.0.0.1:5000"]

    live, restored, dump = tmp_path / "artifacts", tmp_path / "restored", tmp_path / "mlflow.dump"
    with running_server() as url:
        postgres("createdb", url, "mlflow")
        postgres("createdb", url, "copy")
        first, second = (url.rpartition("/")[0] + f"/{name}" for name in ("mlflow", "copy"))
        with server(arguments(live), first, tmp_path) as address:
            api = "/api/2.0/mlflow"
            run = ask(address, f"{api}/runs/create", {"experiment_id": "0", "run_name": "before"})["run"]["info"]
            ask(
                address,
                f"{api}/runs/log-metric",
                {"run_id": run["run_id"], "key": "loss", "value": 0.5, "timestamp": 1},
            )
            ask(address, f"{api}/registered-models/create", {"name": "champion"})
            artifact = f"/api/2.0/mlflow-artifacts/artifacts/0/{run['run_id']}/artifacts/notes.txt"
            ask(address, artifact, b"kept", "PUT")
            if LOGIN:
                with pytest.raises(urllib.error.HTTPError) as refused:
                    urllib.request.urlopen(f"{address}{api}/experiments/search?max_results=1", timeout=10)
                assert refused.value.code == 401, "nothing without a login"
            stranger = urllib.request.Request(f"{address}{api}/experiments/search?max_results=1")
            stranger.add_header("Host", "elsewhere.example.com")
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(stranger, timeout=10)
            assert refused.value.code == 403, "a host that is not allowed"
            # The backup, while the server runs: database first, artifacts after it, as artifacts are never changed.
            postgres("pg_dump", first, "--format=custom", f"--file={dump}", "mlflow")
            shutil.copytree(live, restored)
        postgres("dropdb", first, "mlflow")
        shutil.rmtree(live)
        postgres("pg_restore", second, "--dbname=copy", "--no-owner", "--exit-on-error", str(dump))
        subprocess.run([MLFLOW, "db", "upgrade", second], check=True, capture_output=True, timeout=120)
        with server(arguments(restored), second, tmp_path) as address:
            found = ask(address, f"{api}/runs/get?run_id={run['run_id']}")["run"]
            assert found["info"]["run_name"] == "before"
            assert [(each["key"], each["value"]) for each in found["data"]["metrics"]] == [("loss", 0.5)]
            assert ask(address, f"{api}/registered-models/get?name=champion")["registered_model"]["name"] == "champion"
            assert ask(address, artifact) == b"kept"
