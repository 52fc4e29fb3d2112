"""Rows of long tables as columns: csv and parquet files read, converted and checked cell by cell, without a loop."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pcsv
import pyarrow.parquet as pq

from modelmill.components.core.errors import UserError
from modelmill.components.data.files import DocumentFormat
from modelmill.components.forecasting.series_config import PARAMETER, LongTable

MISSING = ("", "NA", "N/A", "n/a", "NaN", "nan", "-nan", "null", "NULL", "None", "<NA>", "#N/A")
NAMED = 5  # places that a message names; it says how many more there are
_COMPRESSION = {".gz": "gzip", ".zst": "zstd"}
_OFFSET = re.compile(r"\d\d:\d\d.*(Z|[+-]\d\d(:?\d\d)?)$", re.IGNORECASE)


@dataclass
class RawSeries:
    """Rows in the order they were read.

    Attributes:
        items: names of the items, by code.
        codes: int64 [rows], the item of each row.
        times: datetime64[ns] [rows].
        target: float64 [rows], nan where missing.
        covariates: by name, float64 [rows], or an Arrow dictionary array for text.
        files: (name for people, number of its first row) of each file.
    """

    items: list[str]
    codes: np.ndarray
    times: np.ndarray
    target: np.ndarray
    covariates: dict[str, Any] = field(default_factory=dict)
    files: list[tuple[str, int]] = field(default_factory=list)

    def place(self, row: int) -> str:
        """Where a row was read: its file and number, the header not counted, and what it is about."""
        firsts = [first for _, first in self.files]
        name, first = self.files[int(np.searchsorted(firsts, row, side="right")) - 1]
        return f"{name} row {row - first + 1} ({self.items[self.codes[row]]!r} at {stamp(self.times[row])})"


def stamp(time: np.datetime64) -> str:
    """A timestamp for people: without the parts that are zero."""
    text = str(pd.Timestamp(time))
    return text.removesuffix(" 00:00:00")


def refuse(what: str, places: Sequence[str], total: int, remedy: str, *, parameter: str = PARAMETER) -> NoReturn:
    """Refuse input.

    Args:
        what: is wrong.
        places: where, at most `NAMED` of them are told.
        total: number of places.
        remedy: how to mend it.
        parameter: of the recipe.

    Raises:
        UserError: always.
    """
    more = f" and {total - len(places[:NAMED])} more" if total > len(places[:NAMED]) else ""
    raise UserError(f"{parameter}: {what}: {', '.join(places[:NAMED])}{more}; {remedy}")


def read_table(path: Path, name: str, kind: DocumentFormat, source: LongTable, timezone: str | None) -> RawSeries:
    """Read one file.

    Args:
        path: where it lies.
        name: of it, for people.
        kind: its format.
        source: names of the columns.
        timezone: zone that timestamps with an offset are converted to; None is UTC.

    Raises:
        UserError: the file or a column cannot be read; the message names the file, the rows and the column.
    """
    table = _open(path, name, kind, source)
    items = _items(table, name, source)
    times = _times(table.column(source.timestamp), name, source, timezone)
    target = _numbers(table.column(source.target), name, source.target)
    raw = RawSeries(items.dictionary.to_pylist(), _codes(items), times, target, files=[(name, 0)])
    for column in (*source.past_covariates, *source.known_covariates):
        raw.covariates[column] = _covariate(table.column(column), name, column)
    return raw


def _open(path: Path, name: str, kind: DocumentFormat, source: LongTable) -> pa.Table:
    try:
        with pa.OSFile(str(path)) as file:
            compression = _COMPRESSION.get(kind.compression)
            stream = pa.CompressedInputStream(file, compression) if compression else file
            if kind.kind == "parquet":
                whole = pa.BufferReader(stream.read()) if compression else file
                reader = pq.ParquetFile(whole)
                _check_columns(reader.schema_arrow.names, name, source)
                table = reader.read(columns=source.columns)
            else:
                content = pa.BufferReader(stream.read())
                _check_columns(_header(content, source.delimiter), name, source)
                content.seek(0)
                table = pcsv.read_csv(
                    content,
                    parse_options=pcsv.ParseOptions(delimiter=source.delimiter),
                    convert_options=pcsv.ConvertOptions(
                        include_columns=source.columns,
                        column_types=dict.fromkeys(source.columns, pa.string()),
                        strings_can_be_null=False,
                    ),
                )
    except (pa.ArrowException, OSError, UnicodeDecodeError, EOFError) as error:
        raise UserError(f"{PARAMETER}: {name} cannot be read ({error}); mend or remove it") from None
    if not table.num_rows:
        raise UserError(f"{PARAMETER}: {name} has no row; mend or remove it")
    return table.combine_chunks()


def _header(content: pa.BufferReader, delimiter: str) -> list[str]:
    first = content.read(1 << 20).split(b"\n", 1)[0]
    return next(csv.reader(io.StringIO(first.decode("utf-8-sig").rstrip("\r")), delimiter=delimiter), [])


def _check_columns(held: Sequence[str], name: str, source: LongTable) -> None:
    for column in source.columns:
        if held.count(column) != 1:
            problem = "twice" if column in held else "not at all"
            there = ", ".join(held[:20])
            raise UserError(f"{PARAMETER}: {name} has the column {column!r} {problem}; its columns are {there}")


def _rows(mask: np.ndarray, name: str, values: pa.Array | None = None) -> tuple[list[str], int]:
    """The first places where a mask is set, with what stands there, and their number."""
    rows = np.flatnonzero(mask)
    named = rows[:NAMED].tolist()
    told = [f" ({str(values[row].as_py())[:40]!r})" if values is not None else "" for row in named]
    return [f"{name} row {row + 1}{text}" for row, text in zip(named, told, strict=True)], len(rows)


def _plain(column: pa.ChunkedArray) -> pa.Array:
    """The only chunk of a column, dictionaries decoded."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if isinstance(array, pa.ChunkedArray):
        array = array.chunk(0)
    return array.dictionary_decode() if pa.types.is_dictionary(array.type) else array


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _items(table: pa.Table, name: str, source: LongTable) -> pa.DictionaryArray:
    if source.item_id is None:
        whole = pa.array([source.target])
        return pa.DictionaryArray.from_arrays(pa.array(np.zeros(table.num_rows, np.int32)), whole)
    array = _plain(table.column(source.item_id))
    if not (_is_text(array.type) or pa.types.is_integer(array.type)):
        raise UserError(f"{PARAMETER}: {name}, column {source.item_id!r} is {array.type}; items are text or integers")
    text = pc.utf8_trim_whitespace(array.cast(pa.string()))
    empty = pc.fill_null(pc.equal(text, ""), True).to_numpy(zero_copy_only=False)
    if empty.any():
        refuse(f"the item in column {source.item_id!r} is empty", *_rows(empty, name), "fill it or remove the rows")
    return text.dictionary_encode()


def _codes(items: pa.DictionaryArray) -> np.ndarray:
    return items.indices.to_numpy().astype(np.int64)


def _absent(array: pa.Array) -> pa.Array:
    """Text cells that stand for nothing become null."""
    text = pc.utf8_trim_whitespace(array.cast(pa.string()))
    return pc.if_else(pc.is_in(text, pa.array(MISSING)), pa.scalar(None, pa.string()), text)


def _parsed(text: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Text as float64, nan where missing or no number, and where it is no number."""
    try:
        numbers = text.cast(pa.float64()).to_numpy(zero_copy_only=False)
        return numbers.astype(np.float64), np.zeros(len(text), bool)
    except pa.ArrowInvalid:
        numbers = pd.to_numeric(pd.Series(text.to_pylist(), dtype=object), errors="coerce").to_numpy(np.float64)
        return numbers, np.isnan(numbers) & text.is_valid().to_numpy(zero_copy_only=False)


def _numbers(column: pa.ChunkedArray, name: str, label: str) -> np.ndarray:
    """A column as float64, nan where missing."""
    array = _plain(column)
    if _is_text(array.type):
        numbers, bad = _parsed(_absent(array))
        if bad.any():
            what = f"column {label!r} is not a number"
            refuse(what, *_rows(bad, name, array), "write numbers with a point, or leave the cell empty")
        return numbers
    kind = array.type
    number = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)
    if not (number or pa.types.is_boolean(kind) or pa.types.is_null(kind)):
        raise UserError(f"{PARAMETER}: {name}, column {label!r} is {kind}; give a column of numbers")
    if pa.types.is_boolean(kind):
        array = array.cast(pa.int8())
    numbers = array.cast(pa.float64(), safe=False)
    return pc.fill_null(numbers, float("nan")).to_numpy(zero_copy_only=False).astype(np.float64)


def _covariate(column: pa.ChunkedArray, name: str, label: str) -> Any:
    """A covariate as float64, or as a dictionary array where it is text."""
    array = _plain(column)
    if not _is_text(array.type):
        return _numbers(array, name, label)
    text = _absent(array)
    numbers, bad = _parsed(_truths(text))
    some = int(text.is_valid().sum().as_py() or 0)
    if not bad.any():
        return numbers
    if bad.sum() < some:
        what = f"column {label!r} holds numbers and, in some rows, text"
        refuse(what, *_rows(bad, name, array), "make it all numbers, or all text")
    return text.dictionary_encode()


def _truths(text: pa.Array) -> pa.Array:
    """`true` and `false`, if there is nothing else, as 1 and 0, which is what they are in parquet."""
    lower = pc.utf8_lower(text)
    if not pc.all(pc.is_in(lower, pa.array(["true", "false", None])), min_count=0).as_py():
        return text
    return pc.if_else(pc.equal(lower, "true"), "1", "0")


def _times(column: pa.ChunkedArray, name: str, source: LongTable, timezone: str | None) -> np.ndarray:
    """Timestamps without a zone, datetime64[ns]."""
    array = _plain(column)
    kind = array.type
    if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
        bad = array.is_null().to_numpy(zero_copy_only=False)
        if bad.any():
            refuse(f"column {source.timestamp!r} is empty", *_rows(bad, name), "fill it or remove the rows")
        aware = pa.types.is_timestamp(kind) and kind.tz is not None
        micros = array.cast(pa.timestamp("us", tz="UTC" if aware else None), safe=False).to_numpy(zero_copy_only=False)
        stamps = pd.Series(micros.astype("datetime64[us]"))
        lowest, highest = pd.Timestamp.min.ceil("us"), pd.Timestamp.max.floor("us")
        bad = ~((stamps >= lowest) & (stamps <= highest)).to_numpy()
        _check_range(bad, name, source.timestamp, array)
        return _local(stamps.dt.tz_localize("UTC"), timezone) if aware else stamps.to_numpy("datetime64[ns]")
    if pa.types.is_integer(kind) and source.timestamp_format is None:
        remedy = "give dates, or text in ISO 8601, or set timestamp_format"
        raise UserError(f"{PARAMETER}: {name}, column {source.timestamp!r} is {kind}, not timestamps; {remedy}")
    if not (_is_text(kind) or pa.types.is_integer(kind)):
        raise UserError(f"{PARAMETER}: {name}, column {source.timestamp!r} is {kind}; give timestamps")
    return _parse_times(pc.utf8_trim_whitespace(array.cast(pa.string())), name, source, timezone)


def _parse_times(text: pa.Array, name: str, source: LongTable, timezone: str | None) -> np.ndarray:
    """Text as timestamps: each distinct one is parsed once."""
    encoded = pc.fill_null(text, "").dictionary_encode()
    distinct = pd.Series(encoded.dictionary.to_pylist(), dtype=object)
    codes = encoded.indices.to_numpy()
    if source.timestamp_format is None:
        aware = distinct.map(lambda value: bool(_OFFSET.search(value))).to_numpy(bool)
    else:
        aware = np.full(len(distinct), "%z" in source.timestamp_format)
    parsed = pd.to_datetime(distinct, format=source.timestamp_format or "ISO8601", errors="coerce", utc=True)
    _check_range(parsed.isna().to_numpy()[codes], name, source.timestamp, text)
    if aware.any() and not aware.all():
        first = f"{name} row {int(np.flatnonzero(aware[codes] != aware[codes[0]])[0]) + 1}"
        what = f"{first}, column {source.timestamp!r}: some timestamps have an offset and others not"
        raise UserError(f"{PARAMETER}: {what}; write all of them one way")
    local = _local(parsed, timezone) if aware.any() else parsed.dt.tz_localize(None).to_numpy("datetime64[ns]")
    return local[codes]


def _check_range(bad: np.ndarray, name: str, column: str, values: pa.Array) -> None:
    if bad.any():
        what = f"column {column!r} is not a timestamp between 1678 and 2261"
        refuse(what, *_rows(bad, name, values), "write it as in 2024-01-31T15:00, or set timestamp_format")


def _local(stamps: pd.Series, timezone: str | None) -> np.ndarray:
    return stamps.dt.tz_convert(timezone or "UTC").dt.tz_localize(None).to_numpy("datetime64[ns]")


def concatenate(parts: Iterator[RawSeries]) -> RawSeries:
    """Rows of several files one after the other; items of one name are one item.

    Raises:
        UserError: a covariate is text in one file and numbers in another.
    """
    tables = list(parts)
    index: dict[str, int] = {}
    codes, files, first = [], [], 0
    for table in tables:
        mapping = np.array([index.setdefault(item, len(index)) for item in table.items], np.int64)
        codes.append(mapping[table.codes])
        files += [(name, first + start) for name, start in table.files]
        first += len(table.codes)
    covariates: dict[str, Any] = {}
    for name in tables[0].covariates:
        columns = [table.covariates[name] for table in tables]
        text = [not isinstance(column, np.ndarray) for column in columns]
        if any(text) and not all(text):
            # A file whose cells are all empty has neither numbers nor text.
            columns = [_empty_text(c) if isinstance(c, np.ndarray) and np.isnan(c).all() else c for c in columns]
            odd = next((i for i, column in enumerate(columns) if isinstance(column, np.ndarray)), None)
            if odd is not None:
                what = f"column {name!r} holds numbers in {tables[odd].files[0][0]} and text in another file"
                raise UserError(f"{PARAMETER}: {what}; make it all numbers, or all text")
        joined = np.concatenate(columns) if not any(text) else pa.chunked_array(columns).unify_dictionaries()
        covariates[name] = joined if isinstance(joined, np.ndarray) else joined.combine_chunks()
    return RawSeries(
        items=list(index),
        codes=np.concatenate(codes),
        times=np.concatenate([table.times for table in tables]),
        target=np.concatenate([table.target for table in tables]),
        covariates=covariates,
        files=files,
    )


def _empty_text(column: np.ndarray) -> pa.DictionaryArray:
    return pa.nulls(len(column), pa.string()).dictionary_encode()
