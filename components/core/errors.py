"""The two ways a step can go wrong, kept apart because they deserve different treatment."""

from __future__ import annotations

import errno
from pathlib import Path


class UserError(Exception):
    """Something the user can mend: one line naming the parameter, its value and the fix.

    The command prints the line without a traceback and exits with code 2.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


_DISK_PROBLEMS = {
    errno.ENOSPC: "the disk is full; free space",
    errno.EDQUOT: "the disk quota is used up; free space",
    errno.EROFS: "the file system is read-only; choose a writable folder",
    errno.EACCES: "permission denied; choose a folder you may write to",
    errno.EPERM: "operation not permitted; choose a folder you may write to",
}


def disk_error(error: OSError, folder: Path) -> UserError | None:
    """Translate a failed write into a `UserError`, or None when the cause is something else."""
    problem = _DISK_PROBLEMS.get(error.errno or 0)
    if problem is None:
        return None
    return UserError(f"MODELMILL_HOME: cannot write {error.filename or folder}: {problem} or set MODELMILL_HOME")
