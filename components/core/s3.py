"""The project's one S3 client: listing, the state of objects, transfers, and errors in one line.

boto3 finds credentials in its usual places (a pod's role, a profile, the environment); none are configured here. It is
imported when the first object is asked for.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from modelmill.components.core.errors import UserError
from modelmill.components.core.uri import split_s3

_ENDPOINT_VARIABLES = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")  # boto3 reads them itself
_BATCH = 1000  # objects that one request may delete
_PART = 16 << 20  # bytes of a part; objects larger than that move in several at a time
_ACTIONS = {
    "ListObjectsV2": "s3:ListBucket",
    "GetObject": "s3:GetObject and s3:ListBucket",
    "HeadObject": "s3:GetObject and s3:ListBucket",
    "DeleteObject": "s3:DeleteObject",
    "DeleteObjects": "s3:DeleteObject",
}
_REMEDIES = {
    "NoSuchBucket": "there is no such bucket; check its name, account and region",
    "NoSuchKey": "the object is gone; list the prefix again",
    "404": "the object is gone; list the prefix again",
    "PreconditionFailed": "an object changed while it was read; run again",
}
_REFUSED_KEYS = ("InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken")


@dataclass(frozen=True)
class RemoteObject:
    """One object, with what identifies its content."""

    key: str
    size: int
    etag: str


@dataclass(frozen=True)
class DatedObject:
    """One object and when it was written, in POSIX seconds of the server's clock."""

    key: str
    size: int
    modified: float


def s3_client(endpoint_url: str | None, parameter: str) -> Any:
    """A boto3 client, the same one until a setting of AWS in the environment changes (making one takes a while).

    Args:
        endpoint_url: of an S3-compatible store; None means AWS, or what AWS's own variables name.
        parameter: of the recipe or environment, for messages.

    Raises:
        UserError: boto3 is not installed, or the settings of the machine are wrong.
    """
    try:
        from botocore.exceptions import BotoCoreError
    except ImportError:
        raise UserError(f"{parameter}: reading s3:// needs boto3; pip install 'modelmill[aws]'") from None
    settings = tuple(sorted((name, value) for name, value in os.environ.items() if name.startswith("AWS_")))
    try:
        return _client(endpoint_url, settings, os.getpid())  # a fork must not share its parent's connections
    except (BotoCoreError, ValueError) as error:  # no region, no such profile, an endpoint that is no URL
        raise UserError(f"{parameter}: {error}; check AWS_REGION, AWS_PROFILE and the endpoint") from None


@lru_cache(maxsize=4)
def _client(endpoint_url: str | None, settings: tuple[tuple[str, str], ...], process: int) -> Any:
    import boto3
    from botocore.config import Config

    logging.getLogger("botocore").setLevel(logging.WARNING)  # it tells a step's log where each client's keys are from
    # Other stores rarely resolve bucket.host, as AWS does.
    custom = endpoint_url or any(name in _ENDPOINT_VARIABLES and value for name, value in settings)
    config = Config(
        connect_timeout=5,
        read_timeout=60,
        retries={"mode": "standard", "max_attempts": 4},
        s3={"addressing_style": "path"} if custom else {},
    )
    # A session of its own: the default one keeps the credentials it found first for the life of the process.
    return boto3.session.Session().client("s3", endpoint_url=endpoint_url, config=config)


@contextmanager
def explained(uri: str, endpoint_url: str | None, parameter: str) -> Iterator[None]:
    """Turn what S3 refuses into one line that says what to do.

    Raises:
        UserError: something below boto3 went wrong inside.
    """
    from boto3.exceptions import Boto3Error
    from botocore import exceptions

    try:
        yield
    except (exceptions.NoCredentialsError, exceptions.PartialCredentialsError, exceptions.ProfileNotFound) as error:
        remedy = "set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give the pod's account a role"
        raise UserError(f"{parameter}: {uri} needs AWS credentials ({error}); {remedy}") from None
    except exceptions.ClientError as error:
        raise UserError(f"{parameter}: {uri}: {_refusal(error)}") from None
    except (exceptions.HTTPClientError, exceptions.ConnectionError, exceptions.IncompleteReadError) as error:
        raise UserError(
            f"{parameter}: {uri} cannot be reached at {_place(endpoint_url)} ({error}); check the endpoint"
        ) from None
    except exceptions.BotoCoreError as error:
        raise UserError(f"{parameter}: {uri}: {error}; check the AWS settings") from None
    except Boto3Error as error:  # a transfer that gave up after its retries
        raise UserError(f"{parameter}: {uri} broke off at {_place(endpoint_url)} ({error}); run again") from None


def _place(endpoint_url: str | None) -> str:
    return endpoint_url or next((os.environ[name] for name in _ENDPOINT_VARIABLES if os.environ.get(name)), "AWS")


def _refusal(error: Any) -> str:
    code = str(error.response.get("Error", {}).get("Code", "unknown"))
    if code in ("AccessDenied", "403"):
        return f"access is denied; allow {_ACTIONS.get(error.operation_name, 's3:PutObject')}"
    if code in _REFUSED_KEYS:
        return f"the credentials are refused ({code}); correct AWS_PROFILE or AWS_ACCESS_KEY_ID and its secret"
    if error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0) >= 500:
        return f"S3 fails ({code}), also when asked again; try later"
    return _REMEDIES.get(code, f"S3 says {error}; mend that")


def error_code(error: BaseException) -> str:
    """S3's code of an error (`NoSuchKey`, `PreconditionFailed`), or an empty string for any other exception."""
    response = getattr(error, "response", None)
    return str(response.get("Error", {}).get("Code", "")) if isinstance(response, dict) else ""


def list_objects(uri: str, endpoint_url: str | None, parameter: str) -> list[RemoteObject]:
    """The object at a key, or all below a prefix (as of a folder), sorted by key; none is an empty list.

    Raises:
        UserError: no bucket, no credentials, no connection.
    """
    key = split_s3(uri, parameter=parameter)[1]
    listed = list(_entries(uri, endpoint_url, parameter))
    exact = [entry for entry in listed if key and entry["Key"] == key and not key.endswith("/")]
    below = key.rstrip("/") + "/" if key else ""
    chosen = exact or [entry for entry in listed if entry["Key"].startswith(below)]
    found = [RemoteObject(entry["Key"], entry["Size"], entry["ETag"].strip('"')) for entry in chosen]
    return sorted(found, key=lambda entry: entry.key)


def iter_objects(uri: str, endpoint_url: str | None, parameter: str) -> Iterator[DatedObject]:
    """All objects whose key begins as `uri` does, page by page: for prefixes with more of them than fit in memory.

    Raises:
        UserError: no bucket, no credentials, no connection.
    """
    for entry in _entries(uri, endpoint_url, parameter):
        yield DatedObject(entry["Key"], entry["Size"], entry["LastModified"].timestamp())


def _entries(uri: str, endpoint_url: str | None, parameter: str) -> Iterator[dict[str, Any]]:
    """What S3 says of each object whose key begins as `uri` does, page by page."""
    bucket, prefix = split_s3(uri, parameter=parameter)
    client = s3_client(endpoint_url, parameter)
    with explained(uri, endpoint_url, parameter):
        for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
            yield from page.get("Contents", [])


def delete_objects(bucket: str, keys: Sequence[str], endpoint_url: str | None, parameter: str) -> None:
    """Delete objects, many in one request; one that is gone already is no error.

    Raises:
        UserError: S3 refuses one of them; others may be gone.
    """
    from botocore.exceptions import ClientError

    client = s3_client(endpoint_url, parameter)
    for start in range(0, len(keys), _BATCH):
        some = keys[start : start + _BATCH]
        with explained(f"s3://{bucket}/{some[0]}", endpoint_url, parameter):
            asked = {"Objects": [{"Key": key} for key in some], "Quiet": True}
            refused = client.delete_objects(Bucket=bucket, Delete=asked).get("Errors")
        if refused:
            with explained(f"s3://{bucket}/{refused[0]['Key']}", endpoint_url, parameter):
                raise ClientError({"Error": refused[0]}, "DeleteObjects")


def fingerprint(objects: Iterable[RemoteObject]) -> str:
    """Number, total size and a digest of keys, sizes and ETags: changes when an object does."""
    found = list(objects)
    digest = hashlib.sha256("".join(f"{entry.key}\0{entry.size}\0{entry.etag}\n" for entry in found).encode())
    return f"{len(found)} objects, {sum(entry.size for entry in found)} bytes, {digest.hexdigest()[:24]}"


def download_listed(bucket: str, entry: RemoteObject, target: Path, endpoint_url: str | None, parameter: str) -> None:
    """Stream an object to a file, provided that it still is the one that was listed.

    Raises:
        UserError: it is gone, has changed, or cannot be read.
    """
    name = f"s3://{bucket}/{entry.key}"
    client = s3_client(endpoint_url, parameter)
    with explained(name, endpoint_url, parameter), target.open("wb") as file:
        body = client.get_object(Bucket=bucket, Key=entry.key, IfMatch=f'"{entry.etag}"')["Body"]
        for chunk in body.iter_chunks(1 << 20):
            file.write(chunk)
    if target.stat().st_size != entry.size:
        raise UserError(f"{parameter}: {name} has {entry.size} bytes, {target.stat().st_size} arrived; run again")


def _transfer() -> Any:
    from boto3.s3.transfer import TransferConfig

    return TransferConfig(multipart_threshold=2 * _PART, multipart_chunksize=_PART, max_concurrency=8)


def download(client: Any, bucket: str, key: str, target: Path) -> None:
    """An object as a file; a large one in several ranges at once, each tried again when it breaks off.

    Raises:
        Exception: of boto3, to be met with `explained`; OSError of the disk.
    """
    client.download_file(bucket, key, str(target), Config=_transfer())


def upload(client: Any, path: Path, bucket: str, key: str) -> None:
    """A file as an object, in parts when large; S3 checks the SHA-256 of what arrives.

    Raises:
        Exception: of boto3, to be met with `explained`.
    """
    # Not upload_file: it hides S3's answer in the text of an exception of its own.
    with path.open("rb") as file:
        client.upload_fileobj(file, bucket, key, ExtraArgs={"ChecksumAlgorithm": "SHA256"}, Config=_transfer())
