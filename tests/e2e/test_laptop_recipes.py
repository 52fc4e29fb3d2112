"""The laptop recipes from the command line to the registry, as a new user runs them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.e2e.command import manifests, modelmill


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("work")


class TestSmoke:
    """Seconds long: part of `make test`."""

    def test_whole_pipeline_succeeds(self, work: Path) -> None:
        done = modelmill(work, "run", "laptop/llama-smoke")
        assert done.returncode == 0, done.stdout + done.stderr
        assert "register_model" in done.stdout
        runs = json.loads(modelmill(work, "runs", "--json").stdout)
        assert len(runs) == 1

    def test_second_run_reuses_everything_but_the_registration(self, work: Path) -> None:
        done = modelmill(work, "run", "laptop/llama-smoke")
        assert done.returncode == 0, done.stdout + done.stderr
        for step in ("ingest_corpus", "train_tokenizer", "pack_tokens", "pretrain", "evaluate_heldout"):
            assert f"{step}: reused" in done.stdout, done.stdout

    def test_same_weights_register_no_second_version(self, work: Path) -> None:
        versions = {manifest["metadata"]["version"] for manifest in manifests(work, "register_model")}
        assert len(versions) == 1

    def test_changed_value_recomputes_only_what_depends_on_it(self, work: Path) -> None:
        done = modelmill(work, "run", "laptop/llama-smoke", "--set", "evaluation.num_samples=0")
        assert done.returncode == 0, done.stdout + done.stderr
        assert "pretrain: reused" in done.stdout
        assert "evaluate_heldout: finished" in done.stdout

    def test_same_seed_gives_bit_identical_weights(self, work: Path) -> None:
        """Another home, so that nothing can be reused."""
        other = work / "other"
        other.mkdir()
        done = modelmill(other, "run", "laptop/llama-smoke")
        assert done.returncode == 0, done.stdout + done.stderr
        mine, theirs = manifests(work, "pretrain")[-1], manifests(other, "pretrain")[-1]
        assert mine["metadata"]["weights_digest"] == theirs["metadata"]["weights_digest"]
        assert mine["files"] == theirs["files"]
        assert manifests(work, "ingest_corpus")[-1]["files"] == manifests(other, "ingest_corpus")[-1]["files"]


@pytest.mark.slow
def test_demo_beats_the_bigram_baseline(tmp_path: Path) -> None:
    done = modelmill(tmp_path, "run", "laptop/llama-demo")
    assert done.returncode == 0, done.stdout + done.stderr
    metrics = manifests(tmp_path, "evaluate_heldout")[-1]["metrics"]
    assert metrics["validation_loss"] < metrics["bigram_validation_loss"]
    assert metrics["bits_per_byte"] < metrics["bigram_bits_per_byte"] < metrics["unigram_bits_per_byte"]
