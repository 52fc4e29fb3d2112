"""The corpus on disk: one Arrow IPC file a split with a single column `text`, read by mapping it into memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import pyarrow as pa

from modelmill.components.core.errors import UserError

SPLITS = ("train", "validation", "test")
SCHEMA = pa.schema([pa.field("text", pa.large_string(), nullable=False)])  # large: offsets past 2 GB
_BATCH_BYTES = 4 << 20
_BATCH_DOCUMENTS = 4096


class DocumentWriter:
    """Writes documents to an Arrow file in record batches of at most about 4 MB (or one document)."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._writer = pa.ipc.new_file(self._file, SCHEMA)
        self._waiting: list[str] = []
        self._waiting_bytes = 0

    def append(self, text: str, size: int) -> None:
        """Add a document of `size` UTF-8 bytes."""
        self._waiting.append(text)
        self._waiting_bytes += size
        if self._waiting_bytes >= _BATCH_BYTES or len(self._waiting) >= _BATCH_DOCUMENTS:
            self._flush()

    def _flush(self) -> None:
        if self._waiting:
            self._writer.write_batch(pa.record_batch([pa.array(self._waiting, pa.large_string())], schema=SCHEMA))
        self._waiting, self._waiting_bytes = [], 0

    def __enter__(self) -> DocumentWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._flush()
                self._writer.close()
        finally:
            self._file.close()


def read_documents(path: Path) -> Iterator[list[str]]:
    """Documents of a split, a record batch at a time, so that memory stays bounded.

    Raises:
        UserError: the file is not an Arrow file with a text column.
    """
    with pa.memory_map(str(path)) as source:
        try:
            reader = pa.ipc.open_file(source)
            index = reader.schema.get_field_index("text")
        except pa.ArrowInvalid as error:
            raise UserError(f"corpus: {path} is not an Arrow file ({error}); run ingest_corpus again") from None
        if index < 0:
            raise UserError(f"corpus: {path} has no column 'text' but {reader.schema.names}; run ingest_corpus again")
        for number in range(reader.num_record_batches):
            yield reader.get_batch(number).column(index).to_pylist()
