"""The laptop recipes from the command line to the registry, as a new user runs them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.e2e.command import last, manifests, modelmill


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

    def test_changed_value_recomputes_only_what_depends_on_it(self, work: Path) -> None:
        done = modelmill(work, "run", "laptop/llama-smoke", "--set", "evaluation.num_samples=0")
        assert done.returncode == 0, done.stdout + done.stderr
        for step in ("ingest_corpus", "train_tokenizer", "pack_tokens", "pretrain"):
            assert f"{step}: reused" in done.stdout, done.stdout
        assert "evaluate_heldout: finished" in done.stdout

    def test_same_weights_register_no_second_version(self, work: Path) -> None:
        registrations = manifests(work, "register_model")
        assert len(registrations) == 2
        assert len({manifest["metadata"]["version"] for manifest in registrations}) == 1


@pytest.mark.slow
def test_a_repeated_run_reuses_and_another_home_gives_bit_identical_weights(tmp_path: Path) -> None:
    homes = [tmp_path / "one", tmp_path / "other"]
    for home in homes:
        home.mkdir()
        done = modelmill(home, "run", "laptop/llama-smoke")
        assert done.returncode == 0, done.stdout + done.stderr
    again = modelmill(homes[0], "run", "laptop/llama-smoke")
    assert again.returncode == 0, again.stdout + again.stderr
    for step in ("ingest_corpus", "train_tokenizer", "pack_tokens", "pretrain", "evaluate_heldout"):
        assert f"{step}: reused" in again.stdout, again.stdout
    for step in ("ingest_corpus", "train_tokenizer", "pack_tokens", "pretrain"):
        (mine,), (theirs,) = (manifests(home, step) for home in homes)
        assert mine["files"] == theirs["files"], step
    assert mine["metadata"]["weights_digest"] == theirs["metadata"]["weights_digest"]


@pytest.mark.slow
def test_demo_beats_the_bigram_baseline(demo_home: Path) -> None:
    metrics = last(demo_home, "evaluate_heldout")["metrics"]
    assert metrics["validation_loss"] < metrics["bigram_validation_loss"]
    assert metrics["bits_per_byte"] < metrics["bigram_bits_per_byte"] < metrics["unigram_bits_per_byte"]
