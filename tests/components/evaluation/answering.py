"""Small models of several families with a chat tokenizer, conversations prepared for them, and a corpus."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from modelmill.components.core.manifest import Manifest
from modelmill.components.core.step import StepFunction
from modelmill.components.core.weights import weights_digest
from modelmill.components.data.documents import SPLITS, DocumentWriter
from modelmill.components.data.instructions import prepare_instructions
from modelmill.components.data.tokenizer_files import load_tokenizer
from modelmill.components.evaluation.language_model import LanguageModel
from tests.components.data.instruction_data import CHATML, chat, config, records_in, tokenizer_in, untagged

POSITIONS = 160
SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": POSITIONS,
    "initializer_range": 0.2,
}
EARLY_ENDS = list(range(40, 90))  # so many tokens end an answer that a random model soon writes one of them


@dataclass(frozen=True)
class Answering:
    """A model with random weights, its tokenizer and conversations prepared with it."""

    model: Manifest
    instructions: Manifest
    tokenizer: Manifest
    records: Path

    @property
    def folder(self) -> Path:
        return Path(self.model.uri) / "model"


def produce(folder: Path, step: StepFunction, section: Any, **upstream: Manifest) -> Manifest:
    """Run a step function as `run_step` does, without keys and reuse."""
    data = folder / "data"
    data.mkdir(parents=True, exist_ok=True)
    result = step(section, data, **upstream)
    return Manifest.describe(
        data, kind=result.kind, counts=result.counts, metrics=result.metrics, metadata=result.metadata
    )


def make_model(folder: Path, tokenizer: Manifest, **changes: Any) -> Manifest:
    """A Llama with random weights and a tokenizer, as a step would leave it."""
    torch.manual_seed(5)
    shape = {**SHAPE, "vocab_size": load_tokenizer(tokenizer).vocab_size, "eos_token_id": 1, **changes}
    model = LlamaForCausalLM(LlamaConfig(**shape))
    model.generation_config.eos_token_id = EARLY_ENDS
    return save_model(folder, model, tokenizer)


def save_model(folder: Path, model: PreTrainedModel, tokenizer: Manifest) -> Manifest:
    model.save_pretrained(str(folder / "model"))
    for entry in tokenizer.files:
        shutil.copyfile(tokenizer.path(entry.path), folder / "model" / Path(entry.path).name)
    digest = weights_digest(folder / "model")
    return Manifest.describe(folder, kind="model", metadata={"weights_digest": digest})


def make_answering(folder: Path) -> Answering:
    tokenizer = tokenizer_in(folder / "tokenizer", untagged(CHATML))
    conversations = []
    for number in range(90):
        said = f"It is {number + number}, I think." * (1 + number % 3)
        turns = [("user", "Why? " * (number % 4) + f"What is {number} + {number}?"), ("assistant", said)]
        conversations.append(chat(*turns))
    records = records_in(folder / "records.jsonl", conversations)
    section = config(records, sequence_length=128, validation_fraction=0.2, test_fraction=0.3)
    instructions = produce(folder / "instructions", prepare_instructions, section, tokenizer=tokenizer)
    return Answering(make_model(folder / "made", tokenizer), instructions, tokenizer, records)


def make_corpus(folder: Path) -> Manifest:
    """Topics of Python's own help; those of the test split were held out of `small_model`."""
    texts = [text for _, text in sorted(topics.items())]
    shares = {"train": texts[:70], "validation": [], "test": [text[:900] for text in texts[75:]]}
    folder.mkdir(parents=True)
    counts = {}
    for split in SPLITS:
        with DocumentWriter(folder / f"{split}.arrow") as writer:
            for text in shares[split]:
                writer.append(text, len(text.encode()))
        counts[f"{split}_documents"] = len(shares[split])
    return Manifest.describe(folder, kind="corpus", counts=counts)


def wrapped(model: PreTrainedModel) -> LanguageModel:
    """A model in memory as the evaluation holds it."""
    return LanguageModel(model.eval(), POSITIONS, {"logits_to_keep": 1})
