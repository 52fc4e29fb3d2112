"""The command as a new user starts it, and what its runs left behind."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

COMMAND = [sys.executable, "-m", "modelmill.pipelines.cli"]


def modelmill(work: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a folder of its own, without this process's settings."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("MODELMILL_", "MLFLOW_", "OMP_"))}
    full = {**inherited, "MODELMILL_HOME": str(work / "home"), **environment}
    return subprocess.run([*COMMAND, *arguments], cwd=work, env=full, capture_output=True, text=True)


def manifests(work: Path, step: str) -> list[dict[str, Any]]:
    """Manifests of a step's outputs, the oldest first."""
    paths = sorted((work / "home" / "store" / step).glob("*/manifest.json"), key=lambda path: path.stat().st_mtime)
    return [json.loads(path.read_text()) for path in paths]


def last(work: Path, step: str) -> dict[str, Any]:
    """What a step made in the newest run that finished it."""
    for run in sorted((work / "home" / "runs").iterdir(), reverse=True):
        for line in reversed((run / "events.jsonl").read_text().splitlines()):
            event = json.loads(line)
            if event.get("step") == step and event.get("event") in ("finished", "reused"):
                return json.loads((Path(event["uri"]).parent / "manifest.json").read_text())
    raise AssertionError(f"{step} never finished in {work}")


def states(output: str) -> dict[str, str]:
    """State of every step as the summary at a run's end shows it."""
    return dict(re.findall(r"^  ([\w-]+) +(finished|reused|skipped|failed|waiting)\b", output, re.MULTILINE))
