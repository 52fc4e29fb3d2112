"""`modelmill prune`: delete what the store holds and nothing names."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from modelmill.pipelines.commands.console import as_json, gibibytes, print_json

if TYPE_CHECKING:
    from modelmill.components.core.store_leftovers import Kept, Leftover

_DAY = 86_400
_UNITS = {"d": _DAY, "w": 7 * _DAY}
_EXAMPLES = """\b
Examples:
  modelmill prune
  modelmill prune --profile team-p5 --older-than 8w
  modelmill prune --older-than 60d --yes
"""


class _Age(click.ParamType):
    """Days or weeks, at least one day, as seconds."""

    name = "age"

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        found = re.fullmatch(r"(\d{1,5})([dw])", str(value).strip())
        if found is None or (seconds := int(found[1]) * _UNITS[found[2]]) < _DAY:
            self.fail(f"{value!r} is no age of at least one day; write 30d or 8w", parameter, context)
        return seconds


@click.command("prune", epilog=_EXAMPLES)
@click.option(
    "--older-than",
    type=_Age(),
    default="30d",
    show_default=True,
    metavar="AGE",
    help="Leave alone what was written or replaced since; more than the longest upload and the longest run take.",
)
@click.option("--profile", metavar="PROFILE", help="Look into the store of this profile, not into $MODELMILL_STORE.")
@click.option("--yes", is_flag=True, help="Delete; without it they are only shown.")
@as_json
def prune_command(older_than: int, profile: str | None, yes: bool, as_json: bool) -> None:
    """Show or delete what the store holds and nothing names.

    In S3 these are the files of outputs that were replaced, and of uploads that never ended; in the home the
    unfinished folders of steps, with the checkpoints that `modelmill resume` would go on from. What a step is
    making, and an output whose manifest cannot be read, stay.
    """
    from modelmill.components.core.store_leftovers import Leftover

    now = time.time()
    found: list[Leftover | Kept] = []
    for each in _find(profile, now - older_than, yes):
        found.append(each)
        if not as_json:
            click.echo(_line(each, now))
    left = [each for each in found if isinstance(each, Leftover)]
    files, size = sum(each.files for each in left), sum(each.bytes for each in left)
    if as_json:
        kept = [vars(each) for each in found if not isinstance(each, Leftover)]
        total = {"deleted": yes, "files": files, "bytes": size}
        print_json({**total, "leftovers": [vars(each) for each in left], "kept": kept})
    elif not left:
        click.echo(f"nothing to delete is older than {older_than // _DAY} days")
    else:
        click.echo(f"{files} files, {_size(size)}: " + ("deleted" if yes else "--yes deletes them"))


def _find(profile: str | None, before: float, delete: bool) -> Iterator[Leftover | Kept]:
    from modelmill.components.core.errors import UserError
    from modelmill.components.core.home import Home
    from modelmill.components.core.store import S3Store, open_store
    from modelmill.components.core.store_leftovers import in_home, in_s3

    folder, uri = Home.current().store, None
    if profile is not None:
        from modelmill.pipelines.platform import load_profile

        uri = load_profile(profile).store
        if uri is None:
            raise UserError(f"--profile: {profile} keeps outputs in its home; run this where that is mounted")
    store = open_store(folder, uri)
    if isinstance(store, S3Store):
        yield from in_s3(store, before, delete=delete)
    yield from in_home(folder, before, delete=delete)


def _line(found: Leftover | Kept, now: float) -> str:
    from modelmill.components.core.store_leftovers import Kept

    if isinstance(found, Kept):
        return f"{found.place}  stays: {found.reason}"
    age = f"{(now - found.since) / _DAY:.0f} days"
    return f"{found.place}  {found.files} files, {_size(found.bytes)}, {found.reason}, {age} old"


def _size(size: int) -> str:
    return gibibytes(size) if size >= 1 << 20 else f"{size} bytes"
