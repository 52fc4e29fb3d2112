"""What the commands share on the terminal: tables, JSON, numbers, and how to name the command itself."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON document for programs to read.")
of_anybody = click.option(
    "--profile", metavar="PROFILE", help="RUN is KFP's id of a run on this cluster, whoever started it."
)


def print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=1, default=str))


def print_table(rows: Sequence[Sequence[str]], *, indent: int = 0) -> None:
    """Columns padded to their widest cell; the last one is left as it is."""
    if not rows:
        return
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row[:-1], widths, strict=False)]
        click.echo((" " * indent + "  ".join([*cells, row[-1]])).rstrip())


def program() -> str:
    """The command as the user can type it again: `modelmill` when that is what the shell would find."""
    called = Path(sys.argv[0])
    found = shutil.which("modelmill")
    if called.name != "modelmill" or (found and os.path.realpath(found) == os.path.realpath(called)):
        return "modelmill"
    return os.path.relpath(called) if called.is_relative_to(Path.cwd()) else str(called)


def number(value: float) -> str:
    """Four significant digits, large ones with a unit: `3.812`, `0.0003`, `8.03 G`."""
    if isinstance(value, int) and abs(value) < 10_000:
        return str(value)
    for size, unit in ((1e21, " Z"), (1e18, " E"), (1e15, " P"), (1e12, " T"), (1e9, " G"), (1e6, " M"), (1e4, " k")):
        if abs(value) >= size:
            scale = 1e3 if unit == " k" else size
            return f"{value / scale:.4g}{unit}"
    return f"{value:.4g}"


def gibibytes(size: float) -> str:
    return f"{size / 2**30:.3g} GiB" if size >= 2**30 else f"{size / 2**20:.3g} MiB"
