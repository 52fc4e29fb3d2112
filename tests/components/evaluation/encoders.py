"""Tiny encoders of random weights in folders as `save_pretrained` leaves them."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
    RobertaTokenizerFast,
    T5Config,
    T5Model,
)

WORDS = [
    *("the", "cat", "dog", "sat", "on", "mat", "ran", "off", "a", "big", "red", "blue", "house", "tree", "##s"),
    *("##ing", "quick", "slow", "brown", "fox"),
]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def bert(folder: Path, *, layers: int = 3, positions: int = 32) -> Path:
    """A BERT of a few dimensions with WordPiece and the usual special tokens."""
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *WORDS])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = {f"{kind}_token": f"[{kind.upper()}]" for kind in ("pad", "unk", "cls", "sep", "mask")}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=positions, **names)
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=positions,
        initializer_range=0.5,  # states that differ from token to token
    )
    BertModel(config).save_pretrained(folder)
    return folder


def byte_level(folder: Path, kind: str) -> Path:
    """A RoBERTa that can read 16 tokens, or a T5, with byte-level BPE that knows first words from others."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the cat sat on the mat", "a dog ran off"] * 5, trainer)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    RobertaTokenizerFast(tokenizer_file=str(folder / "tokenizer.json")).save_pretrained(folder)
    torch.manual_seed(0)
    model: RobertaModel | T5Model
    if kind == "roberta":
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
        ids = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
        model = RobertaModel(RobertaConfig(vocab_size=330, max_position_embeddings=18, **sizes, **ids))
    else:
        sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
        ids = {"pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
        model = T5Model(T5Config(vocab_size=330, **sizes, **ids))
    model.save_pretrained(folder)
    return folder
