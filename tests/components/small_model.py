"""A small language model on real text (the topics of Python's own help), as the pipeline's steps would leave it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from modelmill.components.core.manifest import Manifest
from modelmill.components.core.weights import weights_digest
from modelmill.components.llama.config import LlamaConfig
from modelmill.components.llama.huggingface import export_huggingface
from modelmill.components.llama.model import LlamaDecoder

VOCABULARY, LENGTH, END = 400, 64, "<|endoftext|>"


@dataclass(frozen=True)
class SmallModel:
    """Manifests of packed tokens, a briefly trained model and one that was never trained."""

    tokens: Manifest
    trained: Manifest
    untrained: Manifest
    tokenizer: Tokenizer


def build(folder: Path, steps: int = 120) -> SmallModel:
    """Build everything below a folder: a few seconds."""
    documents = [text for _, text in sorted(topics.items())]
    tokenizer = _tokenizer(folder / "tokenizer", documents)
    tokens, rows = _tokens(folder / "tokens", tokenizer, documents)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_layers=2,
        num_heads=4,
        max_sequence_length=LENGTH,
        tie_embeddings=True,
    )
    model = LlamaDecoder(config, seed=0)
    untrained = _model(folder / "untrained", model, folder / "tokenizer", tokens, [])
    history = _train(model, rows, steps)
    trained = _model(folder / "trained", model, folder / "tokenizer", tokens, history)
    return SmallModel(tokens, trained, untrained, tokenizer)


def _tokenizer(folder: Path, documents: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(documents, trainer)
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "pad_token": END}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return tokenizer


def _tokens(folder: Path, tokenizer: Tokenizer, documents: list[str]) -> tuple[Manifest, np.ndarray]:
    folder.mkdir(parents=True)
    counts = {"vocab_size": VOCABULARY, "sequence_length": LENGTH}
    shares = {"train": documents[:70], "validation": documents[70:75], "test": documents[75:]}
    for split, texts in shares.items():
        stream = np.concatenate([[0, *tokenizer.encode(text).ids] for text in texts] + [[0]]).astype(np.uint16)
        number = (len(stream) - 1) // LENGTH
        rows = np.stack([stream[row * LENGTH : (row + 1) * LENGTH + 1] for row in range(number)])
        rows.astype("<u2").tofile(folder / f"{split}.bin")
        text = tokenizer.decode(stream[1 : number * LENGTH + 1].tolist(), skip_special_tokens=True)
        counts |= {f"{split}_rows": number, f"{split}_tokens": number * LENGTH, f"{split}_bytes": len(text.encode())}
        if split == "train":
            training = rows
    metadata = {"dtype": "uint16", "eos_token_id": 0}
    return Manifest.describe(folder, kind="tokens", counts=counts, metadata=metadata), training


def _train(model: LlamaDecoder, rows: np.ndarray, steps: int) -> list[dict[str, float]]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator, history = np.random.default_rng(0), []
    for step in range(1, steps + 1):
        batch = torch.from_numpy(rows[generator.integers(0, len(rows), 16)].astype(np.int64))
        loss = model(batch[:, :-1], batch[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        record = {"step": step, "loss": loss.item(), "learning_rate": 3e-3, "tokens": step * 16 * LENGTH}
        history.append(record)
        if step % 40 == 0:
            history.append({"step": step, "validation_loss": loss.item() + 0.05})
    return history


def _model(
    folder: Path, model: LlamaDecoder, tokenizer: Path, tokens: Manifest, history: list[dict[str, float]]
) -> Manifest:
    export_huggingface(model, folder / "model", tokenizer_folder=tokenizer)
    (folder / "history.jsonl").write_text("".join(json.dumps(record) + "\n" for record in history))
    steps = int(history[-1]["step"]) if history else 0
    counts = {"parameters": sum(p.numel() for p in model.parameters()), "steps": steps, "world_size": 1}
    counts["tokens"] = steps * 16 * LENGTH
    digest = weights_digest(folder / "model")
    metadata = {"weights_digest": digest, "dataset_digest": tokens.digest, "tokenizer_digest": "t" * 64}
    metrics = {"validation_loss": history[-1]["validation_loss"]} if history else {}
    return Manifest.describe(folder, kind="model", counts=counts, metadata=metadata, metrics=metrics, code="c0de")
