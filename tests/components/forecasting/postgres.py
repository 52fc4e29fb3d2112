"""A PostgreSQL server of its own for the tests that need one, where the machine has the programs."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

PASSWORD = "not-to-be-seen"


def _programs() -> Path:
    found = shutil.which("initdb")
    places = [Path(found).parent] if found else sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not places:
        pytest.skip("PostgreSQL is not installed here (initdb, pg_ctl)")
    return places[-1]


@contextmanager
def running_server() -> Iterator[str]:
    """Start a server on the loopback interface; yields its URL, with user and password."""
    programs = _programs()
    account: dict[str, Any] = {}
    folder = Path(tempfile.mkdtemp(prefix="modelmill-postgres-"))
    if os.geteuid() == 0:  # which the server refuses to run as
        try:
            user = pwd.getpwnam("postgres")
        except KeyError:
            pytest.skip("PostgreSQL does not run as root, and there is no account postgres")
        os.chown(folder, user.pw_uid, user.pw_gid)
        account = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    data = folder / "data"
    (folder / "password").write_text(PASSWORD)
    (folder / "password").chmod(0o644)

    def call(program: str, *arguments: str) -> None:
        command = [str(programs / program), "-D", str(data), *arguments]
        subprocess.run(command, check=True, timeout=120, stdout=subprocess.DEVNULL, cwd=folder, **account)

    try:
        call("initdb", "-U", "searcher", f"--pwfile={folder / 'password'}", "--auth=scram-sha-256", "--no-sync")
        options = f"-c listen_addresses=127.0.0.1 -p {port} -k {folder} -c fsync=off"
        call("pg_ctl", "-w", "-o", options, "-l", str(folder / "log"), "start")
        try:
            yield f"postgresql://searcher:{PASSWORD}@127.0.0.1:{port}/postgres"
        finally:
            call("pg_ctl", "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
