"""Scores of held-out pairs equal those of whole logits by hand, and the gate takes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from modelmill.components.core.errors import UserError
from modelmill.components.core.home import Home
from modelmill.components.core.manifest import Manifest
from modelmill.components.data.preference_config import PreferencesConfig
from modelmill.components.data.preference_rows import open_preferences, read_pairs
from modelmill.components.data.preferences import prepare_preferences
from modelmill.components.evaluation.config import GateConfig
from modelmill.components.evaluation.gate import gate
from modelmill.components.evaluation.preference_config import PreferenceScoresConfig
from modelmill.components.evaluation.preferences import score_preferences
from modelmill.components.evaluation.records import read_scores
from tests.components.data.instruction_data import CHATML, records_in, tokenizer_in, untagged
from tests.components.evaluation.answering import make_model, produce


def section(**changes: Any) -> PreferenceScoresConfig:
    return PreferenceScoresConfig.model_validate({"device": "cpu", "precision": "fp32", "resamples": 200, **changes})


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return tokenizer_in(tmp_path_factory.mktemp("tokenizer") / "chatml", untagged(CHATML))


@pytest.fixture(scope="module")
def preferences(tokenizer: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    folder = tmp_path_factory.mktemp("preferences")
    records = [
        {
            "prompt": f"What is {n} + {n}?",
            "chosen": f"It is {n + n}.",
            "rejected": "No." if n % 2 else "Who knows what it is?",
        }
        for n in range(60)
    ]
    path = records_in(folder / "records.jsonl", records)
    source = {"type": "files", "paths": [str(path)], "records": {"format": "text"}}
    values = {"source": source, "sequence_length": 128, "validation_fraction": 0.2, "test_fraction": 0.3}
    return produce(folder, prepare_preferences, PreferencesConfig.model_validate(values), tokenizer=tokenizer)


@pytest.fixture(scope="module")
def model(tokenizer: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return make_model(tmp_path_factory.mktemp("model"), tokenizer)


@pytest.fixture(autouse=True)
def at_home(home: Home) -> None:
    pass


def by_hand(model: Manifest, preferences: Manifest, split: str) -> np.ndarray:
    """Log-probabilities of both answers from whole logits in fp64, [pairs, 2]."""
    judge = AutoModelForCausalLM.from_pretrained(str(Path(model.uri) / "model"), dtype=torch.float64).eval()
    rows, found = open_preferences(preferences, split), []
    for pair in range(len(rows)):
        for side in (0, 1):
            tokens, mask = rows.conversation(pair, side)
            ids = torch.from_numpy(tokens.astype(np.int64))
            with torch.inference_mode():
                logits = judge(ids[None, :-1]).logits[0].log_softmax(-1)
            found.append(float(logits[torch.arange(len(ids) - 1), ids[1:]][torch.from_numpy(mask[1:])].sum()))
    return np.array(found).reshape(-1, 2)


@pytest.mark.parametrize("batch_tokens", [1, 10_000])
def test_scores_are_those_of_whole_logits(
    model: Manifest, preferences: Manifest, tmp_path: Path, batch_tokens: int
) -> None:
    made = produce(
        tmp_path, score_preferences, section(batch_tokens=batch_tokens), model=model, preferences=preferences
    )
    scores = read_scores(made, "scores")
    order = np.argsort([record["id"] for record in read_pairs(preferences, "test")])
    expected = by_hand(model, preferences, "test")[order]
    lengths = open_preferences(preferences, "test").targets[order]
    margin = expected[:, 0] - expected[:, 1]
    assert np.allclose(scores.values["margin"], margin, atol=1e-4)
    assert scores.values["preferred"].tolist() == (margin > 0).tolist()
    rates = expected / lengths
    assert np.allclose(scores.values["margin_per_token"], rates[:, 0] - rates[:, 1], atol=1e-5)
    assert 0 < made.metrics["preferred"] < 1
    for name in ("preferred", "margin", "margin_per_token"):
        assert made.metrics[f"{name}_lower"] < made.metrics[name] < made.metrics[f"{name}_upper"]
    assert made.metadata["weights_digest"] == model.metadata["weights_digest"]
    assert made.metadata["dataset_digest"] == preferences.digest
    assert made.counts["examples"] == preferences.counts["test_pairs"]


def test_the_gate_takes_them(model: Manifest, preferences: Manifest, tmp_path: Path) -> None:
    made = produce(tmp_path / "scores", score_preferences, section(max_pairs=9), model=model, preferences=preferences)
    assert made.counts["examples"] == 9
    config = GateConfig.model_validate({"metric": "margin_per_token", "resamples": 200})
    judged = produce(tmp_path / "gate", gate, config, candidate=made, reference=made)
    assert judged.metadata["passed"] is False  # against itself nothing is better


def test_bad_input_is_one_line(model: Manifest, preferences: Manifest, tokenizer: Manifest, tmp_path: Path) -> None:
    def refused(match: str, judge: Manifest = model, data: Manifest = preferences, **changes: Any) -> None:
        with pytest.raises(UserError, match=match) as error:
            produce(tmp_path / "scores", score_preferences, section(**changes), model=judge, preferences=data)
        assert "\n" not in str(error.value)

    refused(r"^preferences: .* is of kind model", data=model)
    refused(r"^model: .* holds no model/", judge=preferences)
    template = {"kind": "chat", "text": CHATML.replace("|im_end|", "|end|"), "variables": {}}
    changed = preferences.metadata | {"template": template}
    refused("pair 1 was made with another tokenizer", data=preferences.model_copy(update={"metadata": changed}))
    short = make_model(tmp_path / "short", tokenizer, max_position_embeddings=16)
    refused(r"^preferences.sequence_length: a pair has \d+ tokens and the model 16", judge=short)
    counts = preferences.counts | {"vocab_size": 7}
    refused("a tokenizer of 7 entries", data=preferences.model_copy(update={"counts": counts}))
