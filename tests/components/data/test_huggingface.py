"""Hugging Face datasets from a local folder; the network stays untouched."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from modelmill.components.core.errors import UserError
from modelmill.components.data.config import CorpusConfig
from modelmill.components.data.corpus import ingest_corpus
from tests.components.data.conftest import Produce
from tests.components.data.test_corpus import everything, sentence

TEXTS = [sentence(number) for number in range(60)]


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The libraries read these when they are imported, so the modules' own switches are set too."""
    import datasets.config
    import huggingface_hub.constants

    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    data = tmp_path / "dataset"
    data.mkdir()
    (data / "train.jsonl").write_text(
        "".join(json.dumps({"body": text, "id": n}) + "\n" for n, text in enumerate(TEXTS))
    )
    (data / "test.jsonl").write_text(json.dumps({"body": sentence(1000), "id": 0}) + "\n")
    return data


def config(name: Path | str, **source: Any) -> CorpusConfig:
    values = {"type": "huggingface", "name": str(name), "text_field": "body"} | source
    held_out = {"validation_fraction": 0.2, "test_fraction": 0.2, "min_document_length": 20}
    return CorpusConfig.model_validate({"source": values} | held_out)


def test_a_local_folder_is_streamed(folder: Path, produce: Produce) -> None:
    made = produce(ingest_corpus, config(folder))
    assert sorted(everything(made)) == sorted(TEXTS)
    assert made.digest == produce(ingest_corpus, config(folder)).digest


def test_parquet_in_a_folder(tmp_path: Path, produce: Produce) -> None:
    (tmp_path / "parquet").mkdir()
    pq.write_table(pa.table({"body": TEXTS}), tmp_path / "parquet" / "train-00000-of-00001.parquet")
    assert sorted(everything(produce(ingest_corpus, config(tmp_path / "parquet")))) == sorted(TEXTS)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ({"split": "dev"}, r"corpus\.source\.name: .* cannot be read \(.*dev"),
        ({"text_field": "text"}, r"corpus\.source\.text_field: .* has no column 'text' but 'body', 'id'"),
        ({"text_field": "id"}, "'id' of .* row 0 is int, not text"),
        ({"config": "german"}, r"cannot be read \(.*german"),
    ],
)
def test_what_is_missing_is_named(folder: Path, produce: Produce, source: dict[str, str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        produce(ingest_corpus, config(folder, **source))


def test_an_absent_dataset_offline(produce: Produce) -> None:
    with pytest.raises(UserError, match=r"corpus\.source\.name: nobody/nothing cannot be read"):
        produce(ingest_corpus, config("nobody/nothing"))


def test_damaged_rows_are_the_users_to_mend(folder: Path, produce: Produce) -> None:
    (folder / "train.jsonl").write_text('{"body": "fine"}\n{"body": \n')
    with pytest.raises(UserError, match="cannot be read"):
        produce(ingest_corpus, config(folder))


def test_fingerprint(folder: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    assert config("owner/name", revision=commit).fingerprint() == f"huggingface:{commit}"
    assert config("owner/name").fingerprint() == "huggingface:main as cached"
    before = config(folder).fingerprint()
    (folder / "train.jsonl").write_text("{}")
    assert config(folder).fingerprint() != before


def test_code_in_a_dataset_folder_never_runs(tmp_path: Path, produce: Produce) -> None:
    data = tmp_path / "scripted"
    data.mkdir()
    marker = tmp_path / "ran"
    (data / "scripted.py").write_text(f"open({str(marker)!r}, 'w').close()\n")
    with pytest.raises(UserError, match="cannot be read"):
        produce(ingest_corpus, config(data))
    assert not marker.exists()
