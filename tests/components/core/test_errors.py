"""One line for the user, and disk problems named after whose folder it is."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from modelmill.components.core.errors import UserError, disk_error


def test_message_is_one_line() -> None:
    assert str(UserError("training.steps: 0\n  is too small;\tuse 1")) == "training.steps: 0 is too small; use 1"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM])
def test_a_full_or_closed_disk_names_the_home(number: int, tmp_path: Path) -> None:
    inside = disk_error(OSError(number, "x", str(tmp_path / "store" / "file")), tmp_path)
    assert inside is not None
    assert str(inside).startswith(f"MODELMILL_HOME: cannot write {tmp_path}/store/file: ")
    assert "set MODELMILL_HOME" in str(inside)
    nameless = disk_error(OSError(number, "x"), tmp_path)
    assert nameless is not None
    assert str(tmp_path) in str(nameless)


def test_a_file_of_the_users_is_not_blamed_on_the_home(tmp_path: Path) -> None:
    error = disk_error(PermissionError(errno.EACCES, "x", "/data/corpus.txt"), tmp_path)
    assert error is not None
    assert str(error).startswith("/data/corpus.txt: cannot be used: permission denied")
    assert "MODELMILL_HOME" not in str(error)


def test_other_failures_are_no_users_mistake(tmp_path: Path) -> None:
    assert disk_error(OSError(errno.EIO, "x"), tmp_path) is None
    assert disk_error(OSError("no number"), tmp_path) is None
    assert disk_error(OSError(errno.ENOSPC, "x", 7), tmp_path) is not None
