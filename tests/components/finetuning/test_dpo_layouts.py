"""One rank, copies and shards learn the same preferences; a stopped run ends as an undisturbed one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from modelmill.components.core.manifest import Manifest
from modelmill.components.finetuning.dpo import train
from modelmill.components.training.launch import TrainingJob
from tests.components.finetuning import dpo_runs
from tests.components.finetuning.preference_data import dpo_config, job_spec, make_preferences
from tests.components.training.forked_ranks import ForkedRanks
from tests.components.training.runs import history, single_rank

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def bases(exact: Path, tied: Path, llama: Path, half: Path) -> dict[str, Path]:
    return {"exact": exact, "tied": tied, "llama": llama, "half": half}


@pytest.fixture(scope="module")
def preferences(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return make_preferences(tmp_path_factory.mktemp("data") / "preferences")


@pytest.fixture(scope="module")
def launched(
    bases: dict[str, Path], preferences: Manifest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    scratch = tmp_path_factory.mktemp("two ranks")
    training = dpo_config(parallel=dpo_runs.COPIES).training
    spec = {name: str(folder) for name, folder in bases.items()} | {"preferences": preferences.model_dump(mode="json")}
    result = ForkedRanks().launch(TrainingJob(dpo_runs.MODULE, spec, training, scratch))
    return scratch, result.metadata["found"]


def alone(base: Path, preferences: Manifest, scratch: Path, **changes: Any) -> Path:
    config = dpo_config(**{**changes, "parallel": {"processes_per_node": 1}})
    scratch.mkdir(parents=True)
    train(single_rank(scratch), job_spec(config, base, preferences, scratch / "data"), config.training)
    return scratch


def trained(scratch: Path) -> dict[str, torch.Tensor]:
    (path,) = [*scratch.glob("data/*/adapter_model.safetensors"), *scratch.glob("data/*/model.safetensors")]
    return load_file(path)


@pytest.mark.parametrize("name", [name for name, (base, _) in dpo_runs.SCENARIOS.items() if base in ("exact", "tied")])
def test_every_layout_is_one_trajectory(
    launched: tuple[Path, dict[str, Any]], bases: dict[str, Path], preferences: Manifest, tmp_path: Path, name: str
) -> None:
    base, changes = dpo_runs.SCENARIOS[name]
    one = alone(bases[base], preferences, tmp_path / "one", **{"micro_batch_size": 8, **changes})
    two = launched[0] / name
    (ours,), (theirs,) = two.glob("reference-*.npy"), one.glob("reference-*.npy")
    np.testing.assert_allclose(np.load(ours), np.load(theirs), rtol=1e-10)
    expected, found = history(one), history(two)
    for records in (expected, found):
        records[0].pop("reward_accuracy")  # before the first update the sign of a margin is that of its rounding
    assert [record["step"] for record in found] == [record["step"] for record in expected]
    for record, other in zip(found, expected, strict=True):
        assert record == pytest.approx(other, rel=1e-7, abs=1e-9)
    weights, reference = trained(two), trained(one)
    assert weights.keys() == reference.keys()
    for key, value in weights.items():
        assert value.dtype == torch.float64
        torch.testing.assert_close(value, reference[key], rtol=1e-6, atol=1e-9)


def test_lower_precision_follows(
    launched: tuple[Path, dict[str, Any]], bases: dict[str, Path], preferences: Manifest, tmp_path: Path
) -> None:
    one = alone(bases["half"], preferences, tmp_path / "one", precision="bf16-mixed")
    losses = {}
    for scratch in (one, launched[0] / "half on shards", launched[0] / "bf16 weights on shards"):
        losses[scratch.name] = [record["loss"] for record in history(scratch) if "loss" in record]
    assert losses["half on shards"] == pytest.approx(losses["one"], abs=0.02)
    assert losses["bf16 weights on shards"] == pytest.approx(losses["one"], abs=0.1)
    assert losses["one"][-1] < losses["one"][0]


def test_a_stopped_run_ends_with_the_same_bits(launched: tuple[Path, dict[str, Any]]) -> None:
    scratch, found = launched
    assert "of 6" in found["message"]
    for path in ("history.jsonl", "data/adapter/adapter_model.safetensors"):
        assert (scratch / "stopped" / path).read_bytes() == (scratch / "dropout" / path).read_bytes()
