"""The card says what the numbers say, also where they speak against the model."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from modelmill.components.registry.config import RegisterConfig
from modelmill.components.registry.model_card import limitations, model_card, short_description
from tests.components.evaluation.samples import MEASURED

CONFIG = RegisterConfig(name="m", description="Completes text", recipe_name="laptop/demo", recipe_hash="feed")
GOOD: dict[str, Any] = {
    **MEASURED,
    "provenance": {
        "weights_digest": "ab" * 32,
        "dataset_digest": "cd" * 32,
        "tokenizer_digest": "ef" * 32,
        "parameters": 200_000_000,
        "optimizer_steps": 1000,
        "tokens_trained_on": 5_000_000_000,
        "processes": 2,
        "vocabulary": 32_000,
        "sequence_length": 2048,
        "training_split_tokens": 5_000_000_000,
        "training_split_bytes": 20_000_000_000,
        "test_split_tokens": 10_000,
        "test_split_bytes": 40_000,
        "code": "c0de",
    },
}


def changed(**provenance: Any) -> dict[str, Any]:
    evaluation = copy.deepcopy(GOOD)
    evaluation["provenance"].update(provenance)
    return evaluation


def test_card_holds_the_facts() -> None:
    card = model_card(CONFIG, GOOD, "1.2.3")
    for title in ("Intended use", "Data", "Training", "Evaluation", "Limitations", "Loading it"):
        assert f"\n## {title}\n" in card
    for fact in (
        "Completes text.",
        "| training | 5,000,000,000 | 20,000,000,000 |",
        "`" + "cd" * 32 + "`",
        "laptop/demo (hash `feed`)",
        "modelmill 1.2.3, digest `c0de`",
        "| this model | 3.000 ± 0.100 | 20.10 | 1.440 |  |",
        "| Kneser-Ney bigram | 4.000 ± 0.100 | 54.60 | 1.920 | better |",
        'load_model("models:/m@candidate")',
    ):
        assert fact in card, fact
    assert card == model_card(CONFIG, GOOD, "1.2.3")


def test_a_bad_model_is_called_bad() -> None:
    bad = copy.deepcopy(GOOD)
    bad["comparison"]["bigram"]["difference"] = 0.7
    assert "| **worse** |" in model_card(CONFIG, bad, "1")
    assert limitations(bad)[0].startswith("It predicts held-out text worse than the bigram baseline, by 0.700 nats")
    close = copy.deepcopy(GOOD)
    close["comparison"]["bigram"]["difference"] = 0.05
    assert "| not clearly different |" in model_card(CONFIG, close, "1")
    assert "cannot be told from the bigram baseline" in limitations(close)[0]
    assert not any("baseline" in line for line in limitations(GOOD))


@pytest.mark.parametrize(
    ("facts", "sentence"),
    [
        ({"tokens_trained_on": 400_000_000}, "2 tokens per parameter"),
        ({"training_split_tokens": 2_000_000_000}, "saw its training text 2.5 times"),
        ({"parameters": 1_000_000}, "too small to hold facts"),
        ({"sequence_length": 77}, "at most 77 tokens at a time"),
    ],
)
def test_limitations_follow_the_facts(facts: dict[str, int], sentence: str) -> None:
    assert any(sentence in line for line in limitations(changed(**facts)))
    assert not any(sentence in line for line in limitations(GOOD))


def test_short_description_names_the_standing() -> None:
    text = short_description(CONFIG, GOOD)
    assert text.startswith("Completes text. 200,000,000 parameters")
    assert "1.440 bits per byte on held-out text (bigram 1.920, unigram 2.400)" in text
    assert "\n" not in text
