"""The laptop recipe of the embedding pipeline with less data and fewer steps: from documentation to a champion."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow
COMMAND = [sys.executable, "-m", "modelmill.pipelines.cli", "run", "laptop/embedding-docs"]
SMALLER = {
    "pairs.source.max_records": 1500,
    "pairs.source.distributions": "[click, rich, networkx]",
    "pairs.test_fraction": 0.15,
    "training.steps": 10,
    "training.max_sequence_length": 48,
    "training.validate_every": 5,
    "gate.margin": 0,  # so few texts are nearly all found by the base
}
SERVE = """
import json, mlflow
model = mlflow.pyfunc.load_model("models:/docs-embedding@champion")
vectors = model.predict(["What does a progress bar show?", "Show progress.", "Sort a graph."])["vectors"]
print(json.dumps((vectors @ vectors.T).tolist()))
"""


def environment(work: Path) -> dict[str, str]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("MODELMILL_", "MLFLOW_", "OMP_"))}
    return {**inherited, "MODELMILL_HOME": str(work / "home")}


def run(work: Path) -> str:
    changes = [word for name, value in SMALLER.items() for word in ("--set", f"{name}={value}")]
    done = subprocess.run([*COMMAND, *changes], cwd=work, env=environment(work), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def manifest(work: Path, step: str) -> dict[str, Any]:
    paths = sorted((work / "home" / "store" / step).glob("*/manifest.json"), key=lambda path: path.stat().st_mtime)
    return json.loads(paths[-1].read_text())


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    run(folder)
    return folder


def test_the_tuned_model_finds_held_out_answers_better(work: Path) -> None:
    base, tuned = (manifest(work, step) for step in ("evaluate_base", "evaluate_tuned"))
    assert manifest(work, "gate")["metadata"]["passed"]
    for name in ("recall_at_1", "mrr_at_10", "ndcg_at_10", "cosine"):
        assert tuned["metrics"][name] > base["metrics"][name]
    assert tuned["metadata"]["weights_digest"] == manifest(work, "finetune_embedding")["metadata"]["weights_digest"]
    assert base["metadata"]["weights_digest"] == manifest(work, "fetch_model")["metadata"]["weights_digest"]


def test_it_is_the_champion_and_serves_vectors(work: Path) -> None:
    assert manifest(work, "promote")["metadata"]["outcome"] == "promoted"
    variables = {**environment(work), "MLFLOW_TRACKING_URI": f"sqlite:///{work / 'home' / 'mlflow.db'}"}
    done = subprocess.run([sys.executable, "-c", SERVE], cwd=work, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    cosines = json.loads(done.stdout.splitlines()[-1])
    assert [cosines[n][n] for n in range(3)] == pytest.approx([1, 1, 1], abs=1e-5)
    assert cosines[0][1] > cosines[0][2]


def test_a_second_run_trains_nothing_and_promotes_nothing(work: Path) -> None:
    told = run(work)
    for step in ("fetch_model", "prepare_pairs", "finetune_embedding", "evaluate_base", "evaluate_tuned", "gate"):
        assert f"{step}: reused" in told, told
    assert manifest(work, "promote")["metadata"]["outcome"] == "already"
    assert manifest(work, "register_model")["metadata"]["version"] == "1"
