"""S3 objects as a source: those in a format that is read, their state, and a streaming download."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from modelmill.components.core import s3
from modelmill.components.core.errors import UserError
from modelmill.components.core.uri import split_s3
from modelmill.components.data.files import TEXT_FORMATS, DocumentFormat, Formats, document_format

_PARAMETER = "corpus.source"


@dataclass(frozen=True)
class SourceObject(s3.RemoteObject):
    """One object to read."""

    format: DocumentFormat


def list_objects(
    uri: str, endpoint_url: str | None, parameter: str = _PARAMETER, formats: Formats = TEXT_FORMATS
) -> list[SourceObject]:
    """Readable objects at a key or below a prefix, sorted by key.

    Args:
        uri: key or prefix.
        endpoint_url: of an S3-compatible store; None means AWS.
        parameter: of the recipe, for messages.
        formats: that are read.

    Raises:
        UserError: no bucket, no object, no credentials, no connection, or nothing in a format that is read.
    """
    listed = s3.list_objects(uri, endpoint_url, f"{parameter}.uri")
    if not listed:
        raise UserError(f"{parameter}.uri: {uri} names no object; check the key, or the prefix")
    found = [
        SourceObject(entry.key, entry.size, entry.etag, kind)
        for entry in listed
        if (kind := document_format(entry.key, formats))
    ]
    if not found:
        raise UserError(f"{parameter}.uri: {uri} holds no object that can be read; store {formats.readable}")
    return found


def fingerprint_objects(
    uri: str, endpoint_url: str | None, parameter: str = _PARAMETER, formats: Formats = TEXT_FORMATS
) -> str:
    """State of the readable objects, see `s3.fingerprint`; see `list_objects` for the errors."""
    return s3.fingerprint(list_objects(uri, endpoint_url, parameter, formats))


def download(
    uri: str, endpoint_url: str | None, entry: s3.RemoteObject, target: Path, parameter: str = _PARAMETER
) -> None:
    """Stream an object to a file, provided that it still is the one that was listed.

    Raises:
        UserError: it is gone, has changed, or cannot be read.
    """
    bucket, _ = split_s3(uri, parameter=f"{parameter}.uri")
    s3.download_listed(bucket, entry, target, endpoint_url, f"{parameter}.uri")
