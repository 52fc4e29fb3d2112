"""The attention benchmark: its arithmetic, its reference, its files, and the experiment on fp8."""

from __future__ import annotations

import csv
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from modelmill.components.llama import attention_measures
from modelmill.components.llama.attention_config import AttentionBenchmarkConfig, IncoherenceConfig
from modelmill.components.llama.attention_measures import Case, Inputs, exact_row, measure
from modelmill.components.llama.benchmark_attention import benchmark_attention, cases
from modelmill.components.training.accelerator import CPU
from modelmill.components.training.documents import document_mask
from modelmill.components.training.incoherence import fp8_errors, hadamard, rotate, through_e4m3

TINY: dict[str, Any] = {
    "sequence_lengths": (24, 48),
    "tokens": 96,
    "num_heads": 4,
    "kv_heads": (2,),
    "head_dims": (16,),
    "dtypes": ("fp32", "bf16"),
    "document_lengths": (None, 10),
    "repeats": 3,
    "min_seconds": 0,
    "incoherence": {"sequence_length": 64, "head_dim": 32, "draws": 2},
}
OPTIONS: dict[str, Any] = {"repeats": 3, "min_seconds": 0, "deterministic": True, "seed": 1}


def tiny(**changes: Any) -> AttentionBenchmarkConfig:
    return AttentionBenchmarkConfig.model_validate({**TINY, **changes})


def test_operations_are_half_of_both_products() -> None:
    whole = Case("bf16", 8192, 2, 128, 16, 4, None)
    assert whole.lengths == [8192]
    assert whole.forward_flops == 4 * 2 * 16 * 8192 * 8192 * 128 / 2
    cut = Case("bf16", 100, 3, 64, 8, 8, 30)
    assert cut.lengths == [30, 30, 30, 10]
    assert cut.forward_flops == 4 * 3 * 8 * 64 * (3 * 900 + 100) / 2
    assert Case("bf16", 90, 1, 64, 8, 8, 30).lengths == [30, 30, 30]


def test_every_combination_is_a_case_of_as_many_tokens() -> None:
    found = list(cases(tiny(sequence_lengths=(24, 48, 200), kv_heads=(1, 4))))
    assert len(found) == len(set(found)) == 3 * 2 * 2 * 2
    assert {(case.sequence_length, case.rows) for case in found} == {(24, 4), (48, 2), (200, 1)}


@pytest.mark.parametrize("document_length", [None, 10])
@pytest.mark.parametrize("at_once", [7, 1024])
def test_reference_is_attention_in_float64(
    at_once: int, document_length: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_measures, "_QUERIES_AT_ONCE", at_once)
    case = Case("bf16", 24, 2, 16, 4, 2, document_length)
    inputs = Inputs.draw(case, torch.device("cpu"), seed=0)
    found = exact_row(case, inputs)

    leaves = [leaf[:1].detach().double().requires_grad_() for leaf in inputs.leaves]
    documents = case.documents(torch.device("cpu"))
    visible = document_mask(torch.zeros(1, 24, dtype=torch.int64) if documents is None else documents[:1])
    query, key, value = leaves[0], *(leaf.repeat_interleave(2, 1) for leaf in leaves[1:])
    scores = (query @ key.mT / 4).masked_fill(~visible, -math.inf)
    output = scores.softmax(-1) @ value
    gradients = torch.autograd.grad(output, leaves, inputs.gradient[:1].double())
    for mine, right in zip(found, (output, *gradients), strict=True):
        torch.testing.assert_close(mine, right[0].detach(), rtol=1e-12, atol=1e-12)


def test_inputs_lie_as_the_decoder_makes_them() -> None:
    inputs = Inputs.draw(Case("fp32", 24, 2, 16, 4, 2, None), torch.device("cpu"), seed=0)
    assert inputs.key.shape == (2, 2, 24, 16)
    assert inputs.query.transpose(1, 2).is_contiguous()


def test_peak_bytes_are_those_of_the_tensors() -> None:
    """Flash attention makes its output and a sum for each query, and three gradients; math makes all scores."""
    case = Case("fp32", 256, 2, 32, 4, 4, None)
    found = {record["kernel"]: record for record in measure(case, ("flash", "math"), CPU(), **OPTIONS)}
    tensor, sums = 4 * 2 * 4 * 256 * 32, 4 * 2 * 4 * 256
    assert found["flash"]["forward_peak_bytes"] >= tensor + sums
    assert found["math"]["forward_peak_bytes"] >= 4 * 2 * 4 * 256 * 256
    assert found["math"]["peak_bytes"] > found["flash"]["peak_bytes"] >= 4 * tensor + sums


def test_kernel_that_fails_on_a_shape_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(*_: Any) -> Any:
        raise torch.OutOfMemoryError("Tried to allocate 3 TiB.\nSee the documentation")

    working = attention_measures._errors

    def errors(attend: Any, *rest: Any) -> dict[str, float]:
        return out_of_memory() if attend.kernel is torch.nn.attention.SDPBackend.MATH else working(attend, *rest)

    monkeypatch.setattr(attention_measures, "_errors", errors)
    records = {
        r["kernel"]: r for r in measure(Case("fp32", 24, 1, 16, 4, 2, None), ("math", "flash"), CPU(), **OPTIONS)
    }
    assert records["math"]["absent"] == "fails on this shape (Tried to allocate 3 TiB.)"
    assert records["flash"]["forward_seconds"] > 0


def test_step_writes_tables_plot_and_tracks_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, output = tmp_path / "run", tmp_path / "data"
    output.mkdir()
    run.mkdir()
    monkeypatch.setenv("MODELMILL_RUN_DIR", str(run))
    monkeypatch.setenv("MODELMILL_STEP", "benchmark_attention")
    result = benchmark_attention(tiny(), output)

    report = json.loads((output / "attention.json").read_text())
    assert report["device"] == "cpu"
    assert set(report["absent"]) == {"efficient", "cudnn", "flex", "varlen", "flash3"}
    assert all(sum(reasons.values()) == 8 for reasons in report["absent"].values())
    assert len(report["measured"]) == 8 * 3
    assert result.counts == {"cases": 8, "kernels": 3}
    for record in report["measured"]:
        bound = 3e-6 if record["dtype"] == "fp32" else 5e-2
        assert 0 < record["max_error"] < bound
        assert 0 < record["max_gradient_error"] < bound
        case = Case(**{name: record[name] for name in Case.__dataclass_fields__})
        wanted = case.forward_flops / record["forward_seconds"] / 1e12
        assert record["forward_tflops"] == pytest.approx(wanted)
        wanted = 3.5 * case.forward_flops / record["forward_backward_seconds"] / 1e12
        assert record["forward_backward_tflops"] == pytest.approx(wanted)
    with (output / "attention.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [float(line["max_error"]) for line in lines] == [record["max_error"] for record in report["measured"]]
    assert (output / "attention.svg").read_text().count("documents of 10") == 2 * 2  # two dtypes, two columns

    assert result.metrics["math_max_error"] == max(r["max_error"] for r in report["measured"] if r["kernel"] == "math")
    assert result.metrics["incoherence_error_ratio"] == report["incoherence"]["ratio"]
    spool = [json.loads(line) for line in (run / "spool" / "benchmark_attention.jsonl").read_text().splitlines()]
    points = {(name, line["step"]) for line in spool if line["type"] == "metrics" for name in line["values"]}
    assert {("flash/bf16/d16/kv2/documents-10/forward_tflops", length) for length in (24, 48)} <= points
    assert {Path(line["path"]).name for line in spool if line["type"] == "artifact"} == {
        "attention.csv",
        "attention.json",
        "attention.svg",
    }
    (tags,) = [line["values"] for line in spool if line["type"] == "tags"]
    assert tags["attention.absent.flash3"] == "needs an NVIDIA GPU, and this run is on cpu"
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kv_heads": (3,)}, "kv_heads 3 does not divide num_heads 4; use 1, 2, 4"),
        ({"document_lengths": (24,)}, "document_lengths 24 leaves a row of 24 tokens whole"),
        ({"sequence_lengths": ()}, "sequence_lengths"),
        ({"incoherence": {"head_dim": 96}}, "head_dim 96 is no power of two"),
        ({"dtypes": ("fp8",)}, "dtypes"),
    ],
)
def test_what_cannot_be_measured_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        tiny(**changes)


def test_hadamard_is_sylvesters_matrix() -> None:
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    matrix = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(5):
        matrix = torch.kron(two, matrix)
    values = torch.randn(7, 3, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(hadamard(values), values @ matrix.T / math.sqrt(32))
    with pytest.raises(ValueError, match="a power of two, not 48"):
        hadamard(torch.ones(48))


def test_rotation_keeps_every_product() -> None:
    generator = torch.Generator().manual_seed(1)
    query, key = (torch.randn(50, 64, dtype=torch.float64, generator=generator) for _ in range(2))
    signs = torch.randint(2, (64,), generator=generator).double() * 2 - 1
    torch.testing.assert_close(rotate(query, signs) @ rotate(key, signs).T, query @ key.T, rtol=1e-12, atol=1e-12)
    spread = rotate(torch.nn.functional.one_hot(torch.tensor(5), 64).double(), signs)
    torch.testing.assert_close(spread.abs(), torch.full((64,), 0.125, dtype=torch.float64))


def test_e4m3_has_three_bits_below_the_leading_one() -> None:
    values = torch.linspace(1, 2, 200, dtype=torch.float64)
    kept = through_e4m3(torch.cat([values, torch.tensor([448.0], dtype=torch.float64)]))
    torch.testing.assert_close(kept[:-1], torch.round(values * 8) / 8, rtol=0, atol=0)
    assert kept[-1] == 448
    assert torch.equal(through_e4m3(values * 4), through_e4m3(values) * 4)  # the scale follows the tensor
    assert torch.equal(through_e4m3(torch.zeros(3)), torch.zeros(3))


def errors(**changes: Any) -> list[float]:
    config = IncoherenceConfig(**changes)
    sizes = (config.sequence_length, config.head_dim, config.outlier_share, config.outlier_std)
    return [fp8_errors(*sizes, seed).ratio for seed in range(4)]


def test_incoherent_processing_lowers_the_error_where_there_are_outliers() -> None:
    """1.5 to 2.1 times on this set-up; the published 2.6 is another one."""
    assert all(1.4 < ratio < 2.5 for ratio in errors())
    assert all(0.85 < ratio < 1.2 for ratio in errors(outlier_share=0.0))


@pytest.mark.slow
def test_laptop_recipe_runs(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "modelmill.pipelines.cli", "run", "laptop/attention-benchmark"]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("MODELMILL_", "MLFLOW_"))}
    environment = {**inherited, "MODELMILL_HOME": str(tmp_path / "home")}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "benchmark_attention.incoherence_error_ratio" in done.stdout


def test_gradient_errors_are_seen() -> None:
    """A kernel whose backward pass is wrong does not look right."""

    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(_ctx: Any, output: Tensor) -> Tensor:
            return output.clone()

        @staticmethod
        def backward(_ctx: Any, *gradients: Tensor) -> Tensor:
            return gradients[0] * 1.01

    case = Case("fp32", 24, 1, 16, 4, 2, None)
    inputs = Inputs.draw(case, torch.device("cpu"), seed=0)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        kernel = torch.nn.functional.scaled_dot_product_attention
        return Wrong.apply(kernel(query, key, value, is_causal=True, enable_gqa=True))

    found = attention_measures._errors(attend, inputs, exact_row(case, inputs))
    assert found["max_error"] < 1e-6
    assert found["max_gradient_error"] == pytest.approx(0.01, rel=1e-3)


def test_recipe_needs_no_torch() -> None:
    code = "import sys, modelmill.pipelines.recipes.attention_benchmark; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
