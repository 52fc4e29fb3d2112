"""Every kind of source as a stream of raw texts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator
from pathlib import Path

from modelmill.components.core.uri import split_s3
from modelmill.components.data.config import CorpusConfig, FilesSource, InstalledDocsSource, S3Source, Source
from modelmill.components.data.files import TEXT_FORMATS, DocumentFormat, Formats, list_files
from modelmill.components.data.formats import ReadOptions, read_texts
from modelmill.components.data.huggingface import read_dataset
from modelmill.components.data.installed_docs import read_installed_docs
from modelmill.components.data.s3 import download, list_objects


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
    if isinstance(source, FilesSource):
        return _read_files(source, config, scratch)
    if isinstance(source, S3Source):
        return _read_objects(source, config, scratch)
    return read_dataset(source)


def _options(source: FilesSource | S3Source, config: CorpusConfig, scratch: Path) -> ReadOptions:
    return ReadOptions(source.text_field, source.separator, config.max_document_length, scratch)


def _read_files(source: FilesSource, config: CorpusConfig, scratch: Path) -> Generator[str, None, None]:
    options = _options(source, config, scratch)
    for entry in list_files(source.paths):
        yield from read_texts(entry.path, str(entry.path), entry.format, options)


def _read_objects(source: S3Source, config: CorpusConfig, scratch: Path) -> Generator[str, None, None]:
    options = _options(source, config, scratch)
    for path, name, kind in fetch_objects(source.uri, source.endpoint_url, scratch, options.parameter):
        yield from read_texts(path, name, kind, options)


def fetch_objects(
    uri: str, endpoint_url: str | None, scratch: Path, parameter: str, formats: Formats = TEXT_FORMATS
) -> Generator[tuple[Path, str, DocumentFormat], None, None]:
    """Objects at a key or below a prefix, one at a time: local path (until the next one), URI and format.

    Args:
        uri: key or prefix.
        endpoint_url: of an S3-compatible store; None means AWS.
        scratch: folder for the object.
        parameter: of the recipe, for messages.
        formats: that are read.

    Raises:
        UserError: see `list_objects` and `download`.
    """
    bucket, _ = split_s3(uri, parameter=f"{parameter}.uri")
    target = scratch / "object"  # never the key: it may hold `..` or be as long as S3 allows
    for entry in list_objects(uri, endpoint_url, parameter, formats):
        try:
            download(uri, endpoint_url, entry, target, parameter)
            yield target, f"s3://{bucket}/{entry.key}", entry.format
        finally:
            target.unlink(missing_ok=True)
