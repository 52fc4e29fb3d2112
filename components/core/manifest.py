"""The manifest: the small JSON file that travels between steps while the data stays where it is."""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from modelmill.components.core.errors import UserError
from modelmill.components.core.store_cache import Cache, RemoteFile
from modelmill.components.core.uri import is_remote, local_path
from modelmill.components.core.verified import file_digest, problem_of

SCHEMA_VERSION = 1


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces, so that equal values have equal digests."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def json_digest(value: Any) -> str:
    """sha256 of a JSON value in its canonical form."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


class FileEntry(BaseModel):
    """One file of an artifact, its path relative to the manifest's `uri`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str
    bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")

    @field_validator("path")
    @classmethod
    def _inside(cls, value: str) -> str:
        path = PurePosixPath(value)
        if path.is_absolute() or ".." in path.parts or not path.parts or "\0" in value:
            raise ValueError(f"{value!r} leaves the artifact's folder")
        return value

    def remote(self) -> RemoteFile:
        """The file as the cache of artifacts in S3 knows it."""
        return RemoteFile(self.path, self.bytes, self.sha256)


class Manifest(BaseModel):
    """What a step made: where it lies, its files with digests, its counts, and what produced it.

    `counts` holds integers (rows, tokens, bytes), `metrics` floats worth comparing, `metadata` whatever the
    next step needs. `step`, `key`, `code`, `recipe` and `created` say where it came from and do not enter `digest`.
    """

    # A diverged loss is a number worth reading back; pydantic would write it as null.
    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="constants")

    schema_version: int = SCHEMA_VERSION
    kind: str
    uri: str
    files: list[FileEntry]
    counts: dict[str, int] = {}
    metrics: dict[str, float] = {}
    metadata: dict[str, Any] = {}
    step: str = ""
    key: str = ""
    code: str = ""
    recipe: str = ""
    created: float = Field(default_factory=time.time)

    @property
    def digest(self) -> str:
        """SHA-256 over the content: kind, files, counts and metadata, not the place or the time."""
        content = self.model_dump(include={"kind", "files", "counts", "metadata"}, mode="json")
        return json_digest(content)

    @property
    def total_bytes(self) -> int:
        return sum(entry.bytes for entry in self.files)

    @classmethod
    def read(cls, path: Path | str) -> Manifest:
        """Read a manifest file.

        Raises:
            UserError: the file is missing, is not a manifest or has a schema this version does not know.
        """
        try:
            return cls.parse(Path(path).read_bytes(), str(path))
        except FileNotFoundError:
            raise UserError(f"manifest: {path} does not exist; run the step that makes it") from None

    @classmethod
    def parse(cls, text: bytes, place: str) -> Manifest:
        """The manifest in a file's bytes.

        Args:
            text: the bytes.
            place: where they were read, for messages.

        Raises:
            UserError: they are no manifest or have a schema this version does not know.
        """
        try:
            content = json.loads(text)
            # Before the fields: a later version may have fields that this one would call wrong.
            version = content.get("schema_version", SCHEMA_VERSION) if isinstance(content, dict) else SCHEMA_VERSION
            if version != SCHEMA_VERSION:
                raise UserError(f"manifest: {place} has schema version {version}; this is {SCHEMA_VERSION}")
            return cls.model_validate(content)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"]) or "content"
            raise UserError(f"manifest: {place} is not a manifest ({field}: {first['msg']})") from None
        except ValueError as error:
            raise UserError(f"manifest: {place} is not JSON ({error}); run the step that makes it again") from None

    def write(self, path: Path | str) -> None:
        """Write the manifest so that a reader sees all of it or nothing."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{os.getpid()}")
        temporary.write_text(self.model_dump_json(indent=1) + "\n")
        os.replace(temporary, target)

    @classmethod
    def describe(cls, folder: Path, *, kind: str, **fields: Any) -> Manifest:
        """Manifest of every file below a finished folder, digests taken now."""
        files = [
            FileEntry(path=path.relative_to(folder).as_posix(), bytes=path.stat().st_size, sha256=file_digest(path))
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        ]
        return cls(kind=kind, uri=str(folder), files=files, **fields)

    def path(self, name: str) -> Path:
        """Local path of one file of the artifact, its bytes verified the first time this machine opens it.

        A file that lies in S3 is fetched into this machine's cache.

        Raises:
            UserError: the artifact has no such file, the file is missing or not what was written, or it cannot be
                fetched.
        """
        entry = next((entry for entry in self.files if entry.path == name), None)
        if entry is None:
            held = ", ".join(entry.path for entry in self.files)
            raise UserError(f"{self.kind}: no file {name!r} in {self.uri}; it holds {held}")
        if is_remote(self.uri):
            return Cache.current().fetch(self.uri, entry.remote(), self.kind)
        path = local_path(self.uri) / name
        if problem := problem_of(path, entry.bytes, entry.sha256):
            raise UserError(f"{self.kind}: {path} {problem}; delete its folder and run again")
        return path

    def folder(self, inside: str = "") -> Path:
        """Local folder of the artifact, or one inside it, with every file below it verified, and fetched from S3.

        Raises:
            UserError: as `path`.
        """
        for entry in self.files:
            if not inside or entry.path.startswith(f"{inside}/"):
                self.path(entry.path)
        root = Cache.current().folder(self.uri) if is_remote(self.uri) else local_path(self.uri)
        return root / inside
