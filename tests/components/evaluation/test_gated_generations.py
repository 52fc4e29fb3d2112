"""Generations of two models through the shells: scored, gated, and the answer handed to the pipeline.

Without `from __future__ import annotations`, which kfp refuses in a pipeline.
"""

import inspect
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from kfp import compiler, dsl

from modelmill.components.core.home import Home
from modelmill.components.core.manifest import Manifest
from modelmill.components.core.step import section
from modelmill.components.evaluation import component
from modelmill.components.evaluation.config import GateConfig, GenerationScoresConfig, GuardConfig
from modelmill.components.evaluation.gate import gate
from modelmill.components.evaluation.generation import score_generations
from modelmill.components.evaluation.records import Generation, write_generations, write_scores

WORDS = ["read", "file", "line", "open", "path", "byte", "text", "write", "close", "mode", "name", "error"]


class Outputs:
    """What kfp hands to a shell: artifacts with a path, and metrics that can be logged."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.metrics = folder, {}  # type: ignore[var-annotated]

    def __call__(self, name: str) -> Any:
        return SimpleNamespace(path=str(self.folder / name), log_metric=self.metrics.__setitem__)


def generations(folder: Path, share: float, seed: int) -> Any:
    """An artifact of answers of which a share of the words is right."""
    folder.mkdir(parents=True)
    generator, chance = random.Random(0), random.Random(seed)
    examples = []
    for number in range(60):
        words = generator.choices(WORDS, k=10)
        answer = [word if chance.random() < share else "wrong" for word in words]
        examples.append(Generation(f"q{number}", "Which?", (" ".join(words),), " ".join(answer)))
    write_generations(folder / "generations.jsonl", examples)
    path = folder.parent / f"{folder.name}.json"
    Manifest.describe(folder, kind="generations", metadata={"weights_digest": folder.name}).write(path)
    return SimpleNamespace(path=str(path))


def scores(folder: Path, made: Any) -> tuple[Any, Outputs]:
    out = Outputs(folder)
    config = GenerationScoresConfig(metrics=("rougeL", "token_f1"), resamples=100)
    text = section("score_generations", config, score_generations)
    component.score_generations.python_func(text, made, out("manifest"), out("report"), out("table"), out("metrics"))
    return out("manifest"), out


def test_the_better_model_passes_and_the_worse_does_not(home: Home, tmp_path: Path) -> None:
    base, out = scores(tmp_path / "base", generations(tmp_path / "base-made", 0.4, 1))
    assert (tmp_path / "base" / "report").read_text().startswith("<!doctype html>")
    assert 0.3 < out.metrics["rougeL"] < 0.5
    tuned, _ = scores(tmp_path / "tuned", generations(tmp_path / "tuned-made", 0.7, 2))
    config = GateConfig(metric="rougeL", resamples=500, guards=(GuardConfig(metric="token_f1", max_drop=0.02),))
    answers = []
    for candidate, reference in ((tuned, base), (base, tuned)):
        out = Outputs(tmp_path / f"gate-{len(answers)}")
        args = (section("gate", config, gate), candidate, reference)
        answers.append(component.gate.python_func(*args, out("manifest"), out("report"), out("table"), out("metrics")))
        assert out.metrics["passed"] == float(answers[-1])
    assert answers == [True, False]
    manifest = Manifest.read(tmp_path / "gate-0" / "manifest")
    assert manifest.metadata["candidate_weights_digest"] == "tuned-made"
    assert manifest.metadata["reference_weights_digest"] == "base-made"
    assert "| % difference (relative) |" in (tmp_path / "gate-0" / "table").read_text()


def test_guards_come_from_scores_of_any_step(home: Home, tmp_path: Path) -> None:
    """Losses of held-out rows guard the base's own task: no references, and lower is better."""
    base, _ = scores(tmp_path / "base", generations(tmp_path / "base-made", 0.4, 1))
    tuned, _ = scores(tmp_path / "tuned", generations(tmp_path / "tuned-made", 0.7, 2))
    losses, own = np.random.default_rng(0).normal(3.0, 0.5, 40), {}
    for name, shift in (("base", 0.0), ("forgetful", 0.4)):
        folder = tmp_path / f"{name}-losses"
        folder.mkdir()
        write_scores(folder / "scores.jsonl", [f"row-{row}" for row in range(40)], {"loss": losses + shift})
        Manifest.describe(folder, kind="losses").write(tmp_path / f"{name}-losses.json")
        own[name] = SimpleNamespace(path=str(tmp_path / f"{name}-losses.json"))
    guard = GuardConfig(metric="loss", direction="lower", max_drop=0.1, examples="other")
    text = section("gate", GateConfig(metric="rougeL", resamples=500, guards=(guard,)), gate)
    for name, passes in (("base", True), ("forgetful", False)):
        out = Outputs(tmp_path / f"gate-{name}")
        results = (out("manifest"), out("report"), out("table"), out("metrics"))
        answer = component.gate.python_func(text, tuned, base, *results, own[name], own["base"])
        assert answer is passes
    assert "loses more than 0.1" in (tmp_path / "gate-forgetful" / "table").read_text()


def test_shells_compile_and_the_answer_decides_what_runs_next(tmp_path: Path) -> None:
    @dsl.pipeline(name="gated")
    def gated(scoring: str, deciding: str, uri: str) -> None:
        made = dsl.importer(artifact_uri=uri, artifact_class=dsl.Artifact)
        base = component.score_generations(section=scoring, generations=made.output)
        tuned = component.score_generations(section=scoring, generations=made.output)
        answer = component.gate(
            section=deciding, candidate=tuned.outputs["manifest"], reference=base.outputs["manifest"]
        )
        with dsl.If(answer.outputs["Output"] == True):  # noqa: E712 (kfp compares)
            component.score_generations(section=scoring, generations=made.output)

    compiler.Compiler().compile(gated, str(tmp_path / "gated.yaml"))
    assert (tmp_path / "gated.yaml").stat().st_size


@pytest.mark.parametrize("shell", [component.score_generations, component.gate], ids=lambda shell: shell.name)
def test_shells_stay_shells(shell: Any) -> None:
    assert len(inspect.getsource(shell.python_func).splitlines()) <= 30
