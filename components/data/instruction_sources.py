"""Every source of instruction data as a stream of records with their places."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from modelmill.components.core.errors import UserError
from modelmill.components.data.formats import read_records
from modelmill.components.data.huggingface import read_rows
from modelmill.components.data.instruction_config import PARAMETER, DatasetRecords, FileRecords, S3Records
from modelmill.components.data.sources import open_files

Source = TypeVar("Source")
_RANKS = {"test": 0, "validation": 1, None: 3, "train": 4}  # documentation, which has no `into`, stands between


def in_reading_order(sources: Sequence[Source]) -> list[tuple[int, Source]]:
    """Sources with their numbers, those with a fixed split first and the held-out ones before all.

    A prompt stands in the split that it came up in first, so one that is held out is not learnt.
    """
    return sorted(enumerate(sources), key=lambda item: _RANKS[item[1].into] if hasattr(item[1], "into") else 2)


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
        yield from read_rows(source)
        return
    found = False
    for path, name, kind in open_files(source, scratch):
        if kind.kind != "plain":
            found = True
            yield from read_records(path, name, kind, scratch=scratch, parameter=PARAMETER)
    if not found:
        raise UserError(f"{PARAMETER}: {source.label} holds text but no records; give jsonl or parquet")
