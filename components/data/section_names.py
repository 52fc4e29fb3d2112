"""Errors of one section's readers, told under the name that the user wrote."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from modelmill.components.core.errors import UserError


@contextmanager
def told_as(name: str, *, instead_of: str) -> Iterator[None]:
    """Have a `UserError` that begins with one parameter's name begin with another's.

    Sections that share readers differ in what a recipe calls them: the sources of `preferences` are read by the
    functions of `instructions`.

    Args:
        name: how the recipe calls it.
        instead_of: how the functions inside call it.

    Raises:
        UserError: theirs, renamed.
    """
    try:
        yield
    except UserError as error:
        text = str(error)
        if not text.startswith((f"{instead_of}.", f"{instead_of}:")):
            raise
        raise UserError(name + text.removeprefix(instead_of)) from None
