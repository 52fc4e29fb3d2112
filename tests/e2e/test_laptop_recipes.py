"""The laptop recipes from the command line to the registry, as a new user runs them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.e2e.command import last, manifests, modelmill


def test_whole_pipeline_succeeds(tmp_path: Path) -> None:
    """Seconds long: part of `make test`."""
    done = modelmill(tmp_path, "run", "laptop/llama-smoke")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "register_model" in done.stdout
    runs = json.loads(modelmill(tmp_path, "runs", "--json").stdout)
    assert len(runs) == 1


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
    _changed_value_recomputes_only_what_depends_on_it(homes[0])


def _changed_value_recomputes_only_what_depends_on_it(home: Path) -> None:
    """And the same weights, registered again, are the same version."""
    done = modelmill(home, "run", "laptop/llama-smoke", "--set", "evaluation.num_samples=0")
    assert done.returncode == 0, done.stdout + done.stderr
    for step in ("ingest_corpus", "train_tokenizer", "pack_tokens", "pretrain"):
        assert f"{step}: reused" in done.stdout, done.stdout
    assert "evaluate_heldout: finished" in done.stdout
    registrations = manifests(home, "register_model")
    assert len(registrations) > 1
    assert len({manifest["metadata"]["version"] for manifest in registrations}) == 1


@pytest.mark.slow
def test_demo_beats_the_bigram_baseline(demo_home: Path) -> None:
    metrics = last(demo_home, "evaluate_heldout")["metrics"]
    assert metrics["validation_loss"] < metrics["bigram_validation_loss"]
    assert metrics["bits_per_byte"] < metrics["bigram_bits_per_byte"] < metrics["unigram_bits_per_byte"]
