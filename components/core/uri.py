"""Local paths and `s3://` URIs: checked once here, so that no step meets a surprise later."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from modelmill.components.core.errors import UserError

_BUCKET = re.compile(r"^[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]$")


def is_remote(uri: str) -> bool:
    """Whether a URI names something that is not on this machine."""
    return "://" in uri and not uri.startswith("file://")


def local_path(uri: str, *, parameter: str = "uri") -> Path:
    """Path of a local URI (`/data/x`, `data/x` or `file:///data/x`).

    Raises:
        UserError: the URI has another scheme or holds a NUL byte.
    """
    if "\0" in uri:
        raise UserError(f"{parameter}: {uri!r} holds a NUL byte; give a plain path")
    if uri.startswith("file://"):
        return Path(unquote(urlsplit(uri).path))
    if is_remote(uri):
        raise UserError(f"{parameter}: {uri!r} is not a local path; give a path or file:// URI")
    return Path(uri).expanduser()


def split_s3(uri: str, *, parameter: str = "uri") -> tuple[str, str]:
    """Bucket and key of an `s3://bucket/key` URI (the key may be empty).

    Raises:
        UserError: not an S3 URI, or the bucket name breaks the S3 naming rules.
    """
    parts = urlsplit(uri)
    if parts.scheme != "s3" or not _BUCKET.match(parts.netloc):
        raise UserError(f"{parameter}: {uri!r} is not an S3 URI; write s3://bucket/key")
    return parts.netloc, parts.path.lstrip("/")
