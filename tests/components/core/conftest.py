"""A bucket as the store of a test."""

from __future__ import annotations

from pathlib import Path

import pytest

from modelmill.components.core.home import Home
from modelmill.components.core.store_cache import release
from tests.components.core.stored_steps import CALLS, Bucket
from tests.fakes.s3_server import S3Server


@pytest.fixture
def bucket(s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: Home) -> Bucket:
    """A new bucket as this process's store, a home of its own; `use` changes to the home of another machine."""
    CALLS.clear()
    release()

    def use(name: str) -> Home:
        release()
        monkeypatch.setenv("MODELMILL_HOME", str(tmp_path / name))
        return Home.current()

    s3_server.enter(monkeypatch)
    made = Bucket(s3_server, s3_server.bucket(), use)
    made.uri = f"s3://{made.name}/deep/prefix"
    monkeypatch.setenv("MODELMILL_STORE", f"{made.uri}/")
    return made
