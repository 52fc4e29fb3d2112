"""The two ways a step can go wrong, kept apart because they deserve different treatment."""

from __future__ import annotations

import errno
import os
from pathlib import Path


class UserError(Exception):
    """Something the user can mend: one line naming the parameter, its value and the fix.

    The command prints the line without a traceback and exits with code 2.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


_DISK_PROBLEMS = {
    errno.ENOSPC: "the disk is full; free space",
    errno.EFBIG: "the limit on the size of a file (ulimit -f) is reached; raise it",
    errno.EDQUOT: "the disk quota is used up; free space",
    errno.EROFS: "the file system is read-only; choose a writable folder",
    errno.EACCES: "permission denied; choose a folder you may write to",
    errno.ENOTDIR: "a part of the path is a file; choose another folder",
    errno.EPERM: "operation not permitted; choose a folder you may write to",
}


def disk_error(error: OSError, folder: Path) -> UserError | None:
    """Translate a disk's refusal into a `UserError`, or None when the cause is something else.

    Args:
        error: what the operating system said.
        folder: where modelmill was writing; a path outside it is the user's own and is named instead.
    """
    problem = _DISK_PROBLEMS.get(error.errno or 0)
    if problem is None:
        return None
    place = os.fspath(error.filename) if isinstance(error.filename, (str, os.PathLike)) else None
    if place is not None and not Path(place).absolute().is_relative_to(folder.absolute()):
        return UserError(f"{place}: cannot be used: {problem}")
    return UserError(f"MODELMILL_HOME: cannot write {place or folder}: {problem} or set MODELMILL_HOME")
