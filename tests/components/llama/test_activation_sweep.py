"""The activation sweep from the worker's answers to the files of the step, and what it refuses."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from modelmill.components.core.errors import UserError
from modelmill.components.llama import sweep_worker
from modelmill.components.llama.activation_sweep import activation_sweep, measure, pareto
from modelmill.components.llama.sweep_config import ActivationSweepConfig
from modelmill.components.training import activations
from modelmill.pipelines import catalog
from modelmill.pipelines.recipes.activation_sweep import ActivationSweepRecipe

MODEL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
    "max_sequence_length": 64,
}
SWEEP = {
    "modes": ["none", "selective_matmul", "selective", "full"],
    "sequence_length": 64,
    "micro_batch_size": 2,
    "precision": "bf16-mixed",
    "repeats": 2,
    "accelerator": "cpu",
    "threads": 1,
}


def sweep_config(**changes: Any) -> ActivationSweepConfig:
    return ActivationSweepConfig.model_validate({"model": MODEL, "sweep": {**SWEEP, **changes}})


def answers(config: ActivationSweepConfig, turns: int = 0) -> list[dict[str, Any]]:
    """What the worker of the first mode says, in this process."""
    job = json.dumps({"config": config.model_dump(mode="json"), "index": 0, "threads": 1})
    lines = iter([job, *["go"] * turns, ""])
    said: list[dict[str, Any]] = []
    deterministic = torch.are_deterministic_algorithms_enabled()
    try:
        sweep_worker.main(lambda: next(lines), said.append)
    finally:
        torch.use_deterministic_algorithms(deterministic)
    return said


@pytest.mark.slow
def test_the_step_writes_measurements_that_belong_together(tmp_path: Path) -> None:
    config = sweep_config(modes=["none", "full"])
    result = activation_sweep(config, tmp_path)
    records = json.loads((tmp_path / "results.json").read_text())["modes"]
    none, full = records
    assert [record["mode"] for record in records] == ["none", "full"]
    assert full["saved_bytes"] < none["saved_bytes"] < none["peak_bytes"]
    assert none["recomputed_flops"] == 0 < full["recomputed_flops"] < none["step_flops"]
    for record in records:
        assert record["gradient_difference"] == 0
        assert record["step_seconds_low"] <= record["step_seconds"] <= record["step_seconds_high"]
        assert record["tokens_per_second"] == pytest.approx(2 * 64 / record["step_seconds"])
        assert len(record["all_step_seconds"]) == 2
        assert result.metrics[f"{record['mode']}_saved_bytes"] == record["saved_bytes"]
    with (tmp_path / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["saved_bytes"]) for row in rows] == [record["saved_bytes"] for record in records]
    page = (tmp_path / "report.html").read_text()
    assert page.count("<tr>") == 3
    assert "<svg" in page
    headline = ActivationSweepRecipe(pipeline="activation_sweep", name="n", **config.model_dump()).headline()
    assert {name.removeprefix("activation_sweep.") for name in headline} <= result.metrics.keys()
    assert result.metadata["pareto_modes"] == [record["mode"] for record in records if record["pareto"]]


def test_recomputed_operations_are_counted_exactly() -> None:
    """Of one block: the qkv, output and fused gate and up products and attention; the last product is not needed."""
    tokens, hidden, heads, inner, layers = 2 * 64, 32, (4 + 2 * 2) * 8, 80, 3
    products = 2 * tokens * hidden * (heads + hidden + 2 * inner)
    attention = 4 * 2 * 4 * 64 * 64 * 8
    recomputed = {mode: answers(sweep_config(modes=[mode]))[0]["recomputed_flops"] for mode in SWEEP["modes"]}
    assert recomputed == {
        "none": 0,
        "selective": 0,
        "selective_matmul": layers * attention,
        "full": layers * (products + attention),
    }


def test_the_worker_times_one_step_a_line() -> None:
    said = answers(sweep_config(modes=[{"every_n_layers": 2}]), turns=3)
    assert [sorted(answer) for answer in said[1:]] == [["seconds"]] * 3


def test_other_gradients_stop_the_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(model: nn.Module, mode: object) -> None:
        with torch.no_grad():
            next(model.parameters()).mul_(1.001)

    monkeypatch.setattr(activations, "apply", wrong)
    with pytest.raises(RuntimeError, match=r"the gradients differ by .*, more than 0"):
        answers(sweep_config(modes=["full"]))


def test_what_the_machine_cannot_do_is_a_users_error() -> None:
    with pytest.raises(UserError, match=r"training\.accelerator: 'neuron' is not in this machine"):
        measure(sweep_config(accelerator="neuron"))


def test_a_worker_that_dies_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "")
    monkeypatch.setattr("modelmill.components.llama.activation_sweep.WORKER", "modelmill.components.llama.no_such")
    with pytest.raises(RuntimeError, match=r"activation mode none failed\n.*No module named"):
        measure(sweep_config())


@pytest.mark.parametrize(
    ("points", "optimal"),
    [
        ([(4, 1), (2, 2), (1, 3)], {0, 1, 2}),
        ([(4, 1), (2, 2), (2, 3)], {0, 1}),  # slower at the same memory
        ([(4, 2), (2, 2), (3, 1)], {1, 2}),
        ([(1, 1), (1, 1)], {0, 1}),  # equal points do not beat each other
        ([(5, 5)], {0}),
    ],
)
def test_pareto(points: list[tuple[float, float]], optimal: set[int]) -> None:
    assert pareto(points) == optimal


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("sweep.sequence_length=512", ["sweep.sequence_length: 512", "model.max_sequence_length 256"]),
        ("model.vocab_size=null", ["model.vocab_size", "is not set"]),
        ("sweep.modes=[full, full]", ["modes: full is listed more than once"]),
        ("sweep.modes=[]", ["sweep.modes"]),
        ("sweep.modes=[half]", ["sweep.modes.0: 'half'", "use none, full"]),
        ("sweep.modes=[{budget: 2}]", ["sweep.modes.0: {'budget': 2}", "{budget: 0 to 1}"]),
        ("sweep.repeats=0", ["sweep.repeats: Input should be greater than 0"]),
    ],
)
def test_a_wrong_recipe_is_answered_in_one_line(override: str, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        catalog.load("laptop/activation-sweep", [override])
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


@pytest.mark.slow
def test_the_laptop_recipe_runs_from_the_command_line(tmp_path: Path) -> None:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("MODELMILL_", "MLFLOW_", "OMP_"))}
    command = [sys.executable, "-m", "modelmill.pipelines.cli", "run", "laptop/activation-sweep"]
    environment = {**inherited, "MODELMILL_HOME": str(tmp_path / "home")}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for mode in ("none", "selective", "selective_matmul", "every_2_layers", "full"):
        assert f"activation_sweep.{mode}_saved_bytes" in done.stdout
    assert "report.html" in done.stdout
