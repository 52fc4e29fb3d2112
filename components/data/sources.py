"""Every kind of source as a stream of raw texts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator
from pathlib import Path

from modelmill.components.core.uri import split_s3
from modelmill.components.data.config import CorpusConfig, FilesSource, InstalledDocsSource, S3Source, Source
from modelmill.components.data.files import DocumentFormat, list_files
from modelmill.components.data.formats import ReadOptions, read_texts
from modelmill.components.data.huggingface import read_dataset
from modelmill.components.data.installed_docs import read_installed_docs
from modelmill.components.data.s3 import download, list_objects
from modelmill.components.data.source_config import LocalFiles, S3Objects


def read_source(
    source: Source, config: CorpusConfig, scratch: Path, skipped: Counter[str]
) -> Generator[str, None, None]:
    """Raw texts of a source, lazily: what is not asked for is not read or downloaded.

    Args:
        source: where the text is.
        config: the section it stands in.
        scratch: folder for temporary files, emptied as the stream goes on.
        skipped: counts what a source passed over before it became a document, by reason.

    Raises:
        UserError: something cannot be found or read; the message names the file and the place in it.
    """
    if isinstance(source, InstalledDocsSource):
        return read_installed_docs(source.distributions, config.min_document_length, skipped)
    if isinstance(source, FilesSource | S3Source):
        return _read_files(source, config, scratch)
    return read_dataset(source)


def _read_files(source: FilesSource | S3Source, config: CorpusConfig, scratch: Path) -> Generator[str, None, None]:
    options = ReadOptions(source.text_field, source.separator, config.max_document_length, scratch)
    for path, name, kind in open_files(source, scratch):
        yield from read_texts(path, name, kind, options)


def open_files(
    source: LocalFiles | S3Objects, scratch: Path
) -> Generator[tuple[Path, str, DocumentFormat], None, None]:
    """Files or objects of a source, one at a time: path (of an object until the next one), name for people and format.

    Args:
        source: where they are.
        scratch: folder for an object.

    Raises:
        UserError: see `list_files`, `list_objects` and `download`.
    """
    if isinstance(source, S3Objects):
        yield from _fetch_objects(source, scratch)
        return
    for entry in list_files(source.paths, parameter=f"{source.parameter}.paths", formats=source.formats):
        yield entry.path, str(entry.path), entry.format


def _fetch_objects(source: S3Objects, scratch: Path) -> Generator[tuple[Path, str, DocumentFormat], None, None]:
    bucket, _ = split_s3(source.uri, parameter=f"{source.parameter}.uri")
    target = scratch / "object"  # never the key: it may hold `..` or be as long as S3 allows
    for entry in list_objects(source):
        try:
            download(source, entry, target)
            yield target, f"s3://{bucket}/{entry.key}", entry.format
        finally:
            target.unlink(missing_ok=True)
