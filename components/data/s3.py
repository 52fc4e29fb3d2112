"""S3 objects as a source: those in a format that is read, their state, and a streaming download."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from modelmill.components.core import s3
from modelmill.components.core.errors import UserError
from modelmill.components.core.uri import split_s3
from modelmill.components.data.files import DocumentFormat, document_format
from modelmill.components.data.source_config import S3Objects


@dataclass(frozen=True)
class SourceObject(s3.RemoteObject):
    """One object to read."""

    format: DocumentFormat


def list_objects(source: S3Objects) -> list[SourceObject]:
    """Readable objects at a key or below a prefix, sorted by key.

    Raises:
        UserError: no bucket, no object, no credentials, no connection, or nothing in a format that is read.
    """
    parameter = f"{source.parameter}.uri"
    listed = s3.list_objects(source.uri, source.endpoint_url, parameter)
    if not listed:
        raise UserError(f"{parameter}: {source.uri} names no object; check the key, or the prefix")
    found = [
        SourceObject(entry.key, entry.size, entry.etag, kind)
        for entry in listed
        if (kind := document_format(entry.key, source.formats))
    ]
    if not found:
        readable = source.formats.readable
        raise UserError(f"{parameter}: {source.uri} holds no object that can be read; store {readable}")
    return found


def fingerprint_objects(source: S3Objects) -> str:
    """State of the readable objects, see `s3.fingerprint`; see `list_objects` for the errors."""
    return s3.fingerprint(list_objects(source))


def download(source: S3Objects, entry: s3.RemoteObject, target: Path) -> None:
    """Stream an object to a file, provided that it still is the one that was listed.

    Raises:
        UserError: it is gone, has changed, or cannot be read.
    """
    parameter = f"{source.parameter}.uri"
    bucket, _ = split_s3(source.uri, parameter=parameter)
    s3.download_listed(bucket, entry, target, source.endpoint_url, parameter)
