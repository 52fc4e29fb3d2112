"""Every source of instruction data as a stream of records with their places."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import Any

from modelmill.components.data.files import list_files
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

    Raises:
        UserError: something cannot be found or read; the message names the file and the place in it.
    """
    if isinstance(source, FileRecords):
        for entry in list_files(source.paths, parameter=f"{PARAMETER}.paths"):
            yield from read_records(entry.path, str(entry.path), entry.format, scratch=scratch, parameter=PARAMETER)
    elif isinstance(source, S3Records):
        for path, name, kind in fetch_objects(source.uri, source.endpoint_url, scratch, PARAMETER):
            yield from read_records(path, name, kind, scratch=scratch, parameter=PARAMETER)
    else:
        for number, row in enumerate(read_rows(source, PARAMETER)):
            yield f"{source.name} row {number}", row
