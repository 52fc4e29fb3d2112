"""Room in the cache: what it holds is counted beside it, so that a file can be added without a look at the rest.

`count` in the cache's folder, locked by whoever changes it, is what all processes have put there and are about to. One
that is killed leaves it too high, never too low. The cache is measured when the count says that it is full, when there
is none, and once a day, which makes it right again.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

_COUNT = "count"
_WIDTH = 19  # digits of each number: the record never changes its length, so one write replaces it
_DAY = 86_400
_SPARE = 64 << 20  # bytes of the disk that stay free


@dataclass
class _Count:
    """Bytes in the cache, those at which it is worth looking for room again, and when it was last measured."""

    used: int = 0
    patience: int = 0
    measured: int = 0

    @classmethod
    def parse(cls, text: bytes) -> _Count:
        parts = text.split()
        whole = len(parts) == 3 and all(len(part) == _WIDTH and part.isdigit() for part in parts)
        return cls(*(int(part) for part in parts)) if whole else cls()

    def text(self) -> bytes:
        return b" ".join(b"%0*d" % (_WIDTH, number) for number in (self.used, self.patience, self.measured)) + b"\n"

    def is_old(self) -> bool:
        return not 0 <= time.time() - self.measured < _DAY


@dataclass(frozen=True)
class Room:
    """The room of a cache: folder `root`, at most `limit` bytes beside what is in use.

    Every artifact is a folder of `root` with its files in `data/` and, while a process makes one, in `part/<bytes>/`;
    the lock beside it, `<artifact>.lock`, is held shared by who uses it, and its time tells the last use.
    """

    root: Path
    limit: int

    @contextmanager
    def reserved(self, entry: Path, size: int, needed: int) -> Iterator[Path]:
        """A folder to make a file in; its bytes count from now on, and no longer when what is inside fails.

        Args:
            entry: folder of the artifact, whose only writer the caller is.
            size: bytes that come into the cache.
            needed: bytes of them that the disk does not hold yet.

        Raises:
            OSError: they do not fit on the disk.
        """
        part = entry / "part" / str(size)
        shutil.rmtree(part.parent, ignore_errors=True)  # of a process that was killed
        self.root.mkdir(parents=True, exist_ok=True)
        with self._counted() as count:
            self._make(count, size, needed)
            part.mkdir(parents=True)  # for who measures before the file is whole
            count.used += size
        try:
            yield part
        except BaseException:
            with self._counted() as count:
                shutil.rmtree(part.parent, ignore_errors=True)
                count.used = max(0, count.used - size)
            raise
        shutil.rmtree(part.parent, ignore_errors=True)

    @contextmanager
    def _counted(self) -> Iterator[_Count]:
        """The count, ours alone until the end of the block, which may change it."""
        descriptor = os.open(self.root / _COUNT, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            count = _Count.parse(os.pread(descriptor, 4096, 0))
            try:
                yield count
            finally:
                os.ftruncate(descriptor, os.pwrite(descriptor, count.text(), 0))
        finally:
            os.close(descriptor)

    def _make(self, count: _Count, size: int, needed: int) -> None:
        """Drop what was used longest ago and is not in use, until `size` more bytes fit in the limit and on the disk.

        The limit gives way where everything is in use; the disk cannot. A tenth more than necessary goes, and a limit
        that gave way is tried again after a twentieth more: measuring takes long, so it must not come with every file.
        """
        short = needed + _SPARE - shutil.disk_usage(self.root).free
        if not count.is_old() and count.used + size <= max(self.limit, count.patience) and short <= 0:
            return
        entries = [Path(found.path) for found in os.scandir(self.root) if found.is_dir(follow_symlinks=False)]
        sizes = {entry: _size(entry) for entry in entries}
        count.used, count.measured = sum(sizes.values()), int(time.time())
        excess = max(count.used + size - self.limit, short)
        excess += count.used // 10 if excess > 0 else 0
        for entry in sorted(entries, key=_last_use):
            if excess <= 0:
                break
            if _drop(entry):
                excess -= sizes[entry]
                count.used -= sizes[entry]
        count.patience = count.used + size + self.limit // 20 if count.used + size > self.limit else 0
        if needed > (free := shutil.disk_usage(self.root).free):
            raise OSError(errno.ENOSPC, f"{free / 1e9:.2f} GB are free, {needed / 1e9:.2f} GB are needed")


def _size(entry: Path) -> int:
    """Bytes of an artifact. What moves from `part` to `data` meanwhile counts twice rather than not at all."""
    total = 0
    with suppress(OSError):
        total += sum(int(name) for name in os.listdir(entry / "part") if name.isdigit())
    for folder, _, names in os.walk(entry / "data"):
        for name in names:
            with suppress(OSError):  # another process drops it
                total += os.lstat(os.path.join(folder, name)).st_size
    return total


def _last_use(entry: Path) -> float:
    try:
        return entry.with_suffix(".lock").stat().st_mtime
    except OSError:
        return 0.0


def _drop(entry: Path) -> bool:
    """Remove an artifact that nobody uses."""
    with entry.with_suffix(".lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        shutil.rmtree(entry, ignore_errors=True)
        return True
