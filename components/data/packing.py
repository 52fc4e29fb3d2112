"""Step `pack_tokens`: documents as one stream of tokens, cut into rows of a fixed length."""

from __future__ import annotations

import hashlib
import logging
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from tokenizers import Tokenizer

from modelmill.components.core import events, tracking
from modelmill.components.core.errors import UserError
from modelmill.components.core.manifest import Manifest
from modelmill.components.core.step import StepResult
from modelmill.components.data.config import PackingConfig
from modelmill.components.data.documents import SPLITS, read_documents
from modelmill.components.data.token_bytes import TokenBytes

logger = logging.getLogger("modelmill")
# A call's text: enough documents for every thread; an encoding takes some 40 times the bytes of its text.
_BATCH_BYTES = 2 << 20
_BUFFERED_TOKENS = 1 << 20


@dataclass(frozen=True)
class _Packed:
    """What became of a split; `stream_tokens` has the end-of-text tokens, `bytes` is of predicted tokens only."""

    documents: int
    stream_tokens: int
    rows: int
    bytes: int
    digest: str


class _RowWriter:
    """Cuts a stream of tokens into overlapping rows and writes them as they fill up."""

    def __init__(self, file: IO[bytes], length: int, dtype: np.dtype) -> None:
        self._file, self._length, self._dtype = file, length, dtype
        self._waiting: list[np.ndarray] = []
        self._waiting_tokens = 0
        self._digest = hashlib.sha256()
        self.rows = self.tokens = 0

    def append(self, tokens: np.ndarray) -> None:
        self._waiting.append(tokens)
        self._waiting_tokens += len(tokens)
        self.tokens += len(tokens)
        if self._waiting_tokens > max(_BUFFERED_TOKENS, self._length):
            self.flush()

    def flush(self) -> None:
        """Write every row that is full; the token that the next row begins with stays."""
        stream = np.concatenate(self._waiting) if self._waiting else np.empty(0, self._dtype)
        rows = max(0, len(stream) - 1) // self._length
        if rows:
            windows = np.lib.stride_tricks.sliding_window_view(stream, self._length + 1)
            content = windows[: rows * self._length : self._length].tobytes()
            self._file.write(content)
            self._digest.update(content)
        self._waiting = [stream[rows * self._length :]]
        self._waiting_tokens = len(self._waiting[0])
        self.rows += rows

    @property
    def digest(self) -> str:
        return self._digest.hexdigest()


class _Tail:
    """The last documents of the stream: enough of them to account for any tail that fills no row."""

    def __init__(self, tokens: int) -> None:
        self._enough = tokens
        self._documents: deque[tuple[str, int]] = deque()
        self._tokens = 0

    def append(self, text: str, tokens: int) -> None:
        self._documents.append((text, tokens))
        self._tokens += tokens
        while self._tokens - self._documents[0][1] >= self._enough:
            self._tokens -= self._documents.popleft()[1]

    def size(self, tokens: int, accounting: TokenBytes) -> int:
        """UTF-8 bytes that the last `tokens` tokens of the stream stand for."""
        size = 0
        for text, held in reversed(self._documents):
            if tokens <= 0:
                break
            size += len(text.encode("utf-8")) - accounting.prefix(text, held - min(tokens, held))
            tokens -= held
        return size


def pack_tokens(config: PackingConfig, output: Path, *, corpus: Manifest, tokenizer: Manifest) -> StepResult:
    """Write `train.bin`, `validation.bin` and `test.bin`: little-endian [rows, sequence_length + 1].

    A split's documents are joined with the end-of-text token after each. A row begins with the last token of the row
    before, so that every token but the first is predicted exactly once; what does not fill a row is dropped and
    counted. Memory stays bounded whatever the corpus. Equal inputs give equal bytes.

    Args:
        config: sequence length.
        output: existing empty folder.
        corpus: manifest of `ingest_corpus`.
        tokenizer: manifest of `train_tokenizer`.

    Returns:
        kind `tokens`; counts `vocab_size`, `sequence_length` and per split `_documents`, `_rows`, `_tokens`
        (predicted), `_bytes` (UTF-8 bytes of the text those predicted tokens stand for) and `_dropped_tokens`;
        metadata `dtype` and `eos_token_id`.

    Raises:
        UserError: a split has too few tokens for one row.
    """
    encoder = Tokenizer.from_file(str(tokenizer.folder() / "tokenizer.json"))
    encoder.encode_special_tokens = True  # text that spells a special token stays text
    eos, size = int(tokenizer.metadata["eos_token_id"]), tokenizer.counts["vocab_size"]
    dtype = np.dtype("<u2" if size <= 1 << 16 else "<u4")
    counts = {"vocab_size": size, "sequence_length": config.sequence_length}
    for split in SPLITS:
        packed = _pack_split(config.sequence_length, output / f"{split}.bin", split, dtype, corpus, encoder, eos)
        predicted = packed.rows * config.sequence_length
        counts |= {
            f"{split}_documents": packed.documents,
            f"{split}_rows": packed.rows,
            f"{split}_tokens": predicted,
            f"{split}_bytes": packed.bytes,
            f"{split}_dropped_tokens": packed.stream_tokens - 1 - predicted,
        }
        logger.info("%s: %d rows, %d tokens, %d bytes", split, packed.rows, predicted, packed.bytes)
        tracking.log_dataset(
            name=f"tokens-{split}",
            digest=packed.digest,
            source=f"corpus {corpus.digest[:12]}, tokenizer {tokenizer.digest[:12]}",
            context=tracking.CONTEXTS[split],
            profile={"rows": packed.rows, "tokens": predicted, "bytes": packed.bytes},
        )
    return StepResult(kind="tokens", counts=counts, metadata={"dtype": dtype.name, "eos_token_id": eos})


def _pack_split(
    length: int, path: Path, split: str, dtype: np.dtype, corpus: Manifest, encoder: Tokenizer, eos: int
) -> _Packed:
    accounting, tail = TokenBytes(encoder), _Tail(length)
    documents = text_bytes = unpredicted = 0
    total = corpus.counts.get(f"{split}_bytes")
    with path.open("wb") as file:
        writer = _RowWriter(file, length, dtype)
        for batch in _batches(corpus.path(f"{split}.arrow")):
            for text, encoded in zip(batch, encoder.encode_batch_fast(batch, add_special_tokens=False), strict=True):
                if not documents:  # the first token of all has nothing before it to be predicted from
                    unpredicted = accounting.prefix(text, 1)
                tokens = np.array([*encoded.ids, eos], dtype)
                writer.append(tokens)
                tail.append(text, len(tokens))
                documents += 1
                text_bytes += len(text.encode("utf-8"))
            events.progress(f"packing {split}", text_bytes, total)
        writer.flush()
    if not writer.rows:
        raise UserError(
            f"packing.sequence_length: {length} needs {length + 1} tokens for one row and the {split} split has "
            f"{writer.tokens} ({documents} documents); set sequence_length to at most {max(1, writer.tokens - 1)} "
            f"or give more text"
        )
    dropped = tail.size(writer.tokens - 1 - writer.rows * length, accounting)
    kept = text_bytes - unpredicted - dropped
    return _Packed(documents, writer.tokens, writer.rows, kept, writer.digest)


def _batches(path: Path) -> Iterator[list[str]]:
    """Documents in lists of about 2 MB of text, one document at least."""
    batch: list[str] = []
    size = 0
    for documents in read_documents(path):
        for text in documents:
            batch.append(text)
            size += len(text)
            if size >= _BATCH_BYTES:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch
