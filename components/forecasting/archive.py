"""The archive of published forecasts: a folder or an S3 prefix that outlives runs, stores and champions.

A forecast is one Parquet file, written once: the table of the step `forecast`, and in its schema's metadata under
`modelmill` what it was made of. Its name says when and by what: the last timestamp that the series had, the model's
weights, and all else that decides the numbers, so that equal forecasts are one file.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from modelmill.components.core import s3
from modelmill.components.core.errors import UserError
from modelmill.components.core.home import Home
from modelmill.components.core.manifest import json_digest
from modelmill.components.core.uri import is_remote, local_path, split_s3
from modelmill.components.forecasting.drift_config import PublishConfig

PARAMETER = "archive.uri"
KEY = b"modelmill"  # of the schema's metadata
_SUFFIX, _WEIGHTS = ".parquet", 16


@dataclass(frozen=True, order=True)
class ForecastName:
    """What the name of an archived forecast says.

    Attributes:
        stamp: last timestamp of the series, as `20240131T000000`; names sort by it.
        weights: first hex digits of the digest of the model's weights.
        content: of the digest of series, horizon and levels.
    """

    stamp: str
    weights: str
    content: str

    @classmethod
    def of(cls, stamp: str, weights_digest: str, content: object) -> ForecastName:
        return cls(stamp, weights_digest[:_WEIGHTS], json_digest(content)[:_WEIGHTS])

    @classmethod
    def parse(cls, name: str) -> ForecastName | None:
        """The name of a file, None where it is another's."""
        parts = name.removesuffix(_SUFFIX).split("-")
        return cls(*parts) if name.endswith(_SUFFIX) and len(parts) == 3 and all(parts) else None

    @property
    def file(self) -> str:
        return f"{self.stamp}-{self.weights}-{self.content}{_SUFFIX}"

    def made_by(self, weights_digest: str) -> bool:
        return self.weights == weights_digest[:_WEIGHTS]


class Archive(Protocol):
    """Forecasts by name."""

    def names(self) -> list[ForecastName]:
        """All of them, in order; none where nothing was published yet.

        Raises:
            UserError: the archive cannot be listed.
        """

    def fetch(self, name: ForecastName, scratch: Path) -> Path:
        """Local path of one of them, perhaps below `scratch`.

        Raises:
            UserError: it cannot be read.
        """

    def add(self, name: ForecastName, path: Path) -> bool:
        """Publish a file whole or not at all; False where it is published already.

        Raises:
            UserError: the archive cannot be written.
        """

    def state(self) -> str:
        """Changes when a forecast is added."""


def open_archive(config: PublishConfig) -> Archive:
    """The archive of a section."""
    if config.uri is not None and is_remote(config.uri):
        return _Bucket(f"{config.uri.rstrip('/')}/{config.name}", config.endpoint_url)
    place = local_path(config.uri, parameter=PARAMETER) if config.uri else Home.current().root / "forecasts"
    return _Folder(place.absolute() / config.name)


def _named(files: list[str]) -> list[ForecastName]:
    return sorted(name for file in files if (name := ForecastName.parse(file)) is not None)


def _state(names: list[ForecastName]) -> str:
    return f"{len(names)} forecasts, {json_digest([name.file for name in names])[:24]}"


class _Folder:
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def names(self) -> list[ForecastName]:
        try:
            return _named([path.name for path in self._folder.iterdir()] if self._folder.exists() else [])
        except OSError as error:
            raise UserError(f"{PARAMETER}: {self._folder} cannot be listed ({error.strerror}); mend it") from None

    def fetch(self, name: ForecastName, scratch: Path) -> Path:
        return self._folder / name.file

    def add(self, name: ForecastName, path: Path) -> bool:
        target = self._folder / name.file
        if target.exists():
            return False
        temporary = target.with_name(f".{target.name}.{os.getpid()}")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(path.read_bytes())
            os.replace(temporary, target)
        except OSError as error:
            raise UserError(
                f"{PARAMETER}: {self._folder} cannot be written ({error.strerror}); name another"
            ) from None
        return True

    def state(self) -> str:
        return _state(self.names())


class _Bucket:
    def __init__(self, uri: str, endpoint_url: str | None) -> None:
        self._uri, self._endpoint = uri, endpoint_url

    def names(self) -> list[ForecastName]:
        objects = s3.list_objects(f"{self._uri}/", self._endpoint, PARAMETER)
        return _named([entry.key.rpartition("/")[2] for entry in objects])

    def fetch(self, name: ForecastName, scratch: Path) -> Path:
        bucket, key = split_s3(f"{self._uri}/{name.file}", parameter=PARAMETER)
        client = s3.s3_client(self._endpoint, PARAMETER)
        with s3.explained(f"{self._uri}/{name.file}", self._endpoint, PARAMETER):
            s3.download(client, bucket, key, scratch / name.file)
        return scratch / name.file

    def add(self, name: ForecastName, path: Path) -> bool:
        if name in self.names():
            return False
        bucket, key = split_s3(f"{self._uri}/{name.file}", parameter=PARAMETER)
        client = s3.s3_client(self._endpoint, PARAMETER)
        with s3.explained(f"{self._uri}/{name.file}", self._endpoint, PARAMETER):
            s3.upload(client, path, bucket, key)
        return True

    def state(self) -> str:
        return _state(self.names())
