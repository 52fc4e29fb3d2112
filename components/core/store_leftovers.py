"""What the store holds and nothing names: files of replaced outputs, of uploads and of steps that never ended.

An output in S3 is what its `manifest.json` names (see `store`). Beside it lie files of outputs that it took the place
of, which a run may still read, and of uploads without a manifest, which may still go on. In the home an unfinished
folder is left by a step that was killed or that can go on from its checkpoints. All of them are told from what is in
use by their age, and by the lock that a step holds while it makes an output.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from modelmill.components.core import s3
from modelmill.components.core.errors import UserError
from modelmill.components.core.home import HOME_VARIABLE
from modelmill.components.core.manifest import Manifest
from modelmill.components.core.store import STORE_VARIABLE, S3Store

_OBJECT = re.compile(r"(?P<step>[^/]+)/(?P<key>[0-9a-f]{24})/(?:(?P<digest>[0-9a-f]{16})/.+|manifest\.json)")


@dataclass(frozen=True)
class Leftover:
    """Files that nothing names, `since` a time in POSIX seconds; they go together."""

    place: str
    reason: str
    files: int
    bytes: int
    since: float


@dataclass(frozen=True)
class Kept:
    """What might be a leftover and is not touched, and why."""

    place: str
    reason: str


def in_s3(store: S3Store, before: float, *, delete: bool) -> Iterator[Leftover | Kept]:
    """Files in S3 that no manifest names.

    Objects that are not laid out as the store does it are not its own, and left alone.

    Args:
        store: where to look.
        before: POSIX seconds; what was written, or replaced, later is left alone. A run that began before this time
            must not be under way any more.
        delete: whether what is found is deleted, each before it is yielded.

    Raises:
        UserError: S3 cannot be asked, or refuses to delete.
    """
    for (step, key), has_manifest in _suspects(store, before):
        place = f"{store.uri}/{step}/{key}"
        with _unused(store.folder / step, key) as unused:
            if not unused:
                yield Kept(place, "a step is making it")
                continue
            # Read before it is listed: a manifest that is replaced in between is younger than `before`.
            named: set[str] = set()
            if has_manifest:
                try:
                    named = _named(store.read(f"{step}/{key}/manifest.json"), f"{place}/manifest.json")
                except _Unreadable as problem:
                    yield Kept(place, str(problem))
                    continue
            yield from _unnamed(store, place, named, before, delete)


def in_home(folder: Path, before: float, *, delete: bool) -> Iterator[Leftover | Kept]:
    """Unfinished folders of steps in a home's folder of outputs, with the checkpoints that they hold.

    Args:
        folder: `<home>/store`.
        before: POSIX seconds; a folder with anything that was written later is left alone.
        delete: whether what is found is deleted, each before it is yielded.

    Raises:
        UserError: the folder may not be changed.
    """
    for path in sorted(folder.glob("*/*.partial")):
        with _unused(path.parent, path.stem) as unused:
            if not unused:
                yield Kept(str(path), "a step is making it")
                continue
            found = _folder(path) if path.is_dir() else None  # a step may have published it a moment ago
            if found is None or found.since >= before:
                continue
            if delete:
                try:
                    shutil.rmtree(path)
                except OSError as error:
                    raise _no_access(path, error) from None
            yield found


class _Unreadable(Exception):
    """A manifest does not say what it names."""


def _suspects(store: S3Store, before: float) -> Iterator[tuple[tuple[str, str], bool]]:
    """Step and key of outputs with more in them than one manifest names, and whether they have a manifest."""
    start = len(store.prefix)

    def parts(entry: s3.DatedObject) -> tuple[str, str]:
        match = _OBJECT.fullmatch(entry.key[start:])
        return (match["step"], match["key"]) if match else ("", "")

    # With the last slash: a role may be allowed to list what is below a prefix only.
    listed = s3.iter_objects(f"s3://{store.bucket}/{store.prefix}", store.endpoint_url, STORE_VARIABLE)
    for output, entries in groupby(listed, parts):
        newest: dict[str, float] = {}
        for entry in entries:
            name = entry.key[start:].split("/")[2] if output[0] else ""
            newest[name] = max(newest.get(name, 0.0), entry.modified)
        named = newest.pop("manifest.json", None) is not None
        if output[0] and len(newest) > named and min(newest.values()) < before:
            yield output, named


def _named(text: bytes, place: str) -> set[str]:
    """Names of the folders that a manifest's files may lie in: by its content, and by its address."""
    try:
        manifest = Manifest.parse(text, place)
    except UserError as error:
        raise _Unreadable(f"its manifest cannot be read ({error})") from None
    return {manifest.digest[:16], *manifest.uri.split("/")[-2:-1]}


def _unnamed(store: S3Store, place: str, named: set[str], before: float, delete: bool) -> Iterator[Leftover | Kept]:
    folders: dict[str, list[s3.DatedObject]] = {}
    committed = 0.0
    for entry in s3.iter_objects(f"{place}/", store.endpoint_url, STORE_VARIABLE):
        match = _OBJECT.fullmatch(entry.key[len(store.prefix) :])
        if match and match["digest"]:
            folders.setdefault(match["digest"], []).append(entry)
        elif match:
            committed = entry.modified
    if committed and not named & folders.keys():
        yield Kept(place, "the files that its manifest names are gone" if named else "it has just been finished")
        return
    for name, entries in sorted(folders.items()):
        # An upload goes on while one of its files is young; an output was in use until another took its place.
        since = max(committed, *(entry.modified for entry in entries))
        if name in named or since >= before:
            continue
        if delete:
            s3.delete_objects(store.bucket, [entry.key for entry in entries], store.endpoint_url, STORE_VARIABLE)
        reason = "replaced" if committed else "without a manifest"
        yield Leftover(f"{place}/{name}", reason, len(entries), sum(entry.size for entry in entries), since)


@contextmanager
def _unused(folder: Path, key: str) -> Iterator[bool]:
    """Hold the lock of an output, so that no step of this home makes it meanwhile; False where one does now.

    Args:
        folder: of the step in the home; where there is none, no step of this home has made anything.
        key: of the output.
    """
    if not folder.is_dir():
        yield True
        return
    try:
        lock = (folder / f"{key}.lock").open("a")
    except OSError as error:
        raise _no_access(folder / f"{key}.lock", error) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def _folder(path: Path) -> Leftover:
    files, size, newest = 0, 0, path.stat().st_mtime
    for parent, folders, names in os.walk(path):
        for name in (*folders, *names):
            with suppress(FileNotFoundError):  # a training job whose launcher is gone may still save
                status = os.lstat(os.path.join(parent, name))
                newest = max(newest, status.st_mtime)
                if name in names:
                    files, size = files + 1, size + status.st_size
    return Leftover(str(path), "unfinished", files, size, newest)


def _no_access(path: Path, error: OSError) -> UserError:
    return UserError(
        f"{HOME_VARIABLE}: {path} cannot be changed ({error.strerror}); run this as the user of the steps"
    )
