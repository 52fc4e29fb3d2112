"""One rank, copies and shards train the same adapter; a stopped run ends as an undisturbed one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from modelmill.components.core.manifest import Manifest
from modelmill.components.finetuning.finetune import train
from modelmill.components.training.launch import TrainingJob
from tests.components.finetuning import runs
from tests.components.finetuning.samples import finetune_config, job_spec
from tests.components.training.forked_ranks import ForkedRanks
from tests.components.training.runs import history, single_rank

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def bases(exact: Path, tied: Path, llama: Path, half: Path) -> dict[str, Path]:
    return {"exact": exact, "tied": tied, "llama": llama, "half": half}


@pytest.fixture(scope="module")
def launched(
    bases: dict[str, Path], instructions: Manifest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    scratch = tmp_path_factory.mktemp("two ranks")
    training = finetune_config(parallel=runs.COPIES).training
    spec = {name: str(folder) for name, folder in bases.items()} | {
        "instructions": instructions.model_dump(mode="json")
    }
    result = ForkedRanks().launch(TrainingJob(runs.MODULE, spec, training, scratch))
    return scratch, result.metadata["found"]


def alone(base: Path, instructions: Manifest, scratch: Path, **changes: Any) -> Path:
    config = finetune_config(**{**changes, "parallel": {"processes_per_node": 1}})
    scratch.mkdir(parents=True)
    train(single_rank(scratch), job_spec(config, base, instructions, scratch / "data"), config.training)
    return scratch


def trained(scratch: Path) -> dict[str, torch.Tensor]:
    (path,) = [*scratch.glob("data/*/adapter_model.safetensors"), *scratch.glob("data/*/model.safetensors")]
    return load_file(path)


@pytest.mark.parametrize("name", [name for name, (base, _) in runs.SCENARIOS.items() if base in ("exact", "tied")])
def test_every_layout_is_one_trajectory(
    launched: tuple[Path, dict[str, Any]], bases: dict[str, Path], instructions: Manifest, tmp_path: Path, name: str
) -> None:
    base, changes = runs.SCENARIOS[name]
    one = alone(bases[base], instructions, tmp_path / "one", **{"micro_batch_size": 8, **changes})
    two = launched[0] / name
    expected, found = history(one), history(two)
    assert [record["step"] for record in found] == [record["step"] for record in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-8)
    weights, reference = trained(two), trained(one)
    assert weights.keys() == reference.keys()
    for key, value in weights.items():
        assert value.dtype == torch.float64
        torch.testing.assert_close(value, reference[key], rtol=1e-7, atol=1e-10)


def test_a_llama_follows_one_trajectory_too(
    launched: tuple[Path, dict[str, Any]], bases: dict[str, Path], instructions: Manifest, tmp_path: Path
) -> None:
    one = alone(bases["llama"], instructions, tmp_path / "one", micro_batch_size=8)
    for ours, theirs in zip(history(launched[0] / "lora on llama shards"), history(one), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


def test_a_4_bit_base_follows_one_trajectory_too(
    launched: tuple[Path, dict[str, Any]], bases: dict[str, Path], instructions: Manifest, tmp_path: Path
) -> None:
    one = alone(bases["llama"], instructions, tmp_path / "one", method="qlora", micro_batch_size=8)
    for name in ("qlora on copies", "qlora on shards"):
        for ours, theirs in zip(history(launched[0] / name), history(one), strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5), name
        for key, value in trained(launched[0] / name).items():
            torch.testing.assert_close(value, trained(one)[key], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("method", ["qlora", "dora"])
def test_shards_in_bf16_learn_what_one_rank_does(
    launched: tuple[Path, dict[str, Any]], bases: dict[str, Path], instructions: Manifest, tmp_path: Path, method: str
) -> None:
    one = alone(bases["half"], instructions, tmp_path / "one", method=method, precision="bf16-mixed")
    losses = [
        [record["loss"] for record in history(scratch) if "loss" in record]
        for scratch in (one, launched[0] / f"{method} half on shards")
    ]
    assert losses[0] == pytest.approx(losses[1], abs=0.02)
    assert losses[0][0] > losses[0][-1]


def test_a_base_in_bf16_stays_so_and_its_adapter_is_fp32(
    launched: tuple[Path, dict[str, Any]], bases: dict[str, Path], instructions: Manifest, tmp_path: Path
) -> None:
    one = alone(bases["half"], instructions, tmp_path / "one", precision="bf16-mixed")
    losses = {}
    for scratch in (one, launched[0] / "half on shards", launched[0] / "half on copies"):
        assert {value.dtype for value in trained(scratch).values()} == {torch.float32}
        losses[scratch.name] = [record["loss"] for record in history(scratch) if "loss" in record]
    for name in ("half on shards", "half on copies"):
        assert losses[name] == pytest.approx(losses["one"], abs=0.02)
    assert losses["one"][0] > losses["one"][-1]
    narrow = launched[0] / "bf16 weights on shards"
    assert {value.dtype for value in trained(narrow).values()} == {torch.bfloat16}
    assert [record["loss"] for record in history(narrow) if "loss" in record] == pytest.approx(losses["one"], abs=0.1)


def test_a_stopped_run_ends_with_the_same_bits(launched: tuple[Path, dict[str, Any]]) -> None:
    scratch, found = launched
    assert "of 6" in found["message"]
    for path in ("history.jsonl", "data/adapter/adapter_model.safetensors"):
        assert (scratch / "stopped" / path).read_bytes() == (scratch / "dropout" / path).read_bytes()


def test_checkpoints_hold_only_what_trains(launched: tuple[Path, dict[str, Any]]) -> None:
    scratch, found = launched
    newest = sorted((scratch / "lora on shards" / "checkpoints").glob("step-*"))[-1]
    shapes = {
        name: entry["shape"] for name, entry in json.loads((newest / "checkpoint.json").read_text())["tensors"].items()
    }
    model = {name: shape for name, shape in shapes.items() if name.startswith("model/")}
    assert model
    assert all("lora_" in name for name in model)
    counts = found["lora on shards"]
    assert sum(torch.Size(shape).numel() for shape in model.values()) == counts["trained_parameters"]
    assert counts["trained_parameters"] < counts["parameters"]
    with safe_open(newest / "model-1.safetensors", "pt") as file:
        assert list(file.keys())  # sharded: the second rank has its part
