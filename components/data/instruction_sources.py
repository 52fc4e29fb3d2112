"""Every source of instruction data as a stream of records with their places."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

from modelmill.components.core.errors import UserError
from modelmill.components.data.files import DocumentFormat, list_files
from modelmill.components.data.formats import read_records
from modelmill.components.data.huggingface import read_rows
from modelmill.components.data.instruction_config import PARAMETER, DatasetRecords, FileRecords, S3Records
from modelmill.components.data.sources import fetch_objects


def read_source(
    source: FileRecords | DatasetRecords | S3Records, scratch: Path
) -> Generator[tuple[str, Any], None, None]:
    """Records of a source in its order, lazily, each with its place: `file:line` or `file row n`.

    Args:
        source: where the records are.
        scratch: folder for temporary files, emptied as the stream goes on.

    Text files that lie beside the records in a folder (most data sets bring a README) are passed over.

    Raises:
        UserError: something cannot be found or read; the message names the file and the place in it.
    """
    if isinstance(source, DatasetRecords):
        for number, row in enumerate(read_rows(source, PARAMETER)):
            yield f"{source.name} row {number}", row
        return
    found = False
    for path, name, kind in _files(source, scratch):
        if kind.kind != "plain":
            found = True
            yield from read_records(path, name, kind, scratch=scratch, parameter=PARAMETER)
    if not found:
        raise UserError(f"{PARAMETER}: {source.label} holds text but no records; give jsonl or parquet")


def _files(source: FileRecords | S3Records, scratch: Path) -> Iterator[tuple[Path, str, DocumentFormat]]:
    """Path, name for people and format of each file."""
    if isinstance(source, S3Records):
        yield from fetch_objects(source.uri, source.endpoint_url, scratch, PARAMETER)
    else:
        for entry in list_files(source.paths, parameter=f"{PARAMETER}.paths"):
            yield entry.path, str(entry.path), entry.format
