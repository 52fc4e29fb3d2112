"""Steps run in a store of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from modelmill.components.core.events import STEP_VARIABLE
from modelmill.components.core.home import Home
from modelmill.components.core.manifest import Manifest
from modelmill.components.core.step import StepFunction
from tests.components.forecasting.tables import Prepare, Produce


def produce_in(folder: Path, step: StepFunction, config: Any, **upstream: Manifest) -> Manifest:
    """Run a step function as `run_step` does, without keys and reuse."""
    data = folder / "data"
    data.mkdir(parents=True)
    result = step(config, data, **upstream)
    return Manifest.describe(
        data, kind=result.kind, counts=result.counts, metrics=result.metrics, metadata=result.metadata
    )


@pytest.fixture(autouse=True)
def isolated(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """A home of its own; what `run_step` sets in the environment is undone after the test."""
    monkeypatch.setenv(STEP_VARIABLE, "")


@pytest.fixture
def produce(tmp_path: Path) -> Produce:
    """Run a step function into a folder that is named after it."""

    def run(step: StepFunction, config: Any, **upstream: Manifest) -> Manifest:
        made = len(list(tmp_path.glob(f"{step.__name__}*")))
        return produce_in(tmp_path / f"{step.__name__}{made}", step, config, **upstream)

    return run


@pytest.fixture
def prepare(produce: Produce, tmp_path: Path) -> Prepare:
    """`prepare_series` on a table."""
    return Prepare(produce, tmp_path)
