"""Steps with outputs, and a bucket of their own as the store: what the tests of the store in S3 share."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from modelmill.components.core import tracking
from modelmill.components.core.home import Home
from modelmill.components.core.manifest import Manifest
from modelmill.components.core.recipe import Section
from modelmill.components.core.step import StepResult, run_step, section, step_options
from tests.fakes.s3_server import S3Server

CALLS: list[str] = []


class Config(Section):
    """A step's section."""

    text: str = "hello"
    wait: str = ""


def write(config: Config, output: Path, **upstream: Manifest) -> StepResult:
    """Writes its text and what it read, beside a checkpoint; no two attempts are equal when `wait` is set."""
    CALLS.append(config.text)
    (output / "deep").mkdir(exist_ok=True)
    (output / "deep" / "text.txt").write_text(config.text)
    read = {name: each.path("deep/text.txt").read_text() for name, each in upstream.items()}
    (output / "read.json").write_text(json.dumps(read))
    (output.parent / "checkpoint").write_text("1")
    tracking.log_metrics({"letters": len(config.text)})
    tracking.log_artifact(output / "read.json")
    if config.wait:  # until another process is as far
        (output / "who").write_text(str(os.getpid()))
        Path(config.wait, str(os.getpid())).touch()
        while len(list(Path(config.wait).iterdir())) < 2:
            pass
    return StepResult("text", counts={"letters": len(config.text)})


@step_options(resumable=True)
def train(config: Config, output: Path) -> StepResult:
    """Goes on from its checkpoint."""
    steps = output.parent / "steps"
    before = steps.read_text() if steps.exists() else ""
    steps.write_text(before + "x")
    if len(before) < 1:
        raise RuntimeError("killed")
    (output / "steps").write_text(steps.read_text())
    return StepResult("model")


@step_options(reuse=False)
def register(config: Config, output: Path) -> StepResult:
    """A side effect; every time another output."""
    CALLS.append("register")
    (output / "number").write_text(str(len(CALLS)))
    return StepResult("registration")


@dataclass
class Bucket:
    """A store of its own on the session's server."""

    server: S3Server
    name: str
    use: Callable[[str], Home]
    uri: str = ""

    def objects(self) -> list[str]:
        listed = self.server.client().list_objects_v2(Bucket=self.name).get("Contents", [])
        return [entry["Key"].removeprefix("deep/prefix/") for entry in listed]

    def read(self, key: str) -> bytes:
        return self.server.client().get_object(Bucket=self.name, Key=f"deep/prefix/{key}")["Body"].read()

    def put(self, key: str, content: bytes) -> None:
        self.server.client().put_object(Bucket=self.name, Key=f"deep/prefix/{key}", Body=content)


def run(function: Any, config: Config | None = None, inputs: dict[str, str] | None = None, **outputs: str) -> Manifest:
    name = function.__name__
    return run_step(function, section(name, config or Config(), function), inputs or {}, outputs)


def refused(capsys: pytest.CaptureFixture[str], function: Any = write, config: Config | None = None) -> str:
    """The one line a step ends with."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as failure:
        run(function, config)
    assert failure.value.code == 2
    return [line for line in capsys.readouterr().err.splitlines() if "ERROR" in line][-1].partition("ERROR ")[2]
