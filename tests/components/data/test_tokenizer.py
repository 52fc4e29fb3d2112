"""Training and loading tokenizers: lossless, repeatable, and loadable by transformers with the same ids."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer

from modelmill.components.core.errors import UserError
from modelmill.components.core.manifest import Manifest
from modelmill.components.data.config import TokenizerConfig
from modelmill.components.data.documents import read_documents
from modelmill.components.data.tokenizer import train_tokenizer
from tests.components.data.conftest import Produce

HARD = [
    "",
    " ",
    "  two  blanks ",
    "tab\tand\n\n  newline\n",
    "naïve café ﬁne",
    "日本語のテキスト",
    "👩‍👩‍👧 emoji",
    "\x00\x1b",
    "def f(x):\n        return x  # 12345",
]


def documents(corpus: Manifest, split: str = "validation") -> list[str]:
    return [text for batch in read_documents(corpus.path(f"{split}.arrow")) for text in batch]


def backend(tokenizer: Manifest) -> Tokenizer:
    return Tokenizer.from_file(str(tokenizer.path("tokenizer.json")))


@settings(max_examples=300)
@given(text=st.text())
def test_byte_level_bpe_loses_nothing(tokenizer: Manifest, text: str) -> None:
    encoder = backend(tokenizer)
    ids = encoder.encode(text, add_special_tokens=False).ids
    assert encoder.decode(ids, skip_special_tokens=False) == text


def test_trained_folder_is_what_transformers_loads(tokenizer: Manifest, corpus: Manifest) -> None:
    loaded = AutoTokenizer.from_pretrained(tokenizer.uri)
    encoder = backend(tokenizer)
    assert len(loaded) == tokenizer.counts["vocab_size"] == 1024
    assert set(loaded("text")) == {"input_ids", "attention_mask"}  # what a Llama's forward takes
    for text in [*HARD, *documents(corpus)]:
        ids = loaded(text, add_special_tokens=False)["input_ids"]
        assert ids == encoder.encode(text, add_special_tokens=False).ids
        assert loaded.decode(ids) == text
    for role, name in {"bos": "<|begin_of_text|>", "eos": "<|end_of_text|>", "pad": "<|pad|>"}.items():
        assert getattr(loaded, f"{role}_token") == name
        assert getattr(loaded, f"{role}_token_id") == tokenizer.metadata[f"{role}_token_id"]


def test_it_loads_beside_the_config_of_a_llama(tokenizer: Manifest, tmp_path: Path) -> None:
    """An exported model's folder holds both; transformers must not put its own Llama tokenizer in our place."""
    for entry in tokenizer.files:
        (tmp_path / entry.path).write_bytes(tokenizer.path(entry.path).read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    loaded, encoder = AutoTokenizer.from_pretrained(tmp_path), backend(tokenizer)
    for text in HARD:
        assert loaded(text, add_special_tokens=False)["input_ids"] == encoder.encode(text).ids


def test_bytes_per_token_is_measured_on_validation_text(tokenizer: Manifest, corpus: Manifest) -> None:
    encoder = backend(tokenizer)
    tokens = sum(len(encoder.encode(text).ids) for text in documents(corpus))
    assert tokenizer.metrics["bytes_per_token"] == corpus.counts["validation_bytes"] / tokens
    assert 2 < tokenizer.metrics["bytes_per_token"] < 5


def test_training_is_repeatable_whatever_the_threads(corpus: Manifest, tokenizer: Manifest, tmp_path: Path) -> None:
    corpus.write(tmp_path / "corpus.json")
    code = (
        "import sys, pathlib\n"
        "from modelmill.components.core.manifest import Manifest, file_digest\n"
        "from modelmill.components.data.config import TokenizerConfig\n"
        "from modelmill.components.data.tokenizer import train_tokenizer\n"
        "out = pathlib.Path(sys.argv[2]); out.mkdir()\n"
        "train_tokenizer(TokenizerConfig(vocab_size=1024), out, corpus=Manifest.read(sys.argv[1]))\n"
        "print(file_digest(out / 'tokenizer.json'), file_digest(out / 'tokenizer_config.json'))"
    )
    expected = " ".join(
        next(entry.sha256 for entry in tokenizer.files if entry.path == name)
        for name in ("tokenizer.json", "tokenizer_config.json")
    )
    for threads in ("1", "2"):
        command = [sys.executable, "-c", code, str(tmp_path / "corpus.json"), str(tmp_path / threads)]
        environment = os.environ | {"RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": threads}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == expected


def test_a_vocabulary_the_text_cannot_fill(corpus: Manifest, produce: Produce) -> None:
    config = TokenizerConfig(vocab_size=500_000, min_frequency=50)
    with pytest.raises(UserError, match=r"tokenizer\.vocab_size: 500000 needs 499741 merges") as caught:
        produce(train_tokenizer, config, corpus=corpus)
    size = int(str(caught.value).partition("at most ")[2].partition(",")[0])
    fits = produce(train_tokenizer, config.model_copy(update={"vocab_size": size}), corpus=corpus)
    assert fits.counts["vocab_size"] == size


def test_special_tokens_can_be_named(corpus: Manifest, produce: Produce) -> None:
    config = TokenizerConfig(vocab_size=300, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    made = produce(train_tokenizer, config, corpus=corpus)
    assert made.metadata == {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    assert AutoTokenizer.from_pretrained(made.uri).eos_token == "</s>"


def load(produce: Produce, corpus: Manifest, path: Path, **values: Any) -> Manifest:
    return produce(train_tokenizer, TokenizerConfig(kind="load", path=str(path), **values), corpus=corpus)


def test_a_folder_is_taken_over(corpus: Manifest, tokenizer: Manifest, produce: Produce, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    loaded = AutoTokenizer.from_pretrained(tokenizer.uri)
    loaded.chat_template = "{{ messages[0].content }}"
    loaded.save_pretrained(folder)
    made = load(produce, corpus, folder)
    assert made.metadata == tokenizer.metadata
    assert made.counts == tokenizer.counts
    again = AutoTokenizer.from_pretrained(made.uri)
    assert again.chat_template == loaded.chat_template
    for text in [*HARD, *documents(corpus)]:
        assert again(text)["input_ids"] == loaded(text)["input_ids"]
    assert str(tmp_path) not in made.path("tokenizer_config.json").read_text()


def test_a_file_is_taken_over_without_its_length_limit(
    corpus: Manifest, tokenizer: Manifest, produce: Produce, tmp_path: Path
) -> None:
    encoder = backend(tokenizer)
    encoder.enable_truncation(3)
    encoder.enable_padding(length=5)
    encoder.save(str(tmp_path / "tokenizer.json"))
    made = load(produce, corpus, tmp_path / "tokenizer.json")
    assert made.metadata == tokenizer.metadata
    assert backend(made).encode(HARD[-1]).ids == backend(tokenizer).encode(HARD[-1]).ids


def test_the_end_of_text_must_be_known(corpus: Manifest, produce: Produce, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    Tokenizer(models.WordLevel({"[UNK]": 0, "word": 1, "STOP": 2}, unk_token="[UNK]")).save(str(path))
    with pytest.raises(UserError, match=r"tokenizer\.eos_token: .* declares no end-of-text token"):
        load(produce, corpus, path)
    with pytest.raises(UserError, match=r"tokenizer\.eos_token: 'END' is not in .*vocabulary"):
        load(produce, corpus, path, eos_token="END")
    made = load(produce, corpus, path, eos_token="STOP")
    assert made.metadata == {"bos_token_id": None, "eos_token_id": 2, "pad_token_id": None}
    assert AutoTokenizer.from_pretrained(made.uri).eos_token_id == 2


@pytest.mark.parametrize(("name", "content"), [("tokenizer.json", b"{}"), ("x.model", b"\x00\x01"), ("x.model", b"")])
def test_damaged_files_are_named(
    corpus: Manifest, produce: Produce, tmp_path: Path, name: str, content: bytes
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"tokenizer\.path: .*{name} is not a"):
        load(produce, corpus, tmp_path / name)


def test_an_empty_folder_is_named(corpus: Manifest, produce: Produce, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"tokenizer\.path: .*empty cannot be loaded"):
        load(produce, corpus, tmp_path / "empty")


def test_code_in_a_tokenizer_folder_never_runs(corpus: Manifest, produce: Produce, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    folder = tmp_path / "custom"
    folder.mkdir()
    (folder / "own.py").write_text(f"open({str(marker)!r}, 'w').close()\n")
    auto = {"AutoTokenizer": ["own.Own", "own.Own"]}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Own", "auto_map": auto}))
    with pytest.raises(UserError, match="cannot be loaded"):
        load(produce, corpus, folder)
    assert not marker.exists()


SPM = {
    "llama": {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity",
              "remove_extra_whitespaces": False, "split_digits": True, "allow_whitespace_only_pieces": True},
    "bpe": {"model_type": "bpe"},
    "bpe-no-prefix": {"model_type": "bpe", "add_dummy_prefix": False, "remove_extra_whitespaces": False},
    "unigram": {"model_type": "unigram"},
    "unigram-bytes": {"model_type": "unigram", "byte_fallback": True, "normalization_rule_name": "nfkc_cf"},
    "gemma": {"model_type": "bpe", "byte_fallback": True, "user_defined_symbols": ["<sep>", "<cls>", "▁▁"],
              "add_dummy_prefix": False, "remove_extra_whitespaces": False, "normalization_rule_name": "identity"},
}  # fmt: skip


@pytest.fixture(scope="module")
def train_text(shared: Path, corpus: Manifest) -> Path:
    path = shared / "train.txt"
    path.write_text("\n".join(documents(corpus, "train")))
    return path


def train_spm(folder: Path, text: Path, **options: Any) -> Path:
    prefix = folder / "tokenizer"
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(prefix), vocab_size=600, num_threads=1, minloglevel=2, **options
    )
    return prefix.with_suffix(".model")


@pytest.mark.parametrize("variant", SPM)
def test_sentencepiece_keeps_its_ids(
    corpus: Manifest, produce: Produce, tmp_path: Path, train_text: Path, variant: str
) -> None:
    path = train_spm(tmp_path, train_text, **SPM[variant])
    original = sentencepiece.SentencePieceProcessor(model_file=str(path))
    made = load(produce, corpus, path)
    loaded = AutoTokenizer.from_pretrained(made.uri)
    assert made.counts["vocab_size"] == original.vocab_size() == len(loaded)
    assert made.metadata["eos_token_id"] == original.eos_id()
    assert made.metadata["bos_token_id"] == original.bos_id()
    for text in [*HARD, *documents(corpus, "test"), "<sep>a<cls> b"]:
        ids = loaded(text, add_special_tokens=False)["input_ids"]
        assert ids == original.encode(text)
        if original.unk_id() not in ids:
            assert loaded.decode(ids, skip_special_tokens=False) == original.decode(ids)


def test_a_folder_with_a_sentencepiece_model_only(
    corpus: Manifest, produce: Produce, tmp_path: Path, train_text: Path
) -> None:
    path = train_spm(tmp_path, train_text, **SPM["llama"])
    assert load(produce, corpus, tmp_path).digest == load(produce, corpus, path).digest


def test_a_model_whose_ids_would_change_is_refused(
    corpus: Manifest, produce: Produce, tmp_path: Path, train_text: Path
) -> None:
    path = train_spm(tmp_path, train_text, model_type="bpe", user_defined_symbols=["<sep>"])
    with pytest.raises(UserError, match=r"tokenizer\.path: .* has no fast form with the same ids"):
        load(produce, corpus, path)


def test_kinds_without_a_fast_form_are_refused(
    corpus: Manifest, produce: Produce, tmp_path: Path, train_text: Path
) -> None:
    path = train_spm(tmp_path, train_text, model_type="char", character_coverage=0.99, hard_vocab_limit=False)
    with pytest.raises(UserError, match="neither BPE nor unigram"):
        load(produce, corpus, path)
