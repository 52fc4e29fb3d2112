"""The step `ingest_corpus`, directly and as a pipeline runs it."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from modelmill.components.core import events
from modelmill.components.core.errors import UserError
from modelmill.components.core.events import read_lines
from modelmill.components.core.home import Home
from modelmill.components.core.manifest import Manifest
from modelmill.components.core.step import run_step, section
from modelmill.components.data.config import CorpusConfig
from modelmill.components.data.corpus import ingest_corpus
from modelmill.components.data.documents import SPLITS, DocumentWriter, read_documents
from tests.components.data.conftest import DISTRIBUTIONS, Produce


def sentence(number: int) -> str:
    return f"Document number {number} says something of its own about the weather of day {number * 37}."


def jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def config(*sources: Any, **values: Any) -> CorpusConfig:
    listed = [{"type": "files", "paths": [str(s)]} if isinstance(s, Path) else s for s in sources]
    held_out = {"validation_fraction": 0.2, "test_fraction": 0.2, "min_document_length": 20}
    return CorpusConfig.model_validate({"source": listed} | held_out | values)


def documents(corpus: Manifest, split: str) -> list[str]:
    return [text for batch in read_documents(corpus.path(f"{split}.arrow")) for text in batch]


def everything(corpus: Manifest) -> list[str]:
    return [text for split in SPLITS for text in documents(corpus, split)]


def test_corpus_is_mapped_and_counted(corpus: Manifest) -> None:
    assert corpus.kind == "corpus"
    assert {entry.path for entry in corpus.files} == {"train.arrow", "validation.arrow", "test.arrow", "ingest.json"}
    for split in SPLITS:
        with pa.memory_map(str(corpus.path(f"{split}.arrow"))) as source:
            table = pa.ipc.open_file(source).read_all()
            assert table.schema.names == ["text"]
            assert table.schema.field("text").type == pa.large_string()
            assert pa.total_allocated_bytes() < table.nbytes  # views of the file, not copies
        texts = documents(corpus, split)
        assert len(texts) == corpus.counts[f"{split}_documents"] > 0
        assert sum(len(text.encode()) for text in texts) == corpus.counts[f"{split}_bytes"]
    kept = sum(corpus.counts[f"{split}_bytes"] for split in SPLITS)
    assert 200_000 < kept <= 300_000


def test_every_document_read_is_kept_or_counted_as_dropped(corpus: Manifest) -> None:
    dropped = sum(count for name, count in corpus.counts.items() if name.startswith("dropped_"))
    kept = sum(corpus.counts[f"{split}_documents"] for split in SPLITS)
    assert corpus.counts["read_documents"] == kept + dropped
    record = json.loads(corpus.path("ingest.json").read_text())
    assert record["counts"] == corpus.counts
    [source] = record["sources"]
    assert source["documents"] == kept
    assert [line.partition("==")[0] for line in source["distributions"]] == DISTRIBUTIONS


def test_no_document_is_in_two_splits(corpus: Manifest) -> None:
    texts = everything(corpus)
    assert len(set(texts)) == len(texts)


def test_equal_inputs_give_equal_bytes(tmp_path: Path, produce: Produce) -> None:
    """Also when the files lie elsewhere, so that the artifact's digest is the same on every machine."""
    texts = [sentence(number) for number in range(200)]
    (tmp_path / "elsewhere").mkdir()
    one = produce(ingest_corpus, config(jsonl(tmp_path / "a.jsonl", texts)))
    two = produce(ingest_corpus, config(jsonl(tmp_path / "elsewhere" / "b.jsonl", texts)))
    assert one.files == two.files
    assert one.digest == two.digest
    other = produce(ingest_corpus, config(tmp_path / "a.jsonl", seed=1))
    assert other.digest != one.digest
    assert sorted(everything(other)) == sorted(everything(one)) == sorted(texts)


def test_drops_are_counted_by_reason(tmp_path: Path, produce: Produce) -> None:
    texts = [sentence(number) for number in range(50)]
    odd = ["", "too short", sentence(3) + "  \r\n", "#-=+ |||" * 20, "12.5 13.75\n" * 30]
    counts = produce(ingest_corpus, config(jsonl(tmp_path / "a.jsonl", texts + odd))).counts
    drops = {name: count for name, count in counts.items() if name.startswith("dropped_") and count}
    expected = {"empty": 1, "too_short": 1, "duplicate": 1, "few_letters": 2}
    assert drops == {f"dropped_{reason}": count for reason, count in expected.items()}


def test_cap_is_never_exceeded_and_shared_by_sources(tmp_path: Path, produce: Produce) -> None:
    one = jsonl(tmp_path / "one.jsonl", [sentence(number) for number in range(300)])
    two = jsonl(tmp_path / "two.jsonl", [sentence(number) for number in range(1000, 1300)])
    few = jsonl(tmp_path / "few.jsonl", [sentence(number) for number in range(5000, 5010)])
    made = produce(ingest_corpus, config(few, one, two, max_bytes=20_000))
    record = json.loads(made.path("ingest.json").read_text())
    small, first, second = (source["bytes"] for source in record["sources"])
    assert small + first + second <= 20_000
    assert second == pytest.approx(first, abs=200)  # what the small source left over went to both
    assert [source["complete"] for source in record["sources"]] == [True, False, False]
    assert made.counts["dropped_over_cap"] == 2


def test_the_same_document_in_two_sources_is_kept_once(tmp_path: Path, produce: Produce) -> None:
    path = jsonl(tmp_path / "a.jsonl", [sentence(number) for number in range(50)])
    made = produce(ingest_corpus, config(path, path))
    assert len(everything(made)) == 50
    assert made.counts["dropped_duplicate"] == 50


@pytest.mark.parametrize(
    ("texts", "values", "words"),
    [
        ([], {}, r"corpus\.source: no document is left of 0 read \(none dropped\)"),
        (["short"] * 3, {}, r"no document is left of 3 read \(too_short 3\)"),
        ([sentence(0)], {"max_bytes": 5}, r"no document is left of 1 read \(over_cap 1\); .*max_bytes"),
        ([sentence(0)], {}, r"corpus\.\w+.* of 1 documents .* leaves the \w+ split empty"),
    ],
)
def test_too_little_text_is_the_users_to_mend(
    tmp_path: Path, produce: Produce, texts: list[str], values: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        produce(ingest_corpus, config(jsonl(tmp_path / "a.jsonl", texts), **values))


def test_batches_are_bounded(tmp_path: Path) -> None:
    path = tmp_path / "a.arrow"
    texts = ["x" * 1_000_000 + str(number) for number in range(10)] + ["y"] * 10_000
    with DocumentWriter(path) as writer:
        for text in texts:
            writer.append(text, len(text))
    batches = list(read_documents(path))
    assert [text for batch in batches for text in batch] == texts
    assert max(sum(map(len, batch)) for batch in batches) <= 6_000_000
    assert max(map(len, batches)) <= 4096


def fill(path: Path) -> None:
    with DocumentWriter(path) as writer:
        for _ in range(20):
            writer.append("x" * 1_000_000, 1_000_000)


def test_a_full_disk_raises_what_run_step_understands() -> None:
    with pytest.raises(OSError, match="No space left") as caught:
        fill(Path("/dev/full"))
    assert caught.value.errno == errno.ENOSPC


def test_a_file_that_is_no_corpus_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.arrow").write_bytes(b"not arrow")
    with pytest.raises(UserError, match=r"a\.arrow is not an Arrow file"):
        list(read_documents(tmp_path / "a.arrow"))


@pytest.fixture
def run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    monkeypatch.setenv(events.RUN_VARIABLE, str(folder))
    return folder


@pytest.fixture
def keep_output(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the test's own stdout and stderr alone: a step of a run sends both to its log file."""
    monkeypatch.setattr(os, "dup2", lambda source, target: target)


def run(settings: CorpusConfig, out: Path) -> Manifest:
    return run_step(
        ingest_corpus,
        section("ingest_corpus", settings, ingest_corpus, settings.fingerprint()),
        {},
        {"manifest": str(out)},
    )


@pytest.mark.usefixtures("keep_output")
def test_a_second_run_reuses_the_corpus(tmp_path: Path, run_folder: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [sentence(number) for number in range(100)])
    first = run(config(path), tmp_path / "first.json")
    written = first.path("train.arrow").stat().st_mtime_ns
    again = run(config(path), tmp_path / "again.json")
    assert again == first == Manifest.read(tmp_path / "again.json")
    assert again.path("train.arrow").stat().st_mtime_ns == written
    seen = [line["event"] for _, line in read_lines(run_folder / "events.jsonl") if line["event"] != "progress"]
    assert seen == ["started", "finished", "started", "reused"]
    jsonl(path, [sentence(number) for number in range(101)])
    assert run(config(path), tmp_path / "changed.json").key != first.key
    spool = [line for _, line in read_lines(run_folder / "spool" / "ingest_corpus.jsonl") if line["type"] == "dataset"]
    assert [line["name"] for line in spool[:3]] == ["corpus-train", "corpus-validation", "corpus-test"]
    assert spool[:3] == [line | {"time": own["time"]} for line, own in zip(spool[3:6], spool[:3], strict=True)]
    assert spool[0]["profile"] == {
        "documents": first.counts["train_documents"],
        "bytes": first.counts["train_bytes"],
    }


@pytest.mark.usefixtures("keep_output")
def test_a_failure_leaves_nothing_behind(tmp_path: Path, run_folder: Path, home: Home) -> None:
    """The bad line comes after more text than one batch holds, so files were already being written."""
    path = jsonl(tmp_path / "a.jsonl", [sentence(number) for number in range(60_000)])
    with path.open("ab") as file:
        file.write(b'{"text": "\xff"}\n')
    with pytest.raises(SystemExit) as caught:
        run(config(path), tmp_path / "manifest.json")
    assert caught.value.code == 2
    assert not [entry for entry in (home.store / "ingest_corpus").iterdir() if not entry.name.endswith(".lock")]
    assert not (tmp_path / "manifest.json").exists()
    *_, (_, last) = read_lines(run_folder / "events.jsonl")
    assert (last["event"], last["kind"]) == ("failed", "user")
    assert f"{path} is not UTF-8 at byte" in last["message"]
