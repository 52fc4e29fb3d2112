"""What passes between a step and its SageMaker job through S3: inputs there, results and reports back."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from modelmill.components.core import events
from modelmill.components.core.aws import error_code, is_missing
from modelmill.components.core.manifest import file_digest, json_digest
from modelmill.components.core.uri import split_s3


class JobFiles:
    """Files of jobs in S3."""

    def __init__(self, client: Any) -> None:
        """
        Args:
            client: of S3.
        """
        self._client = client

    def send(self, place: str, prefix: str) -> str:
        """Upload a folder or a file below the digest of its content; what lies there already is not sent again.

        Returns:
            URI of the folder.
        """
        source = Path(place)
        paths = [source] if source.is_file() else sorted(path for path in source.rglob("*") if path.is_file())
        root = source.parent if source.is_file() else source
        names = {path.relative_to(root).as_posix(): path for path in paths}
        uri = f"{prefix}/{json_digest({name: file_digest(path) for name, path in names.items()})[:32]}"
        bucket, folder = split_s3(uri)
        there = dict(self._listed(uri))
        missing = {name: path for name, path in names.items() if there.get(f"{folder}/{name}") != path.stat().st_size}
        for number, (name, path) in enumerate(missing.items()):
            events.progress(f"uploading {root.name}/{name}", number, len(missing))
            self._client.upload_file(str(path), bucket, f"{folder}/{name}")
        return uri

    def write(self, uri: str, content: bytes) -> None:
        bucket, key = split_s3(uri)
        self._client.put_object(Bucket=bucket, Key=key, Body=content)

    def fetch(self, uri: str, target: Path) -> int:
        """Bring every object below a folder into a local one; each appears whole. Returns their number."""
        bucket, folder = split_s3(f"{uri.rstrip('/')}/")
        found = [key for key, _ in self._listed(uri) if not key.endswith("/")]
        for number, key in enumerate(found):
            path = target / key.removeprefix(folder)
            if not path.resolve().is_relative_to(target.resolve()):
                continue  # a key may hold `..`; S3 does not mind
            path.parent.mkdir(parents=True, exist_ok=True)
            events.progress(f"fetching {path.name}", number, len(found))
            partial = path.with_name(f".{path.name}.{os.getpid()}")
            self._client.download_file(bucket, key, str(partial))
            os.replace(partial, path)
        return len(found)

    def lines_after(self, uri: str, offset: int) -> bytes:
        """Whole lines of an object from a byte offset on; empty where there is nothing new."""
        bucket, key = split_s3(uri)
        try:
            answer = self._client.get_object(Bucket=bucket, Key=key, Range=f"bytes={offset}-")
        except Exception as error:
            if is_missing(error) or error_code(error) in ("InvalidRange", "416"):
                return b""
            raise
        content: bytes = answer["Body"].read()
        return content[: content.rfind(b"\n") + 1]

    def _listed(self, uri: str) -> Iterator[tuple[str, int]]:
        """Key and size of every object below a folder."""
        bucket, folder = split_s3(f"{uri.rstrip('/')}/")
        for page in self._client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=folder):
            for entry in page.get("Contents", []):
                yield entry["Key"], entry["Size"]
