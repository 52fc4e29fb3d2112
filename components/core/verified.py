"""Whether a file is what was written: its size and SHA-256, hashed once for each state of the file."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from pathlib import Path

from modelmill.components.core.home import Home


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def problem_of(path: Path, size: int, sha256: str) -> str:
    """What is wrong with a file, or an empty string; remembers on disk which state of it was found good.

    Args:
        path: the file.
        size: bytes that were written.
        sha256: of those bytes, as hex.
    """
    try:
        found = path.stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        return "is missing"
    if found != size:
        return f"has {found} bytes, {size} were written"
    if _stamp(path, sha256).exists():
        return ""
    if file_digest(path) != sha256:
        return "is corrupt (its SHA-256 is not the manifest's)"
    remember(path, sha256)
    return ""


def remember(path: Path, sha256: str) -> None:
    """Note that this very file (inode, time, size) has that digest."""
    stamp = _stamp(path, sha256)
    with suppress(OSError):  # a read-only store only means hashing again
        stamp.parent.mkdir(parents=True, exist_ok=True)
        stamp.touch()


def _stamp(path: Path, sha256: str) -> Path:
    status = path.stat()
    identity = f"{path.absolute()}:{status.st_ino}:{status.st_mtime_ns}:{status.st_size}:{sha256}"
    return Home.current().store / ".verified" / hashlib.sha256(identity.encode()).hexdigest()
