"""Readers of the text formats: plain text, JSON lines and Parquet, plain or compressed, in bounded memory.

Whatever is wrong with a file is said with its name and the place in it: a byte offset, a line or a row.
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import zstandard

from modelmill.components.core.errors import UserError
from modelmill.components.data.files import DocumentFormat

_CHUNK = 1 << 20
_ROWS = 1024


@dataclass(frozen=True)
class ReadOptions:
    """How texts are found in a file.

    Attributes:
        text_field: field of a JSON line or column of a Parquet file.
        separator: text between documents of a plain file, or None for one document a file.
        longest: characters after which a plain document need not be read on, because it will be dropped.
        scratch: folder for what must be decompressed to be read.
        parameter: of the recipe, for messages.
    """

    text_field: str
    separator: str | None
    longest: int
    scratch: Path
    parameter: str = "corpus.source"


def read_texts(path: Path, name: str, format: DocumentFormat, options: ReadOptions) -> Iterator[str]:
    """Texts of one file in their order.

    Args:
        path: the file.
        name: what the user calls it, for messages.
        format: from `document_format`.
        options: see there.

    Raises:
        UserError: the file is truncated, corrupt, not UTF-8, not JSON, or lacks the text field.
    """
    with _whole(name, options.parameter):
        if format.kind == "parquet":
            with _plain_file(path, format, options.scratch) as plain:
                yield from _parquet_column(plain, name, options)
            return
        with _open(path, format.compression) as stream:
            if format.kind == "jsonl":
                yield from _read_jsonl(stream, name, options)
            else:
                yield from _read_plain(stream, name, options)


def read_records(
    path: Path, name: str, format: DocumentFormat, *, scratch: Path, parameter: str
) -> Iterator[tuple[str, Any]]:
    """Whole records of a JSON lines or Parquet file in their order, each with its place.

    Args:
        path: the file.
        name: what the user calls it, for places and messages.
        format: from `document_format`; `jsonl` or `parquet`.
        scratch: folder for what must be decompressed to be read.
        parameter: of the recipe, for messages.

    Yields:
        `file:line` with the line's value, which may be any JSON, or the `ValueError` of a line that is no JSON;
        `file row n` (from 0) with the row as a dictionary.

    Raises:
        UserError: the file is truncated, corrupt or not UTF-8.
    """
    with _whole(name, parameter):
        if format.kind == "parquet":
            with _plain_file(path, format, scratch) as plain:
                for number, row in enumerate(_parquet_rows(plain, name, None, parameter)):
                    yield f"{name} row {number}", row
            return
        with _open(path, format.compression) as stream:
            for number, line in _lines(stream, name, parameter):
                try:
                    value = json.loads(line)
                except (ValueError, RecursionError) as error:
                    value = ValueError(str(error))
                yield f"{name}:{number}", value


@contextmanager
def _whole(name: str, parameter: str) -> Iterator[None]:
    """Say of a compressed file that it is damaged."""
    try:
        yield
    except EOFError:
        raise _broken(name, "ends in the middle of the compressed data", parameter) from None
    except (gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
        raise _broken(name, f"cannot be decompressed ({error})", parameter) from None


def _broken(name: str, problem: str, parameter: str) -> UserError:
    return UserError(f"{parameter}: {name} {problem}; fetch it again or take it out")


class _ZstandardStream(io.RawIOBase):
    """Decompressed bytes of a .zst file; unlike zstandard's own reader it notices a truncated file."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        self._decoder: Any = None
        self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            if not self._fill():
                return 0
        size = min(len(buffer), len(self._ready))
        buffer[:size], self._ready = self._ready[:size], self._ready[size:]
        return size

    def _fill(self) -> bool:
        """Decompress a little more; False at the end of the last frame."""
        done = self._decoder is None or self._decoder.eof
        chunk = (self._decoder.unused_data if self._decoder is not None and done else b"") or self._file.read(1 << 17)
        if not chunk:
            if not done:
                raise EOFError
            return False
        if done:  # a file may hold several frames; the window of `zstd --long` is allowed
            self._decoder = zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()
        self._ready = self._decoder.decompress(chunk)
        return True

    def close(self) -> None:
        self._file.close()
        super().close()


def _open(path: Path, compression: str) -> IO[bytes]:
    if compression == ".gz":
        return cast(IO[bytes], gzip.open(path, "rb"))
    if compression == ".zst":
        return io.BufferedReader(_ZstandardStream(path), _CHUNK)
    return path.open("rb")


def _not_utf8(name: str, offset: int, parameter: str) -> UserError:
    return UserError(f"{parameter}: {name} is not UTF-8 at byte {offset}; convert it to UTF-8 (iconv) or take it out")


def _decode(stream: IO[bytes], name: str, parameter: str) -> Iterator[str]:
    """Text of a stream piece by piece with `\\n` line ends."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    lines = io.IncrementalNewlineDecoder(None, translate=True)
    offset = 0
    while True:
        chunk = stream.read(_CHUNK)
        pending = len(decoder.getstate()[0])
        try:
            text = decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            raise _not_utf8(name, offset - pending + error.start, parameter) from None
        yield lines.decode(text, final=not chunk)
        if not chunk:
            return
        offset += len(chunk)


def _read_plain(stream: IO[bytes], name: str, options: ReadOptions) -> Iterator[str]:
    separator, enough = options.separator, options.longest + 1
    kept = ""  # the current document's beginning, at most `enough` characters
    tail = ""  # what may hold the beginning of a separator
    for piece in _decode(stream, name, options.parameter):
        *finished, tail = (tail + piece).split(separator) if separator else [tail + piece]
        for text in finished:
            yield (kept + text)[:enough]
            kept = ""
        keep = len(separator) - 1 if separator else 0
        settled = tail[: max(0, len(tail) - keep)]
        tail = tail[len(settled) :]
        kept = (kept + settled)[:enough] if len(kept) < enough else kept
    yield (kept + tail)[:enough]


def _lines(stream: IO[bytes], name: str, parameter: str) -> Iterator[tuple[int, str]]:
    """Lines that are not blank, with their numbers from 1."""
    offset = 0
    for number, line in enumerate(stream, 1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise _not_utf8(name, offset + error.start, parameter) from None
        offset += len(line)
        if not text.isspace():
            yield number, text


def _read_jsonl(stream: IO[bytes], name: str, options: ReadOptions) -> Iterator[str]:
    field, parameter = options.text_field, options.parameter
    for number, text in _lines(stream, name, parameter):
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{parameter}: {name}:{number} is not JSON ({error}); mend or remove the line") from None
        if not isinstance(record, dict) or field not in record:
            held = ", ".join(map(repr, record)) if isinstance(record, dict) else f"a {type(record).__name__}"
            raise UserError(f"{parameter}.text_field: {name}:{number} has no field {field!r} but {held}; name another")
        yield checked_text(record[field], f"{name}:{number}", field)


def checked_text(value: Any, place: str, field: str) -> str:
    """A field's value as text; null is the empty text.

    Raises:
        UserError: the value is something else.
    """
    if value is None:
        return ""
    if not isinstance(value, str):
        kind = type(value).__name__
        raise UserError(f"corpus.source.text_field: {field!r} of {place} is {kind}, not text; name a field with text")
    return value


@contextmanager
def _plain_file(path: Path, format: DocumentFormat, scratch: Path) -> Iterator[Path]:
    """A Parquet file, decompressed if need be: its footer is at the end, so it must be a file."""
    if not format.compression:
        yield path
        return
    plain = scratch / "decompressed.parquet"
    try:
        with _open(path, format.compression) as stream, plain.open("wb") as target:
            shutil.copyfileobj(stream, target, _CHUNK)
        yield plain
    finally:
        plain.unlink(missing_ok=True)


def _parquet_column(path: Path, name: str, options: ReadOptions) -> Iterator[str]:
    field = options.text_field
    for row in _parquet_rows(path, name, field, options.parameter):
        yield row[field] or ""


def _parquet_rows(path: Path, name: str, field: str | None, parameter: str) -> Iterator[dict[str, Any]]:
    """Rows as dictionaries: all columns, or the one column of text that is named."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    row = 0
    try:
        with pq.ParquetFile(path) as file:
            if field is not None:
                _check_column(file.schema_arrow, name, field, parameter)
            for batch in file.iter_batches(_ROWS, columns=field and [field], use_threads=False):
                # Value by value, so that what is not UTF-8 is said with its row.
                columns = {key: batch.column(place) for place, key in enumerate(batch.schema.names)}
                for position in range(batch.num_rows):
                    yield {key: column[position].as_py() for key, column in columns.items()}
                    row += 1
    except UnicodeDecodeError as error:
        problem = f"is not UTF-8 in row {row} at byte {error.start}; convert it to UTF-8 or take it out"
        raise UserError(f"{parameter}: {name} {problem}") from None
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise  # the disk, not the file's content
        raise _broken(name, f"is not a whole Parquet file ({str(error).splitlines()[0]})", parameter) from None


def _check_column(held: Any, name: str, field: str, parameter: str) -> None:
    index = held.get_field_index(field)
    if index < 0:
        names = ", ".join(map(repr, held.names))
        raise UserError(f"{parameter}.text_field: {name} has no column {field!r} but {names}; name another")
    kind = held.field(index).type
    if not _is_text(kind):
        raise UserError(f"{parameter}.text_field: column {field!r} of {name} is {kind}; name one with text")


def _is_text(kind: Any) -> bool:
    import pyarrow.types as types

    if types.is_dictionary(kind):
        kind = kind.value_type
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
