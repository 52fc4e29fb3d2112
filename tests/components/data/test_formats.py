"""Readers of files: every format and compression gives the same texts, and every damage is named with its place."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from modelmill.components.core.errors import UserError
from modelmill.components.data import formats
from modelmill.components.data.files import document_format, list_files
from modelmill.components.data.formats import ReadOptions, read_texts

TEXTS = ["Erster Text mit Umlaut ü.", "", "第二の文書\n二行目", "third 👩‍👩‍👧 text"]


def content(kind: str) -> bytes:
    """The bytes of a file of a kind that holds `TEXTS`."""
    if kind == "jsonl":
        return b"".join(json.dumps({"id": n, "text": t}).encode() + b"\n" for n, t in enumerate(TEXTS)) + b"\n  \n"
    if kind == "parquet":
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table({"id": range(len(TEXTS)), "text": [t or None for t in TEXTS]}), sink, row_group_size=2)
        return sink.getvalue().to_pybytes()
    return "\n%\n".join(TEXTS).encode()


def compressed(data: bytes, compression: str) -> bytes:
    if compression == ".gz":
        return gzip.compress(data)
    return zstandard.compress(data) if compression == ".zst" else data


def read(
    path: Path, *, separator: str | None = None, text_field: str = "text", longest: int = 10_000_000
) -> list[str]:
    kind = document_format(path.name)
    assert kind is not None
    options = ReadOptions(text_field, separator, longest, path.parent)
    return list(read_texts(path, path.name, kind, options))


def write(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
@pytest.mark.parametrize("kind", ["txt", "md", "jsonl", "parquet"])
def test_every_format_gives_the_same_texts(tmp_path: Path, kind: str, compression: str) -> None:
    path = write(tmp_path, f"Data.{kind.upper()}{compression}", compressed(content(kind), compression))
    separator = "\n%\n" if kind in ("txt", "md") else None
    assert read(path, separator=separator) == TEXTS
    assert list(tmp_path.iterdir()) == [path]  # what was decompressed is gone


def test_a_plain_file_is_one_document(tmp_path: Path) -> None:
    assert read(write(tmp_path, "a.txt", b"one\r\ntwo\rthree\n\n")) == ["one\ntwo\nthree\n\n"]
    assert read(write(tmp_path, "b.txt", b"")) == [""]


@settings(max_examples=200)
@given(
    st.text(st.characters(codec="utf-8")),
    st.text("ab\n", min_size=1, max_size=4),
    st.integers(1, 7),
    st.integers(1, 30),
)
def test_reading_in_pieces_is_splitting_the_whole(
    tmp_path_factory: pytest.TempPathFactory, text: str, separator: str, chunk: int, longest: int
) -> None:
    """Multi-byte characters, line ends and separators that straddle pieces; no more than needed is kept."""
    path = write(tmp_path_factory.mktemp("pieces"), "a.txt", text.encode())
    uniform = text.replace("\r\n", "\n").replace("\r", "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(formats, "_CHUNK", chunk)
        assert read(path, separator=separator, longest=longest) == [
            part[: longest + 1] for part in uniform.split(separator)
        ]
        assert read(path, longest=longest) == [uniform[: longest + 1]]


@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
@pytest.mark.parametrize("chunk", [3, 1 << 20])
def test_invalid_utf8_is_named_by_file_and_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compression: str, chunk: int
) -> None:
    monkeypatch.setattr(formats, "_CHUNK", chunk)
    data = "ä".encode() * 5 + b"\xc3(" + b"rest"
    path = write(tmp_path, f"bad.txt{compression}", compressed(data, compression))
    with pytest.raises(UserError, match=rf"{path.name} is not UTF-8 at byte 10;"):
        read(path)
    lines = b'{"text": "fine"}\n{"text": "\xff"}\n'
    path = write(tmp_path, f"bad.jsonl{compression}", compressed(lines, compression))
    with pytest.raises(UserError, match=rf"{path.name} is not UTF-8 at byte 27;"):
        read(path)


def test_a_character_cut_at_the_end_is_invalid(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not UTF-8 at byte 2"):
        read(write(tmp_path, "a.md", "aaä".encode()[:-1]))


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
@pytest.mark.parametrize("compression", [".gz", ".zst"])
@pytest.mark.parametrize("keep", [0.5, 0.95])
def test_truncated_compression_is_noticed(tmp_path: Path, kind: str, compression: str, keep: float) -> None:
    whole = compressed(content(kind) * (1 if kind == "parquet" else 200), compression)
    path = write(tmp_path, f"cut.{kind}{compression}", whole[: int(len(whole) * keep)])
    with pytest.raises(UserError, match=rf"{path.name} ends in the middle of the compressed data"):
        read(path)


@pytest.mark.parametrize("compression", [".gz", ".zst"])
def test_rubbish_is_no_compressed_file(tmp_path: Path, compression: str) -> None:
    path = write(tmp_path, f"a.txt{compression}", b"plain text under a wrong name")
    with pytest.raises(UserError, match="cannot be decompressed"):
        read(path)


def test_damage_inside_compressed_data_is_noticed(tmp_path: Path) -> None:
    data = bytearray(gzip.compress(b"".join(b"%d some text\n" % n for n in range(5000))))
    data[len(data) // 2] ^= 0xFF
    with pytest.raises(UserError, match=r"cannot be decompressed|ends in the middle|not UTF-8"):
        read(write(tmp_path, "a.txt.gz", bytes(data)))


@pytest.mark.parametrize("compression", [".gz", ".zst"])
def test_several_members_are_one_text(tmp_path: Path, compression: str) -> None:
    data = compressed(b"first ", compression) + compressed(b"", compression) + compressed(b"second", compression)
    assert read(write(tmp_path, f"a.txt{compression}", data)) == ["first second"]


@pytest.mark.parametrize("keep", [0, 3, 50, 0.5, 0.99])
def test_truncated_parquet_is_noticed(tmp_path: Path, keep: float) -> None:
    whole = content("parquet")
    path = write(tmp_path, "cut.parquet", whole[: int(keep if keep > 1 or keep == 0 else len(whole) * keep)])
    with pytest.raises(UserError, match=r"cut\.parquet is not a whole Parquet file"):
        read(path)


def test_invalid_utf8_in_parquet_is_named_by_row(tmp_path: Path) -> None:
    raw = pa.array([b"good", b"bad \xff"], pa.binary())
    column = pa.StringArray.from_buffers(len(raw), raw.buffers()[1], raw.buffers()[2])
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="not UTF-8 in row 1 at byte 4"):
        read(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (b'{"text": "a"}\n{"text": \n', r"a\.jsonl:2 is not JSON"),
        (b'{"text": "a"}\n\n{"body": "b", "id": 1}\n', r"a\.jsonl:3 has no field 'text' but 'body', 'id'"),
        (b'"just a text"\n', r"a\.jsonl:1 has no field 'text' but a str"),
        (b'{"text": 3}\n', r"'text' of a\.jsonl:1 is int, not text"),
        (b"[" * 100_000 + b"\n", r"a\.jsonl:1 is not JSON"),
    ],
)
def test_bad_json_lines_are_named_by_line(tmp_path: Path, lines: bytes, words: str) -> None:
    with pytest.raises(UserError, match=words):
        read(write(tmp_path, "a.jsonl", lines))


def test_json_lines_take_a_byte_order_mark_and_another_field(tmp_path: Path) -> None:
    data = b'\xef\xbb\xbf{"body": "a"}\r\n{"body": null}'
    assert read(write(tmp_path, "a.jsonl", data), text_field="body") == ["a", ""]


def test_parquet_needs_a_column_with_text(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": [1], "body": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet has no column 'text' but 'id', 'body'"):
        read(tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"column 'id' of a\.parquet is int64"):
        read(tmp_path / "a.parquet", text_field="id")


@pytest.mark.parametrize("kind", [pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())])
def test_parquet_reads_every_kind_of_text(tmp_path: Path, kind: pa.DataType) -> None:
    pq.write_table(pa.table({"text": pa.array(["a", None, "ü"]).cast(kind)}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == ["a", "", "ü"]


def test_folders_are_searched_in_the_order_of_names(tmp_path: Path) -> None:
    for name in ("b/2.txt", "b/1.md.gz", "a.txt", "c.parquet", ".git/x.txt", "b/.x.txt", "notes.pdf"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / "linked").symlink_to(tmp_path / "b")  # a linked folder could lead in circles
    assert [entry.name for entry in list_files([str(tmp_path)])] == ["a.txt", "c.parquet", "b/1.md.gz", "b/2.txt"]
