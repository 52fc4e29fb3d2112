"""Whether fine-tuning and the gate find what is there and nothing else, on real questions and a model that can read.

An adapter that learnt which answer belongs to which question must win over one that learnt the same questions and
answers shuffled: both know the words and the tone. Two that learnt different shuffles must not win over each other.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from modelmill.components.core.manifest import Manifest
from modelmill.components.core.step import StepFunction
from modelmill.components.core.weights import weights_digest
from modelmill.components.data.config import CorpusConfig, TokenizerConfig
from modelmill.components.data.corpus import ingest_corpus
from modelmill.components.data.documents import read_documents
from modelmill.components.data.instruction_config import InstructionsConfig
from modelmill.components.data.instruction_rows import read_conversations
from modelmill.components.data.instructions import prepare_instructions
from modelmill.components.data.tokenizer import train_tokenizer
from modelmill.components.data.tokenizer_files import load_tokenizer
from modelmill.components.evaluation.answers import score_answers
from modelmill.components.evaluation.config import AnswerScoresConfig, GateConfig
from modelmill.components.evaluation.gate import gate
from modelmill.components.finetuning.config import FinetuneConfig, MergeConfig
from modelmill.components.finetuning.finetune import finetune
from modelmill.components.finetuning.merge import merge_adapter
from modelmill.components.llama.config import LlamaConfig
from modelmill.components.llama.huggingface import export_huggingface
from modelmill.components.llama.model import LlamaDecoder

pytestmark = pytest.mark.slow
DISTRIBUTIONS = ["numpy", "click", "Flask", "fsspec"]
LENGTH, VOCABULARY = 128, 1024
HELD_OUT = {"validation_fraction": 0.02, "test_fraction": 0.2}
TEMPLATE = {"kind": "prompt", "text": "Question: {prompt}\nAnswer: {completion}"}
PRETRAINING = {"steps": 250, "rows": 16, "learning_rate": 3e-3}
FINETUNING: dict[str, Any] = {
    "method": "lora",
    "adapter": {"rank": 16, "learning_rate_ratio": 4.0},
    "training": {
        "steps": 120,
        "global_batch_size": 8,
        "micro_batch_size": 8,
        "learning_rate": 3e-3,
        "min_learning_rate": 3e-4,
        "warmup_steps": 10,
        "weight_decay": 0.0,
        "validation_rows": 0,
        "validate_every": None,
        "checkpoint_every": None,
        "parallel": {"processes_per_node": 1},
        "accelerator": "cpu",
        "threads_per_process": 1,  # so small that a second one only waits
    },
}


def produce(folder: Path, step: StepFunction, config: Any, **upstream: Manifest) -> Manifest:
    """Run a step function as `run_step` does, without keys and reuse."""
    data = folder / "data"
    data.mkdir(parents=True)
    result = step(config, data, **upstream)
    return Manifest.describe(
        data, kind=result.kind, counts=result.counts, metrics=result.metrics, metadata=result.metadata
    )


def pretrained(folder: Path, corpus: Manifest, tokenizer: Manifest) -> Manifest:
    """A model that has read the corpus for a short time, as the pretraining step would leave it."""
    encoder = load_tokenizer(tokenizer).encoder
    texts = [text for batch in read_documents(corpus.path("train.arrow")) for text in batch]
    stream = np.concatenate([encoded.ids for encoded in encoder.encode_batch(texts)])
    rows = stream[: len(stream) // LENGTH * LENGTH].reshape(-1, LENGTH)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        num_layers=2,
        num_heads=4,
        max_sequence_length=LENGTH,
        tie_embeddings=True,
    )
    model, generator = LlamaDecoder(config, seed=0), np.random.default_rng(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PRETRAINING["learning_rate"])
    for _ in range(int(PRETRAINING["steps"])):
        batch = torch.from_numpy(rows[generator.integers(0, len(rows), int(PRETRAINING["rows"]))].astype(np.int64))
        optimizer.zero_grad()
        model(batch[:, :-1], batch[:, 1:]).backward()
        optimizer.step()
    export_huggingface(model, folder / "model", tokenizer_folder=Path(tokenizer.path("tokenizer.json")).parent)
    metadata = {"weights_digest": weights_digest(folder / "model")}
    return Manifest.describe(folder, kind="model", counts={"vocab_size": VOCABULARY}, metadata=metadata)


def section(*sources: dict[str, Any]) -> InstructionsConfig:
    values = {"source": list(sources), "template": TEMPLATE, "sequence_length": LENGTH, **HELD_OUT}
    return InstructionsConfig.model_validate(values)


def records(path: Path, conversations: list[dict[str, Any]], shuffle: int | None, into: str) -> dict[str, Any]:
    """A file of questions and answers as a source; shuffled, every answer stands with another question."""
    answers = [one["messages"][-1] for one in conversations]
    if shuffle is not None:
        # A cycle through all of them in random order leaves no answer where it was.
        order = np.random.default_rng(shuffle).permutation(len(answers))
        answers = [answers[place] for place in np.roll(order, 1)[np.argsort(order)]]
    lines = [{"messages": [*one["messages"][:-1], a]} for one, a in zip(conversations, answers, strict=True)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {"type": "files", "paths": [str(path)], "into": into}


@pytest.fixture(scope="module")
def scores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Manifest]:
    """Losses of the answers to held-out questions: of the base and of every adapter."""
    root = tmp_path_factory.mktemp("controls")
    fractions = {**HELD_OUT, "source": {"type": "installed-docs", "distributions": DISTRIBUTIONS}}
    corpus = produce(root / "corpus", ingest_corpus, CorpusConfig.model_validate(fractions))
    tokenizer = produce(root / "tokenizer", train_tokenizer, TokenizerConfig(vocab_size=VOCABULARY), corpus=corpus)
    base = pretrained(root / "base", corpus, tokenizer)
    asked = section({"type": "installed-docs-qa", "distributions": DISTRIBUTIONS, "max_answer_length": 120})
    real = produce(root / "real", prepare_instructions, asked, tokenizer=base, corpus=corpus)
    pairs = {split: list(read_conversations(real, split)) for split in ("train", "test")}
    assert len(pairs["test"]) > 150
    config = FinetuneConfig.model_validate(FINETUNING)
    models, data = {"base": base}, real
    for name, shuffle in (("true", None), ("shuffled", 1), ("shuffled again", 2)):
        folder = root / name.replace(" ", "-")
        sources = [records(folder / f"{split}.jsonl", pairs[split], None, split) for split in ("test",)]
        sources.append(records(folder / "train.jsonl", pairs["train"], shuffle, "train"))
        data = produce(folder / "data", prepare_instructions, section(*sources), tokenizer=base)
        adapter = produce(folder / "adapter", finetune, config, instructions=data, base=base)
        merged = {"adapter": adapter, "instructions": data, "base": base}
        models[name] = produce(folder / "merged", merge_adapter, MergeConfig(), **merged)
    # The held-out questions are the same in all of the data; one of them is what everything is scored on.
    return {
        name: produce(root / f"scores-{place}", score_answers, AnswerScoresConfig(), model=model, instructions=data)
        for place, (name, model) in enumerate(models.items())
    }


def outcome(folder: Path, candidate: Manifest, reference: Manifest) -> Manifest:
    config = GateConfig(metric="answer_loss", direction="lower")
    return produce(folder, gate, config, candidate=candidate, reference=reference)


@pytest.mark.parametrize("reference", ["base", "shuffled", "shuffled again"])
def test_true_answers_win(scores: dict[str, Manifest], tmp_path: Path, reference: str) -> None:
    found = outcome(tmp_path / "gate", scores["true"], scores[reference])
    assert found.metadata["passed"], found.metadata["reasons"]


@pytest.mark.parametrize("names", [("shuffled", "shuffled again"), ("shuffled again", "shuffled")], ids=" over ".join)
def test_no_shuffle_wins_over_another(scores: dict[str, Manifest], tmp_path: Path, names: tuple[str, str]) -> None:
    """Both are far from the base, so there was something to learn; only not which answer belongs where."""
    found = outcome(tmp_path / "gate", scores[names[0]], scores[names[1]])
    assert not found.metadata["passed"], found.metadata["reasons"]
    assert found.metadata["outcome"] == "tie"
    assert outcome(tmp_path / "base", scores[names[0]], scores["base"]).metadata["passed"]
