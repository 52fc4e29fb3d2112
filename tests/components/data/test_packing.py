"""Rows hold every token once, and the bytes they stand for are counted to the byte."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from modelmill.components.core.errors import UserError
from modelmill.components.core.home import Home
from modelmill.components.core.manifest import Manifest
from modelmill.components.core.step import StepResult, run_step, section
from modelmill.components.data import packing
from modelmill.components.data.config import CorpusConfig, PackingConfig, TokenizerConfig
from modelmill.components.data.corpus import ingest_corpus
from modelmill.components.data.documents import SPLITS, DocumentWriter, read_documents
from modelmill.components.data.loader import open_rows
from modelmill.components.data.packing import pack_tokens
from modelmill.components.data.tokenizer import train_tokenizer
from tests.components.data.conftest import Produce


def stream(corpus: Manifest, tokenizer: Manifest, split: str) -> list[int]:
    """The tokens of a split, one document at a time."""
    encoder = Tokenizer.from_file(str(tokenizer.path("tokenizer.json")))
    encoder.encode_special_tokens = True
    tokens: list[int] = []
    for batch in read_documents(corpus.path(f"{split}.arrow")):
        for text in batch:
            tokens += [*encoder.encode(text, add_special_tokens=False).ids, tokenizer.metadata["eos_token_id"]]
    return tokens


def bytes_of(tokenizer: Manifest) -> np.ndarray:
    """Bytes each id of a byte-level tokenizer stands for, found by decoding through the byte alphabet."""
    encoder = Tokenizer.from_file(str(tokenizer.path("tokenizer.json")))
    special = {tokenizer.metadata[f"{role}_token_id"] for role in ("bos", "eos", "pad")}
    return np.array([0 if n in special else len(encoder.id_to_token(n)) for n in range(encoder.get_vocab_size())])


@pytest.mark.parametrize("length", [1, 7, 64, 500])
@pytest.mark.parametrize("buffered", [1, 1 << 20])
def test_rows_are_the_stream_cut_with_one_token_of_overlap(
    corpus: Manifest,
    tokenizer: Manifest,
    produce: Produce,
    monkeypatch: pytest.MonkeyPatch,
    length: int,
    buffered: int,
) -> None:
    monkeypatch.setattr(packing, "_BUFFERED_TOKENS", buffered)
    monkeypatch.setattr(packing, "_BATCH_BYTES", 10_000)
    made = produce(pack_tokens, PackingConfig(sequence_length=length), corpus=corpus, tokenizer=tokenizer)
    sizes = bytes_of(tokenizer)
    for split in SPLITS:
        expected, rows = np.array(stream(corpus, tokenizer, split)), open_rows(made, split)
        count = (len(expected) - 1) // length
        assert rows.shape == (count, length + 1)
        assert np.array_equal(rows[:, :-1].ravel(), expected[: count * length])
        assert np.array_equal(rows[:, 1:].ravel(), expected[1 : count * length + 1])
        assert made.counts[f"{split}_tokens"] == count * length
        assert made.counts[f"{split}_dropped_tokens"] == len(expected) - 1 - count * length
        assert made.counts[f"{split}_bytes"] == sizes[rows[:, 1:]].sum()
    assert made.metadata == {"dtype": "uint16", "eos_token_id": tokenizer.metadata["eos_token_id"]}


def test_bytes_and_tokens_add_up(corpus: Manifest, tokenizer: Manifest, produce: Produce) -> None:
    """With rows of one token nothing is dropped, so only the first token's bytes are missing."""
    made = produce(pack_tokens, PackingConfig(sequence_length=1), corpus=corpus, tokenizer=tokenizer)
    sizes = bytes_of(tokenizer)
    for split in SPLITS:
        first = sizes[open_rows(made, split)[0, 0]]
        assert made.counts[f"{split}_bytes"] == corpus.counts[f"{split}_bytes"] - first
        assert made.counts[f"{split}_dropped_tokens"] == 0
        assert made.counts[f"{split}_documents"] == corpus.counts[f"{split}_documents"]


def test_equal_inputs_give_equal_bytes(
    corpus: Manifest, tokenizer: Manifest, produce: Produce, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = produce(pack_tokens, PackingConfig(sequence_length=32), corpus=corpus, tokenizer=tokenizer)
    monkeypatch.setattr(packing, "_BATCH_BYTES", 1000)
    two = produce(pack_tokens, PackingConfig(sequence_length=32), corpus=corpus, tokenizer=tokenizer)
    assert one.digest == two.digest


def test_too_little_text_names_the_length_that_fits(corpus: Manifest, tokenizer: Manifest, produce: Produce) -> None:
    shortest = min(len(stream(corpus, tokenizer, split)) for split in SPLITS)
    with pytest.raises(UserError, match=rf"packing\.sequence_length: {shortest} needs .*at most {shortest - 1} "):
        produce(pack_tokens, PackingConfig(sequence_length=shortest), corpus=corpus, tokenizer=tokenizer)
    fits = produce(pack_tokens, PackingConfig(sequence_length=shortest - 1), corpus=corpus, tokenizer=tokenizer)
    assert min(fits.counts[f"{split}_rows"] for split in SPLITS) == 1


def handmade(folder: Path, texts: list[str]) -> Manifest:
    """A corpus with the same documents in every split."""
    folder.mkdir()
    for split in SPLITS:
        with DocumentWriter(folder / f"{split}.arrow") as writer:
            for text in texts:
                writer.append(text, len(text.encode()))
    return Manifest.describe(folder, kind="corpus")


def test_text_that_spells_a_special_token_stays_text(tmp_path: Path, tokenizer: Manifest, produce: Produce) -> None:
    corpus = handmade(tmp_path / "corpus", ["before <|end_of_text|> after <|begin_of_text|><|pad|>"] * 3)
    made = produce(pack_tokens, PackingConfig(sequence_length=1), corpus=corpus, tokenizer=tokenizer)
    rows = open_rows(made, "train")
    special = [tokenizer.metadata[f"{role}_token_id"] for role in ("bos", "eos", "pad")]
    stream = [int(rows[0, 0]), *(int(token) for token in rows[:, 1])]
    assert [token for token in stream if token in special] == [tokenizer.metadata["eos_token_id"]] * 3


def test_documents_cut_inside_a_character_are_counted_to_the_byte(
    tmp_path: Path, tokenizer: Manifest, produce: Produce
) -> None:
    """Signs that the tokenizer has never seen become single bytes, so rows end inside characters."""
    corpus = handmade(tmp_path / "corpus", ["🜁🜂🜃🜄", "ᚠᚢᚦ"])
    sizes = bytes_of(tokenizer)
    for length in range(1, 12):
        made = produce(pack_tokens, PackingConfig(sequence_length=length), corpus=corpus, tokenizer=tokenizer)
        assert made.counts["train_bytes"] == sizes[open_rows(made, "train")[:, 1:]].sum()


def test_large_vocabularies_take_four_bytes(tmp_path: Path, produce: Produce) -> None:
    words = {f"w{number}": number for number in range(70_000)}
    model = Tokenizer(models.WordLevel({**words, "</s>": 70_000, "<unk>": 70_001}, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    folder = tmp_path / "words"
    folder.mkdir()
    model.save(str(folder / "tokenizer.json"))
    tokenizer = Manifest.describe(
        folder, kind="tokenizer", counts={"vocab_size": 70_002}, metadata={"eos_token_id": 70_000}
    )
    corpus = handmade(tmp_path / "corpus", ["w1 w69999  w5", "w65536"])
    made = produce(pack_tokens, PackingConfig(sequence_length=2), corpus=corpus, tokenizer=tokenizer)
    assert made.metadata["dtype"] == "uint32"
    assert open_rows(made, "train").tolist() == [[1, 69_999, 5], [5, 70_000, 65_536]]
    # By the characters tokens cover: "w1" is not predicted, " w69999" (space not covered) and so on to the end.
    assert made.counts["train_bytes"] == len("w1 w69999  w5" + "w65536") - len("w1")
    assert made.counts["train_dropped_tokens"] == 1


def test_three_steps_through_run_step(tmp_path: Path, home: Home) -> None:
    """As a pipeline runs them: the manifest of one step is the input of the next; a second time all are reused."""
    lines = [json.dumps({"text": f"Row {n} tells of {n * n} things, none like row {n + 1}."}) for n in range(400)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    source = {"type": "files", "paths": [str(tmp_path / "a.jsonl")]}
    settings = CorpusConfig.model_validate({"source": source, "min_document_length": 20})
    keys = []
    for number in range(2):
        paths = [str(tmp_path / f"{name}{number}.json") for name in ("corpus", "tokenizer", "tokens")]
        corpus = section("ingest_corpus", settings, ingest_corpus, settings.fingerprint())
        trained = section("train_tokenizer", TokenizerConfig(vocab_size=300), train_tokenizer)
        packed = section("pack_tokens", PackingConfig(sequence_length=16), pack_tokens)
        run_step(ingest_corpus, corpus, {}, {"manifest": paths[0]})
        run_step(train_tokenizer, trained, {"corpus": paths[0]}, {"manifest": paths[1]})
        run_step(pack_tokens, packed, {"corpus": paths[0], "tokenizer": paths[1]}, {"manifest": paths[2]})
        made = [Manifest.read(path) for path in paths]
        keys.append([(manifest.key, manifest.created) for manifest in made])
    assert keys[0] == keys[1]
    assert open_rows(made[2], "train").shape[1] == 17
    too_long = section("pack_tokens", PackingConfig(sequence_length=100_000), pack_tokens)
    with pytest.raises(SystemExit) as caught:
        run_step(pack_tokens, too_long, {"corpus": paths[0], "tokenizer": paths[1]}, {"manifest": str(tmp_path / "x")})
    assert caught.value.code == 2
    left = [entry.name for entry in (home.store / "pack_tokens").iterdir() if not entry.name.endswith(".lock")]
    assert left == [made[2].key]
    assert not (tmp_path / "x").exists()


def test_result_is_plain(corpus: Manifest, tokenizer: Manifest, tmp_path: Path) -> None:
    result = pack_tokens(PackingConfig(sequence_length=50), tmp_path, corpus=corpus, tokenizer=tokenizer)
    assert isinstance(result, StepResult)
    assert all(type(count) is int for count in result.counts.values())
