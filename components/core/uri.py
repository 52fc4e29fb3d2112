"""Local paths and `s3://` URIs: checked once here, so that no step meets a surprise later."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated
from urllib.parse import unquote

from pydantic import Field

from modelmill.components.core.errors import UserError

_BUCKET = re.compile(r"^[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]$")
# Type of a parameter. No `user:password@`: recipes are stored and shown.
S3Endpoint = Annotated[
    str | None,
    Field(pattern=r"^https?://[^@\s]+$", description="Endpoint of an S3-compatible store; null means AWS."),
]


def is_remote(uri: str) -> bool:
    """Whether a URI names something that is not on this machine."""
    return "://" in uri and not uri.lower().startswith("file://")


def local_path(uri: str, *, parameter: str = "uri") -> Path:
    """Path of a local URI (`/data/x`, `data/x`, `~/x` or `file:///data/x`).

    Raises:
        UserError: the URI is empty, has another scheme, names another host, holds a NUL byte or an unknown `~user`.
    """
    if not uri:
        raise UserError(f"{parameter}: '' is not a path; give a path or file:// URI")
    if is_remote(uri):
        raise UserError(f"{parameter}: {uri!r} is not a local path; give a path or file:// URI")
    path = uri
    if uri.lower().startswith("file://"):
        host, slash, rest = uri[len("file://") :].partition("/")
        if host not in ("", "localhost") or not slash:
            raise UserError(f"{parameter}: {uri!r} names the host {host!r}; write file:///absolute/path")
        path = unquote("/" + rest)
    if "\0" in path:
        raise UserError(f"{parameter}: {uri!r} holds a NUL byte; give a plain path")
    try:
        return Path(path) if path is not uri else Path(path).expanduser()
    except RuntimeError:
        raise UserError(f"{parameter}: {uri!r} names an unknown user; give an absolute path") from None


def split_s3(uri: str, *, parameter: str = "uri") -> tuple[str, str]:
    """Bucket and key of an `s3://bucket/key` URI (the key may be empty, and may hold `?`, `#` and spaces).

    Raises:
        UserError: not an S3 URI, or the bucket name breaks the S3 naming rules.
    """
    scheme, separator, rest = uri.partition("://")
    bucket, _, key = rest.partition("/")
    if scheme.lower() != "s3" or not separator or not _BUCKET.fullmatch(bucket) or ".." in bucket:
        raise UserError(f"{parameter}: {uri!r} is not an S3 URI; write s3://bucket/key")
    return bucket, key.lstrip("/")
