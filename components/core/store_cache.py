"""Copies on this machine of artifacts that lie in S3: fetched when opened, checked once, dropped when space is short.

Below `$MODELMILL_CACHE`, or `cache/` in the home, every artifact has a folder named after its URI:

<id>/data/...    the files fetched so far, each put there by one rename after its SHA-256 was checked
<id>/part/...    downloads under way
<id>.lock        held shared by every process that uses the artifact, until it ends; its time tells the last use
<id>.fetch       held by the process that downloads a file of it
count            how much all of it is, see `store_room`

What is in use is never dropped: files are mapped, and a rank may open its own long after its launcher has looked.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import shutil
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from modelmill.components.core import events, s3
from modelmill.components.core.errors import UserError
from modelmill.components.core.home import Home
from modelmill.components.core.store_room import Room
from modelmill.components.core.uri import split_s3
from modelmill.components.core.verified import file_digest, problem_of, remember

CACHE_VARIABLE = "MODELMILL_CACHE"  # folder of the cache, such as a node's own disk
LIMIT_VARIABLE = "MODELMILL_CACHE_GB"  # what it may hold beside what is in use
ENDPOINT_VARIABLE = "MODELMILL_STORE_ENDPOINT"  # of an S3-compatible store; else AWS, or what AWS's variables name
_LAUNCHER_VARIABLE = "MODELMILL_LAUNCHER"  # set where a step starts training processes on other machines
_DEFAULT_GB = 100.0
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
logger = logging.getLogger("modelmill")
_guard = threading.Lock()
_held: dict[str, IO[Any]] = {}  # entries that this process uses


@dataclass(frozen=True)
class RemoteFile:
    """One file of an artifact in S3: its path below the artifact's URI, its size and SHA-256."""

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Cache:
    """A folder of copies with a limit in bytes."""

    root: Path
    limit: int

    @classmethod
    def current(cls) -> Cache:
        """The cache of this process's environment.

        A step that starts training elsewhere hands folders on by path, so its copies lie in the home, which the
        training's pods mount too.

        Raises:
            UserError: the limit is no positive number.
        """
        home = Home.current().root / "cache"
        own = os.environ.get(CACHE_VARIABLE)
        root = Path(own).absolute() if own and not os.environ.get(_LAUNCHER_VARIABLE) else home
        text = os.environ.get(LIMIT_VARIABLE) or str(_DEFAULT_GB)
        try:
            limit = float(text)
        except ValueError:
            limit = -1.0
        if not 0 < limit < float("inf"):
            raise UserError(f"{LIMIT_VARIABLE}: {text!r} is no positive number of gigabytes; write 100, or unset it")
        return cls(root, int(limit * 1e9))

    def folder(self, uri: str) -> Path:
        """Where the files of an artifact lie once they are fetched."""
        return self._entry(uri) / "data"

    def fetch(self, uri: str, file: RemoteFile, kind: str) -> Path:
        """A file of an artifact, downloaded unless it is here.

        Args:
            uri: of the artifact, `s3://...`.
            file: what the manifest says of it.
            kind: of the artifact, for messages.

        Raises:
            UserError: it cannot be had, is not what was written, or the disk is full.
        """
        target = self.folder(uri) / file.path
        with self._disk(uri):
            self._hold(uri)
            if problem_of(target, file.bytes, file.sha256):
                with self._lock(uri, "fetch"):
                    if problem_of(target, file.bytes, file.sha256):  # another process may have been first
                        self._download(uri, file, target, kind)
        return target

    def adopt(self, uri: str, folder: Path, files: Iterable[RemoteFile]) -> None:
        """Take the folder of an artifact that was just uploaded as its copy, so that nobody here downloads it.

        Args:
            uri: where it was uploaded to.
            folder: its files; gone afterwards.
            files: their digests, taken when the manifest was made.
        """
        target, copies = self.folder(uri), list(files)
        try:
            self._hold(uri)
            with self._lock(uri, "fetch"):
                if not target.exists():
                    with self._room.reserved(target.parent, sum(file.bytes for file in copies), needed=0) as part:
                        _move(folder, target, part / "data")
                    for file in copies:
                        remember(target / file.path, file.sha256)
        except OSError as error:  # it is safe in S3; whoever needs it here fetches it
            logger.warning("%s is not kept in %s (%s)", uri, self.root, error)
        shutil.rmtree(folder, ignore_errors=True)

    @property
    def _room(self) -> Room:
        return Room(self.root, self.limit)

    def _entry(self, uri: str) -> Path:
        return self.root / hashlib.sha256(uri.encode()).hexdigest()[:32]

    @contextmanager
    def _lock(self, uri: str, kind: str) -> Iterator[None]:
        with self._entry(uri).with_suffix(f".{kind}").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _hold(self, uri: str) -> None:
        """Keep an artifact in the cache until this process ends, and note the time."""
        path = self._entry(uri).with_suffix(".lock")
        with _guard:
            if str(path) not in _held:
                path.parent.mkdir(parents=True, exist_ok=True)
                lock = path.open("a")
                fcntl.flock(lock, fcntl.LOCK_SH)
                _held[str(path)] = lock
        with suppress(OSError):
            os.utime(path)

    @contextmanager
    def _disk(self, uri: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            problem = "the disk is full" if error.errno in _FULL else error.strerror or str(error)
            raise UserError(
                f"{CACHE_VARIABLE}: {uri} cannot be kept in {self.root}: {problem}; free space there, or set"
                f" {CACHE_VARIABLE} to a folder on another disk"
            ) from None

    def _download(self, uri: str, file: RemoteFile, target: Path, kind: str) -> None:
        name, endpoint = f"{uri}/{file.path}", os.environ.get(ENDPOINT_VARIABLE) or None
        bucket, key = split_s3(name, parameter=kind)
        with self._room.reserved(self._entry(uri), file.bytes, needed=file.bytes) as folder:
            if file.bytes > 100_000_000:
                events.progress(f"fetching {file.path} ({file.bytes / 1e9:.1f} GB)")
            part, client = folder / file.sha256, s3.s3_client(endpoint, kind)
            with s3.explained(name, endpoint, kind):
                s3.download(client, bucket, key, part)
            _refuse_other_bytes(part, file, name, kind)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(part, target)
        remember(target, file.sha256)


def release() -> None:
    """Let go of everything this process uses: for a process that goes on for long, such as a notebook's."""
    with _guard:
        for lock in _held.values():
            lock.close()
        _held.clear()


def _refuse_other_bytes(part: Path, file: RemoteFile, name: str, kind: str) -> None:
    mend = "delete the manifest.json of its key in the store and run again"
    found = part.stat().st_size
    if found != file.bytes:
        raise UserError(f"{kind}: {name} has {found} bytes, {file.bytes} were written; {mend}")
    if (digest := file_digest(part)) != file.sha256:
        raise UserError(
            f"{kind}: {name} holds other bytes than were written (SHA-256 {digest[:16]}, not {file.sha256[:16]});"
            f" {mend}"
        )


def _move(folder: Path, target: Path, part: Path) -> None:
    """Rename a folder, or copy it to `part` first where that lies on another disk."""
    try:
        os.rename(folder, target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        shutil.copytree(folder, part)
        os.rename(part, target)
