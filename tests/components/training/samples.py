"""Small packed tokens, a tokenizer and configurations for the training tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers

from modelmill.components.core.manifest import Manifest
from modelmill.components.llama.config import LlamaConfig, PretrainConfig
from modelmill.components.training.config import TrainingConfig

VOCAB, LENGTH = 97, 24
MODEL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "max_sequence_length": LENGTH,
}
TRAINING: dict[str, Any] = {
    "steps": 8,
    "global_batch_size": 8,
    "micro_batch_size": 2,
    "learning_rate": 1e-2,
    "min_learning_rate": 1e-3,
    "warmup_steps": 2,
    "log_every": 1,
    "validate_every": 4,
    "validation_rows": 7,
    "checkpoint_every": 3,
    "threads_per_process": 1,
    "accelerator": "cpu",
}


def training_config(**changes: Any) -> TrainingConfig:
    """The sample training section with some fields changed."""
    return TrainingConfig.model_validate({**TRAINING, **changes})


def pretrain_config(model: dict[str, Any] | None = None, **changes: Any) -> PretrainConfig:
    """The sample section of the pretraining step."""
    return PretrainConfig(
        model=LlamaConfig.model_validate({**MODEL, **(model or {})}), training=training_config(**changes)
    )


def make_tokens(folder: Path, *, rows: int = 40, length: int = LENGTH, vocab: int = VOCAB) -> Manifest:
    """Packed tokens with structure to learn: each token is mostly the one before plus one."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(5)
    counts = {"vocab_size": vocab, "sequence_length": length}
    for split, number in (("train", rows), ("validation", 10), ("test", 4)):
        jumps = np.where(
            generator.random(number * length + 1) < 0.8, 1, generator.integers(0, vocab, number * length + 1)
        )
        stream = (np.cumsum(jumps) % vocab).astype("<u2")
        np.lib.stride_tricks.sliding_window_view(stream, length + 1)[::length].tofile(folder / f"{split}.bin")
        counts |= {f"{split}_rows": number, f"{split}_tokens": number * length, f"{split}_bytes": 3 * number * length}
    return Manifest.describe(folder, kind="tokens", counts=counts, metadata={"dtype": "uint16", "eos_token_id": 0})


def make_tokenizer(folder: Path) -> Manifest:
    """A byte-level tokenizer folder."""
    folder.mkdir(parents=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[: VOCAB - 1]
    vocabulary = {"<eos>": 0, **{letter: index + 1 for index, letter in enumerate(alphabet)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(["<eos>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return Manifest.describe(folder, kind="tokenizer", counts={"vocab_size": VOCAB}, metadata={"eos_token_id": 0})
