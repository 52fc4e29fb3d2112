"""Step `train_tokenizer`: a byte-level BPE trained on the training split, or an existing tokenizer taken over."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from modelmill.components.core import events
from modelmill.components.core.errors import UserError
from modelmill.components.core.manifest import Manifest
from modelmill.components.core.step import StepResult
from modelmill.components.data.config import TakeTokenizerConfig, TokenizerConfig
from modelmill.components.data.documents import read_documents
from modelmill.components.data.files import tokenizer_path
from modelmill.components.data.sentencepiece_model import convert_sentencepiece

logger = logging.getLogger("modelmill")

# How Llama 3 cuts text into words before merging: contractions, words with their leading sign, up to three digits,
# runs of signs, line ends, blanks (tokenizer.json of the published checkpoints).
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_KNOWN = {  # names by which a bare tokenizer.json is understood
    "bos": ("<|begin_of_text|>", "<s>", "<bos>"),
    "eos": ("<|end_of_text|>", "<|endoftext|>", "</s>", "<eos>"),
    "pad": ("<|pad|>", "<pad>", "[PAD]"),
    "unk": ("<unk>", "[UNK]"),
}
_SAMPLE_BYTES = 8 << 20  # of the validation split, to measure bytes per token
_CHECKED_DOCUMENTS = 200  # on which a converted tokenizer must agree with the original


@dataclass(frozen=True)
class SpecialTokens:
    """Names of the tokens with a role; None where there is none."""

    bos: str | None = None
    eos: str | None = None
    pad: str | None = None
    unk: str | None = None


def train_tokenizer(config: TokenizerConfig, output: Path, *, corpus: Manifest) -> StepResult:
    """Write a folder that `transformers.AutoTokenizer.from_pretrained` loads. Equal inputs give equal bytes.

    Args:
        config: train or load, and the special tokens.
        output: existing empty folder.
        corpus: manifest of `ingest_corpus`; training reads its training split, the metric its validation split.

    Returns:
        kind `tokenizer`; counts `vocab_size` (ids are below it), metadata `bos_token_id`, `eos_token_id`,
        `pad_token_id` (None where there is none), metric `bytes_per_token` (UTF-8, on validation text).

    Raises:
        UserError: the text does not support the vocabulary, or an existing tokenizer cannot be used as it is.
    """
    template: str | None = None
    if config.kind == "train":
        tokenizer, special = _train(config, corpus), _trained_special_tokens(config)
    else:
        tokenizer, special, template = _load(config, corpus)
    tokenizer.no_truncation()  # a length limit kept in a tokenizer.json would cut documents silently
    tokenizer.no_padding()
    # Not `tokenizer.save`: a full disk must raise an OSError that says so.
    (output / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    _write_config(output, special, template)
    ids = {f"{role}_token_id": tokenizer.token_to_id(name) if name else None for role, name in asdict(special).items()}
    ids.pop("unk_token_id")
    size = vocabulary_size(tokenizer)
    bytes_per_token = _bytes_per_token(tokenizer, corpus)
    logger.info("tokenizer of %d entries, %.3f bytes a token", size, bytes_per_token)
    return StepResult(
        kind="tokenizer",
        counts={"vocab_size": size},
        metrics={"bytes_per_token": bytes_per_token},
        metadata=ids,
    )


def take_tokenizer(config: TakeTokenizerConfig, output: Path, *, model: Manifest, corpus: Manifest) -> StepResult:
    """The tokenizer that a model brings along, in the form of `train_tokenizer`, so that text is packed for it.

    Args:
        config: the end-of-text token, where the model's files do not name it.
        output: existing empty folder.
        model: manifest with `model/`.
        corpus: manifest of `ingest_corpus`, for the metric.

    Raises:
        UserError: as `train_tokenizer`.
    """
    folder = model.folder().absolute() / "model"
    loaded = TokenizerConfig(kind="load", path=str(folder), eos_token=config.eos_token)
    return train_tokenizer(loaded, output, corpus=corpus)


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """One more than the highest id, added tokens included: the rows an embedding needs."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def _trained_special_tokens(config: TokenizerConfig) -> SpecialTokens:
    return SpecialTokens(
        bos=config.bos_token or "<|begin_of_text|>",
        eos=config.eos_token or "<|end_of_text|>",
        pad=config.pad_token or "<|pad|>",
    )


def _train(config: TokenizerConfig, corpus: Manifest) -> Tokenizer:
    special = _trained_special_tokens(config)
    names = [name for name in (special.bos, special.eos, special.pad) if name]
    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(LLAMA3_PATTERN), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        min_frequency=config.min_frequency,
        special_tokens=[AddedToken(name, normalized=False, special=True) for name in names],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),  # every byte, so that nothing is unknown
        show_progress=False,
    )
    tokenizer.train_from_iterator(_reported(corpus), trainer)
    size, wanted = tokenizer.get_vocab_size(), config.vocab_size
    if size < wanted:
        fixed = 256 + len(names)
        raise UserError(
            f"tokenizer.vocab_size: {wanted} needs {wanted - fixed} merges and the training split supports "
            f"{size - fixed} at min_frequency {config.min_frequency}; set vocab_size to at most {size}, lower "
            f"min_frequency or give more text"
        )
    return tokenizer


def _reported(corpus: Manifest) -> Iterator[list[str]]:
    """Training documents in batches, with progress by documents."""
    total, done = corpus.counts.get("train_documents"), 0
    for batch in read_documents(corpus.path("train.arrow")):
        yield batch
        done += len(batch)
        events.progress("reading the training split", done, total)
    events.progress("merging")


def _load(config: TokenizerConfig, corpus: Manifest) -> tuple[Tokenizer, SpecialTokens, str | None]:
    path = tokenizer_path(config.path or "")
    model = path if path.suffix == ".model" else _sentencepiece_only(path)
    template = None
    if model is not None:
        texts = itertools.chain.from_iterable(read_documents(corpus.path("validation.arrow")))
        tokenizer, names = convert_sentencepiece(model, itertools.islice(texts, _CHECKED_DOCUMENTS))
        special = SpecialTokens(**names)
    elif path.is_dir():
        tokenizer, special, template = _load_folder(path)
    else:
        tokenizer = _parse_json(path)
        added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
        special = SpecialTokens(**{r: next((n for n in names if n in added), None) for r, names in _KNOWN.items()})
    return tokenizer, _chosen(config, tokenizer, special), template


def _sentencepiece_only(folder: Path) -> Path | None:
    """The SentencePiece model of a folder without a tokenizer.json."""
    model = folder / "tokenizer.model"
    return model if model.is_file() and not (folder / "tokenizer.json").exists() else None


def _parse_json(path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the tokenizers library raises bare Exception
        raise UserError(f"tokenizer.path: {path} is not a tokenizer.json ({error}); give another file") from None


def _load_folder(folder: Path) -> tuple[Tokenizer, SpecialTokens, str | None]:
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        tokenizer = loaded.backend_tokenizer
    except Exception as error:  # whatever a damaged folder makes transformers raise
        reason = f"{type(error).__name__}: {error}"[:300]
        raise UserError(
            f"tokenizer.path: {folder} cannot be loaded as a fast tokenizer ({reason}); check the folder"
        ) from None
    special = SpecialTokens(loaded.bos_token, loaded.eos_token, loaded.pad_token, loaded.unk_token)
    return tokenizer, special, loaded.chat_template if isinstance(loaded.chat_template, str) else None


def _chosen(config: TokenizerConfig, tokenizer: Tokenizer, declared: SpecialTokens) -> SpecialTokens:
    """What the recipe names, else what the tokenizer declares; named ones must exist."""
    wanted = {"bos": config.bos_token, "eos": config.eos_token, "pad": config.pad_token}
    for role, name in wanted.items():
        if name and tokenizer.token_to_id(name) is None:
            raise UserError(
                f"tokenizer.{role}_token: {name!r} is not in the vocabulary of {config.path}; name another"
            )
    special = SpecialTokens(**(asdict(declared) | {role: name for role, name in wanted.items() if name}))
    if special.eos is None or tokenizer.token_to_id(special.eos) is None:
        remedy = "name the token that ends a document"
        raise UserError(f"tokenizer.eos_token: {config.path} declares no end-of-text token; {remedy}")
    named = [name for name in (special.bos, special.eos, special.pad) if name]
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in dict.fromkeys(named)])
    return special


def _write_config(output: Path, special: SpecialTokens, template: str | None) -> None:
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],  # Llama refuses the token_type_ids of the default
    }
    config |= {f"{role}_token": name for role, name in asdict(special).items() if name}
    if template is not None:
        config["chat_template"] = template
    (output / "tokenizer_config.json").write_text(
        json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8"
    )


def _bytes_per_token(tokenizer: Tokenizer, corpus: Manifest) -> float:
    """UTF-8 bytes a token stands for, on the beginning of the validation split."""
    size = tokens = 0
    tokenizer.encode_special_tokens = True  # as in packing
    for batch in read_documents(corpus.path("validation.arrow")):
        tokens += sum(len(encoded.ids) for encoded in tokenizer.encode_batch_fast(batch, add_special_tokens=False))
        size += sum(len(text.encode("utf-8")) for text in batch)
        if size >= _SAMPLE_BYTES:
            break
    return size / max(1, tokens)
