"""From installed documentation to a model that prefers the true answers to questions it was not trained on."""

from __future__ import annotations

from pathlib import Path

import pytest

from modelmill.components.data.preference_config import PreferencesConfig
from modelmill.components.data.preferences import prepare_preferences
from modelmill.components.evaluation.config import GateConfig
from modelmill.components.evaluation.gate import gate
from modelmill.components.evaluation.preference_config import PreferenceScoresConfig
from modelmill.components.evaluation.preferences import score_preferences
from modelmill.components.finetuning.dpo import dpo, train
from tests.components.data.instruction_data import CHATML, tokenizer_in, untagged
from tests.components.evaluation.answering import make_model, produce
from tests.components.finetuning.preference_data import dpo_config
from tests.components.training.runs import Here, history


@pytest.mark.slow
def test_the_true_answers_of_held_out_questions_win_the_gate(
    home: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODELMILL_LAUNCHED", "0")
    tokenizer = tokenizer_in(tmp_path / "tokenizer", untagged(CHATML))
    documented = {
        "type": "installed-docs-qa",
        "distributions": ["click", "Flask", "fsspec", "docker", "mlflow", "kfp"],
        "max_answer_length": 80,
    }
    shares = {"validation_fraction": 0.15, "test_fraction": 0.15}
    section = PreferencesConfig.model_validate({"source": documented, "sequence_length": 140, **shares})
    preferences = produce(tmp_path / "preferences", prepare_preferences, section, tokenizer=tokenizer)
    base = make_model(tmp_path / "base", tokenizer, max_position_embeddings=256, initializer_range=0.05)
    config = dpo_config(
        method="full",
        steps=40,
        global_batch_size=16,
        micro_batch_size=16,
        validate_every=20,
        validation_rows=96,
        checkpoint_every=None,
    )
    output = tmp_path / "dpo" / "data"
    output.mkdir(parents=True)
    tuned = produce(tmp_path / "dpo", lambda *given, **upstream: dpo(*given, launcher=Here(train), **upstream), config,
                    preferences=preferences, base=base)  # fmt: skip
    validated = [record for record in history(tmp_path / "dpo") if "validation_loss" in record]
    assert validated[-1]["validation_loss"] < 0.68  # ln 2 at the start
    assert validated[-1]["validation_reward_margin"] > 0.05
    scoring = PreferenceScoresConfig(device="cpu", precision="fp32", max_pairs=150)
    scores = [
        produce(tmp_path / name, score_preferences, scoring, model=model, preferences=preferences)
        for name, model in (("tuned", tuned), ("untuned", base))
    ]
    judging = GateConfig.model_validate({"metric": "margin_per_token", "resamples": 500})
    judged = produce(tmp_path / "gate", gate, judging, candidate=scores[0], reference=scores[1])
    assert judged.metadata["passed"] is True
