"""S3 objects as a source: listing, state, and a streaming download. boto3 finds credentials in its usual places."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelmill.components.core.errors import UserError
from modelmill.components.core.uri import split_s3
from modelmill.components.data.files import TEXT_FORMATS, DocumentFormat, Formats, document_format

_PARAMETER = "corpus.source"
_CHUNK = 1 << 20


@dataclass(frozen=True)
class RemoteObject:
    """One object to read, with what identifies its content."""

    key: str
    size: int
    etag: str
    format: DocumentFormat


def _client(endpoint_url: str | None, parameter: str) -> Any:
    try:
        import boto3
        from botocore.config import Config
    except ImportError:
        raise UserError(f"{parameter}.uri: reading s3:// needs boto3; pip install 'modelmill[aws]'") from None
    config = Config(connect_timeout=5, read_timeout=60, retries={"mode": "standard", "max_attempts": 4})
    # A session of its own: the default one keeps the credentials it found first for the life of the process.
    return boto3.session.Session().client("s3", endpoint_url=endpoint_url, config=config)


@contextmanager
def _explained(uri: str, endpoint_url: str | None, parameter: str) -> Iterator[None]:
    """Turn what AWS refuses into one line that says what to do."""
    from botocore import exceptions

    try:
        yield
    except (exceptions.NoCredentialsError, exceptions.PartialCredentialsError, exceptions.ProfileNotFound) as error:
        remedy = "set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        raise UserError(f"{parameter}.uri: {uri} needs AWS credentials ({error}); {remedy}") from None
    except exceptions.ClientError as error:
        code = error.response.get("Error", {}).get("Code", "unknown")
        remedies = {
            "NoSuchBucket": "there is no such bucket; check its name, account and region",
            "NoSuchKey": "the object is gone; list the prefix again",
            "AccessDenied": "access is denied; allow s3:ListBucket and s3:GetObject",
            "403": "access is denied; allow s3:ListBucket and s3:GetObject",
            "PreconditionFailed": "an object changed while it was read; run again",
        }
        raise UserError(f"{parameter}.uri: {uri}: {remedies.get(code, f'S3 says {error}; mend that')}") from None
    except (exceptions.HTTPClientError, exceptions.ConnectionError, exceptions.IncompleteReadError) as error:
        place = endpoint_url or "AWS"
        raise UserError(f"{parameter}.uri: {uri} cannot be reached at {place} ({error}); check the endpoint") from None
    except exceptions.BotoCoreError as error:
        raise UserError(f"{parameter}.uri: {uri}: {error}; check the AWS settings") from None


def list_objects(
    uri: str, endpoint_url: str | None, parameter: str = _PARAMETER, formats: Formats = TEXT_FORMATS
) -> list[RemoteObject]:
    """Readable objects at a key or below a prefix, sorted by key.

    Args:
        uri: key or prefix.
        endpoint_url: of an S3-compatible store; None means AWS.
        parameter: of the recipe, for messages.
        formats: that are read.

    Raises:
        UserError: no bucket, no object, no credentials, no connection, or nothing in a format that is read.
    """
    bucket, key = split_s3(uri, parameter=f"{parameter}.uri")
    client = _client(endpoint_url, parameter)
    with _explained(uri, endpoint_url, parameter):
        listed = _pages(client, bucket, key)
        exact = [entry for entry in listed if key and entry["Key"] == key and not key.endswith("/")]
        below = key.rstrip("/") + "/" if key else ""
        chosen = exact or [entry for entry in listed if entry["Key"].startswith(below)]
    if not chosen:
        raise UserError(f"{parameter}.uri: {uri} names no object; check the key, or the prefix")
    found = [
        RemoteObject(entry["Key"], entry["Size"], entry["ETag"].strip('"'), kind)
        for entry in chosen
        if (kind := document_format(entry["Key"], formats))
    ]
    if not found:
        raise UserError(f"{parameter}.uri: {uri} holds no object that can be read; store {formats.readable}")
    return sorted(found, key=lambda entry: entry.key)


def _pages(client: Any, bucket: str, prefix: str) -> list[dict[str, Any]]:
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
    return [entry for page in pages for entry in page.get("Contents", [])]


def fingerprint_objects(
    uri: str, endpoint_url: str | None, parameter: str = _PARAMETER, formats: Formats = TEXT_FORMATS
) -> str:
    """Number, total size and a digest of keys, sizes and ETags; see `list_objects` for the errors."""
    objects = list_objects(uri, endpoint_url, parameter, formats)
    digest = hashlib.sha256("".join(f"{entry.key}\0{entry.size}\0{entry.etag}\n" for entry in objects).encode())
    return f"{len(objects)} objects, {sum(entry.size for entry in objects)} bytes, {digest.hexdigest()[:24]}"


def download(
    uri: str, endpoint_url: str | None, entry: RemoteObject, target: Path, parameter: str = _PARAMETER
) -> None:
    """Stream an object to a file, provided that it still is the one that was listed.

    Raises:
        UserError: it is gone, has changed, or cannot be read.
    """
    bucket, _ = split_s3(uri, parameter=f"{parameter}.uri")
    name = f"s3://{bucket}/{entry.key}"
    with _explained(name, endpoint_url, parameter), target.open("wb") as file:
        body = _client(endpoint_url, parameter).get_object(Bucket=bucket, Key=entry.key, IfMatch=f'"{entry.etag}"')[
            "Body"
        ]
        for chunk in body.iter_chunks(_CHUNK):
            file.write(chunk)
    if target.stat().st_size != entry.size:
        raise UserError(f"{parameter}.uri: {name} has {entry.size} bytes, {target.stat().st_size} arrived; run again")
