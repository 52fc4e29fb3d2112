"""What several long tests start from."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.command import modelmill


@pytest.fixture(scope="session")
def demo_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for `command.modelmill` in which laptop/llama-demo has run: minutes, once a session."""
    folder = tmp_path_factory.mktemp("demo")
    done = modelmill(folder, "run", "laptop/llama-demo")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder
