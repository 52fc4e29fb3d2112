"""Against TRL: the tokens of its `DPOTrainer` from the same records, and its loss and gradients on the same batch."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from modelmill.components.core.manifest import Manifest
from modelmill.components.data.preference_config import PreferencesConfig
from modelmill.components.data.preference_rows import PreferenceRows, open_preferences
from modelmill.components.data.preferences import prepare_preferences
from modelmill.components.finetuning.dpo_config import PreferenceObjectiveConfig
from modelmill.components.finetuning.dpo_objective import PreferenceModel, PreferenceObjective, pack_pairs
from tests.components.data.instruction_data import CHATML, records_in, tokenizer_in, untagged
from tests.components.finetuning.samples import BASE

pytest.importorskip("trl")
PAIRS = 5
# TRL's losses, and what they are called here.
LOSSES: dict[str, dict[str, Any]] = {
    "sigmoid": {},
    "ipo": {"loss": "ipo", "length_normalized": True},
    "sigmoid_norm": {"length_normalized": True},
}


def record(number: int) -> dict[str, Any]:
    asked = [{"role": "user", "content": f"What is {number} + {number}?"}]
    good, bad = f"It is {number + number}." * (1 + number % 2), "I do not know. " * (1 + number % 3) + "Ask another."
    answers = {"chosen": good, "rejected": bad}
    return {
        "prompt": asked,
        **{name: [{"role": "assistant", "content": text}] for name, text in answers.items()},
    }


def prepared(folder: Path) -> tuple[PreferenceRows, Manifest]:
    tokenizer = tokenizer_in(folder / "tokenizer", untagged(CHATML))
    path = records_in(folder / "records.jsonl", [record(number) for number in range(PAIRS)])
    values = {"source": {"type": "files", "paths": [str(path)]}, "validation_fraction": 0, "test_fraction": 0}
    output = folder / "preferences"
    output.mkdir()
    result = prepare_preferences(PreferencesConfig.model_validate(values), output, tokenizer=tokenizer)
    made = Manifest.describe(output, kind=result.kind, counts=result.counts, metadata=result.metadata)
    return open_preferences(made, "train"), tokenizer


@pytest.mark.slow
def test_tokens_loss_and_gradients_are_those_of_trl(home: object, tmp_path: Path) -> None:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    rows, tokenizer = prepared(tmp_path)
    torch.manual_seed(0)
    reference = LlamaForCausalLM(LlamaConfig(**{**BASE, "vocab_size": 400, "max_position_embeddings": 256})).eval()
    model = copy.deepcopy(reference)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape)
    packed = torch.from_numpy(pack_pairs(rows, np.arange(PAIRS), rows.width(np.arange(PAIRS))))
    with torch.no_grad():
        base = PreferenceModel(reference)(packed)
    loaded = AutoTokenizer.from_pretrained(str(tokenizer.path("tokenizer.json").parent))
    for name, ours in LOSSES.items():
        arguments = DPOConfig(
            output_dir=str(tmp_path / name),
            beta=0.3,
            loss_type=[name],
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to=[],
        )
        records = Dataset.from_list([record(number) for number in range(PAIRS)])
        trainer = DPOTrainer(
            copy.deepcopy(model), reference, arguments, train_dataset=records, processing_class=loaded
        )
        batch = trainer.data_collator([trainer.train_dataset[number] for number in range(PAIRS)])
        for side in (0, 1):
            for number in range(PAIRS):
                ids, mask = rows.conversation(number, side)
                row = side * PAIRS + number
                theirs = batch["attention_mask"][row].bool()
                assert batch["input_ids"][row][theirs].tolist() == ids.tolist()
                assert batch["completion_mask"][row][theirs].tolist() == mask.astype(int).tolist()
        trainer.model.eval()
        expected = trainer._compute_loss(trainer.model, batch, False)
        expected.backward()
        tuned = PreferenceModel(copy.deepcopy(model)).eval()
        config = PreferenceObjectiveConfig.model_validate({**ours, "beta": 0.3})
        loss = PreferenceObjective(config, base, PAIRS, 1)(tuned, packed) / PAIRS
        loss.backward()
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
        assert abs(expected.item() - np.log(2)) > 0.01
        for (parameter, found), theirs in zip(tuned.model.named_parameters(), trainer.model.parameters(), strict=True):
            scale = float(theirs.grad.abs().max())
            torch.testing.assert_close(found.grad, theirs.grad, rtol=1e-3, atol=1e-4 * scale, msg=parameter)
