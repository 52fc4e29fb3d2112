"""The step: what it writes, what it refuses, and that neither processes nor an end in the middle change the result."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from modelmill.components.core.errors import UserError
from modelmill.components.core.manifest import Manifest
from modelmill.components.core.recipe import validate
from modelmill.components.core.weights import weights_digest
from modelmill.components.embedding.config import EmbeddingTrainingConfig, RetrievalConfig
from modelmill.components.embedding.evaluate_retrieval import evaluate_retrieval
from modelmill.components.embedding.finetune_embedding import finetune_embedding
from tests.components.embedding.samples import make_base, make_pairs, records

SETTINGS: dict[str, Any] = {
    "batch_size": 16,
    "learning_rate": 5e-3,
    "log_every": 1,
    "accelerator": "cpu",
    "checkpoint_every": 4,
    "threads_per_process": 1,
}


def tune(scratch: Path, pairs: Manifest, base: Manifest, **config: Any) -> Manifest:
    output = scratch / "data"
    output.mkdir(parents=True, exist_ok=True)
    section = EmbeddingTrainingConfig(**{"steps": 8, **SETTINGS, **config})
    result = finetune_embedding(section, output, pairs=pairs, base=base)
    return Manifest.describe(
        output, kind=result.kind, counts=result.counts, metrics=result.metrics, metadata=result.metadata
    )


def history(run: Manifest) -> list[dict[str, float]]:
    return [json.loads(line) for line in run.path("history.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def tuned(pairs: Manifest, base: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return tune(tmp_path_factory.mktemp("tuned"), pairs, base, steps=40, max_sequence_length=16)


class TestResult:
    def test_held_out_texts_are_found_better(
        self, tuned: Manifest, base: Manifest, pairs: Manifest, tmp_path: Path
    ) -> None:
        found = []
        for name, model in (("base", base), ("tuned", tuned)):
            (tmp_path / name).mkdir()
            found.append(evaluate_retrieval(RetrievalConfig(), tmp_path / name, model=model, pairs=pairs).metrics)
        assert found[1]["ndcg_at_10"] > found[0]["ndcg_at_10"] + 0.2

    def test_manifest_says_what_it_was_made_of(self, tuned: Manifest, base: Manifest, pairs: Manifest) -> None:
        folder = Path(tuned.uri) / "model"
        assert tuned.kind == "model"
        assert tuned.metadata == {
            "flavor": "embedding",
            "method": "multiple_negatives_ranking",
            "weights_digest": weights_digest(folder),
            "base_digest": base.metadata["weights_digest"],
            "dataset_digest": pairs.digest,
        }
        counts = {name: tuned.counts[name] for name in ("dimension", "max_sequence_length", "steps", "world_size")}
        assert counts == {"dimension": 32, "max_sequence_length": 16, "steps": 40, "world_size": 1}

    def test_weights_are_safetensors_only_and_no_file_names_a_place(self, tuned: Manifest, tmp_path: Path) -> None:
        for entry in tuned.files:
            content = tuned.path(entry.path).read_bytes()
            assert entry.path.endswith((".safetensors", ".json", ".jsonl", ".txt")), entry.path
            assert str(tmp_path.parent.parent).encode() not in content, entry.path

    def test_history_holds_every_logged_step(self, tuned: Manifest) -> None:
        assert [record["step"] for record in history(tuned)] == list(range(1, 41))


class TestRefusals:
    @pytest.mark.parametrize(
        ("config", "words"),
        [
            ({}, "epochs, steps: neither is given"),
            ({"steps": 1, "epochs": 1}, r"epochs, steps: 1\.0 and 1 are both given"),
            ({"steps": 1, "mini_batch_size": 8}, "mini_batch_size: 8 with loss multiple_negatives_ranking"),
            ({"steps": 1, "loss": "cached_multiple_negatives_ranking"}, "mini_batch_size: None with loss cached"),
            ({"steps": 1, "batch_size": 9, "processes_per_node": 2}, "batch_size: 9 cannot be shared evenly"),
            ({"steps": 1, "loss": "cosent", "processes_per_node": 2}, "changes the loss cosent; use 1"),
            ({"steps": 1, "loss": "triplet"}, "loss: 'triplet'"),
            ({"steps": 1, "learning_rate": float("nan")}, "learning_rate"),
        ],
        ids=["none", "both", "mini", "cached", "odd", "cosent", "loss", "nan"],
    )
    def test_a_section_that_does_not_fit_itself(self, config: dict[str, Any], words: str) -> None:
        with pytest.raises(UserError, match=words):
            validate(EmbeddingTrainingConfig, config)

    def test_a_batch_that_the_texts_cannot_fill(self, base: Manifest, tmp_path: Path) -> None:
        rows = [{"sentence1": record["sentence1"], "sentence2": f"the {n % 12}"} for n, record in enumerate(records())]
        pairs = make_pairs(tmp_path / "pairs", rows)
        with pytest.raises(UserError, match=r"training\.batch_size: 16 pairs need as many different texts.* has \d"):
            tune(tmp_path / "run", pairs, base)

    def test_scores_that_are_missing(self, pairs: Manifest, base: Manifest, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"training\.loss: cosent orders pairs by their scores"):
            tune(tmp_path, pairs, base, loss="cosent")

    def test_a_validation_without_pairs(self, base: Manifest, tmp_path: Path) -> None:
        pairs = make_pairs(tmp_path / "pairs", validation_fraction=0.0)
        with pytest.raises(UserError, match=r"training\.validate_every: 2, and there are no validation pairs"):
            tune(tmp_path / "run", pairs, base, validate_every=2)

    def test_another_artifact_than_pairs(self, base: Manifest, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="is of kind model; run prepare_pairs"):
            tune(tmp_path, base, base)

    def test_weights_that_changed_since(self, pairs: Manifest, tmp_path: Path) -> None:
        base = make_base(tmp_path / "base")
        weights = tmp_path / "base" / "model" / "model.safetensors"
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
        with pytest.raises(UserError, match="is corrupt"):
            tune(tmp_path / "run", pairs, base)


@pytest.mark.slow
def test_two_processes_have_the_trajectory_of_one(pairs: Manifest, tmp_path: Path) -> None:
    """A question is compared with the texts of both processes, as if they were one; embedded in parts, too."""
    base = make_base(tmp_path / "base", dropout=0.0)
    sizes = {"loss": "cached_multiple_negatives_ranking", "mini_batch_size": 4}
    runs = [tune(tmp_path / str(count), pairs, base, processes_per_node=count, **sizes) for count in (1, 2)]
    losses = [[record["loss"] for record in history(run)] for run in runs]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    weights = [load_file(run.path("model/model.safetensors")) for run in runs]
    for name, value in weights[0].items():
        if not name.endswith("key.bias"):  # no loss depends on it, and AdamW scales rounding up
            np.testing.assert_allclose(weights[1][name], value, rtol=1e-3, atol=1e-4, err_msg=name)


_PROGRAM = """
import sys
from pathlib import Path
from modelmill.components.core.manifest import Manifest
from modelmill.components.embedding.config import EmbeddingTrainingConfig
from modelmill.components.embedding.finetune_embedding import finetune_embedding
folder = Path(sys.argv[1])
config = EmbeddingTrainingConfig.model_validate_json((folder / "config.json").read_text())
finetune_embedding(config, folder / "data", pairs=Manifest.read(folder / "pairs"), base=Manifest.read(folder / "base"))
"""


@pytest.mark.slow
def test_killed_and_resumed_is_undisturbed(pairs: Manifest, base: Manifest, tmp_path: Path) -> None:
    config = {"steps": 200, "checkpoint_every": 20, "processes_per_node": 2, "validate_every": 50}
    whole = tune(tmp_path / "whole", pairs, base, **config)
    folder = tmp_path / "killed"
    (folder / "data").mkdir(parents=True)
    pairs.write(folder / "pairs")
    base.write(folder / "base")
    (folder / "config.json").write_text(EmbeddingTrainingConfig(**{**SETTINGS, **config}).model_dump_json())
    process = subprocess.Popen([sys.executable, "-c", _PROGRAM, str(folder)], start_new_session=True)
    deadline = time.monotonic() + 120
    while not list(folder.glob("checkpoints/checkpoint-*/whole")):
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (folder / "result.json").exists()
    resumed = tune(folder, pairs, base, **config)
    assert history(resumed) == history(whole)
    assert resumed.metadata == whole.metadata
    assert resumed.digest == whole.digest
