"""One registry for a module of tests; each test uses a registered model of its own name."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event
from sqlalchemy.engine import Engine

from modelmill.components.core import events
from tests.components.registry.versions import Workshop
from tests.fakes.aws import aws, s3_url  # noqa: F401  (fixtures)


@pytest.fixture(scope="module")
def workshop(empty_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    folder = tmp_path_factory.mktemp("registry")
    (folder / "home").mkdir()
    shutil.copyfile(empty_store, folder / "home" / "mlflow.db")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "MLFLOW_REGISTRY_URI", "KFP_POD_NAME"):
            patch.delenv(name, raising=False)
        for name in (events.RUN_VARIABLE, events.STEP_VARIABLE):
            patch.delenv(name, raising=False)
        patch.setenv("MODELMILL_HOME", str(folder / "home"))
        patch.setenv("MODELMILL_USER", "tester")
        event.listen(Engine, "connect", _hasty)
        yield Workshop(folder)
        event.remove(Engine, "connect", _hasty)


def _hasty(connection: Any, record: object) -> None:
    """A registry that need not outlive a power cut: its tests would mostly wait for the disk."""
    if isinstance(connection, sqlite3.Connection):
        connection.execute("PRAGMA synchronous=OFF")
