"""Fine-tuning and retraining from the command line to the champion, on the model of the smoke recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.command import last, modelmill, states

pytestmark = pytest.mark.slow
RETRAIN = ["--set", "pipeline=retrain", "--set", "new_data.min_records=5"]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with the pretrained model that the recipes start from."""
    folder = tmp_path_factory.mktemp("work")
    done = modelmill(folder, "run", "laptop/llama-smoke")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def champion(work: Path) -> str:
    models = json.loads(modelmill(work, "models", "docs-qa-smoke", "--json").stdout)
    return models[0]["aliases"].get("champion", "")


def test_without_its_base_the_recipe_says_what_makes_it(tmp_path: Path) -> None:
    done = modelmill(tmp_path, "run", "laptop/lora-smoke")
    assert done.returncode == 2
    assert "`modelmill run laptop/llama-smoke` makes it" in done.stdout + done.stderr


def test_the_tuned_model_is_promoted(work: Path) -> None:
    done = modelmill(work, "run", "laptop/lora-smoke")
    assert done.returncode == 0, done.stdout + done.stderr
    assert last(work, "promote")["metadata"]["outcome"] == "promoted"
    assert champion(work) == last(work, "promote")["metadata"]["version"]
    gate = last(work, "gate")["metadata"]
    assert gate["candidate_weights_digest"] == last(work, "merge_adapter")["metadata"]["weights_digest"]
    assert gate["reference_weights_digest"] == last(work, "fetch_model")["metadata"]["weights_digest"]


def test_a_repeated_run_promotes_once(work: Path) -> None:
    before = champion(work)
    done = modelmill(work, "run", "laptop/lora-smoke")
    assert done.returncode == 0, done.stdout + done.stderr
    assert last(work, "promote")["metadata"]["outcome"] == "already"
    assert champion(work) == before


def test_a_retraining_without_new_data_does_nothing_and_says_so(work: Path) -> None:
    done = modelmill(work, "run", "laptop/lora-smoke", *RETRAIN)
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = last(work, "find_new_data")
    assert found["counts"]["new"] == 0
    assert states(done.stdout)["finetune"] == "skipped"
    assert last(work, "report_outcome")["metadata"]["outcome"] == "unchanged"


def test_new_data_is_learnt_and_compared_with_the_champion(work: Path) -> None:
    before = champion(work)
    changes = ["--set", "instructions.source={type: installed-docs-qa, distributions: [click, rich, pydantic, kfp]}"]
    done = modelmill(work, "run", "laptop/lora-smoke", *RETRAIN, *changes)
    assert done.returncode == 0, done.stdout + done.stderr
    assert last(work, "find_new_data")["counts"]["new"] >= 5
    version = last(work, "fetch_champion")["metadata"]["version"]
    assert version == before
    outcome = last(work, "promote")["metadata"]["outcome"]
    assert outcome in ("promoted", "kept")
    assert last(work, "report_outcome")["metadata"]["outcome"] == outcome
    assert champion(work) == (last(work, "promote")["metadata"]["version"] if outcome == "promoted" else before)


def test_a_failed_retraining_reports_too(work: Path) -> None:
    done = modelmill(work, "run", "laptop/lora-smoke", *RETRAIN, "--set", "instructions.sequence_length=4096")
    assert done.returncode == 2, done.stdout + done.stderr
    assert last(work, "report_outcome")["metadata"]["outcome"] == "failed"
