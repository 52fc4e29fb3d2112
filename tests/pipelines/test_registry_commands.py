"""`modelmill models` and `modelmill rollback` as people and programs use them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from modelmill.components.core.errors import UserError
from modelmill.components.core.home import Home
from modelmill.pipelines.cli import cli
from tests.components.registry.versions import Workshop
from tests.pipelines.conftest import modelmill


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(cli, list(arguments))


@pytest.fixture
def workshop(tmp_path: Path, home: Home, monkeypatch: pytest.MonkeyPatch) -> Iterator[Workshop]:
    """Models in the store that the module's tests share; every test uses a name of its own."""
    monkeypatch.setenv("MODELMILL_USER", "tester")
    from modelmill.components.core.mlflow_store import connect

    connect(home.tracking_uri)
    return Workshop(tmp_path)


def test_the_list_and_the_way_back(workshop: Workshop) -> None:
    history = workshop.reign("listed", 2)
    table = invoke("models", "listed").output
    lines = [line.split() for line in table.splitlines()]
    assert lines[0] == ["MODEL", "VERSION", "ALIASES", "GATE", "DECISION", "METHOD", "WEIGHTS", "DATA"]
    weights = [model.metadata["weights_digest"][:12] for model, *_ in history]
    assert lines[1] == ["listed", "2", "candidate,", "champion", "-", "promoted", "-", weights[1], "-"]
    assert lines[2] == ["listed", "1", "previous", "-", "promoted", "-", weights[0], "-"]

    done = invoke("rollback", "listed", "--reason", "wrong language")
    assert done.exit_code == 0, done.output
    assert done.output.splitlines() == [
        f"listed: version 1 is the champion again (weights {weights[0]})",
        "version 2 is marked as rolled back: wrong language",
    ]
    (model,) = json.loads(invoke("models", "listed", "--json").output)
    assert model["aliases"] == {"candidate": "2", "champion": "1"}
    assert model["versions"][0]["rolled_back"] == "wrong language"
    assert "rolled back" in invoke("models").output


def test_rollback_as_json(workshop: Workshop) -> None:
    workshop.reign("as-json", 3)
    done = json.loads(invoke("rollback", "as-json", "--json").output)
    assert (done["champion"], done["rolled_back"], done["previous"], done["reason"]) == (
        "2",
        "3",
        "1",
        "no reason given",
    )
    assert "a further rollback" not in invoke("rollback", "as-json").output


def test_mistakes_are_one_line(home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert "no model is registered; a pipeline" in invoke("models").output
    failed = invoke("models", "nothing")
    assert isinstance(failed.exception, UserError)
    assert not home.root.exists(), "a look leaves nothing behind"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    done = modelmill("rollback", "some")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1, done.stderr
    assert "then run the command again" in done.stderr
