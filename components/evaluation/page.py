"""What reports of generations and gates share: the page of the held-out report, and tables as HTML and Markdown."""

from __future__ import annotations

import re
from collections.abc import Sequence

from modelmill.components.evaluation.report import _STYLE, _text

text = _text
_MARKUP = re.compile(r"([\\`*_{}\[\]<>#|~])")


def page(title: str, parts: Sequence[str]) -> str:
    """One HTML file that needs nothing else.

    Args:
        title: plain text, of the page and its first heading.
        parts: markup, one after the other.
    """
    head = f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{text(title)}</title>'
    body = "\n".join([f"<h1>{text(title)}</h1>", *parts])
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n{head}\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def html_table(head: Sequence[str], rows: Sequence[Sequence[str]], kinds: Sequence[str] = ()) -> str:
    """A table of plain text.

    Args:
        head: of the columns.
        rows: cells, as many in each row as in `head`.
        kinds: `better`, `worse` or nothing for each row; colours its last cell.
    """
    top = "".join(f"<th>{text(cell)}</th>" for cell in head)
    body = []
    for number, row in enumerate(rows):
        kind = f' class="{kinds[number]}"' if kinds and kinds[number] else ""
        cells = [f"<td>{text(cell)}</td>" for cell in row[:-1]] + [f"<td{kind}>{text(row[-1])}</td>"]
        body.append(f"<tr>{''.join(cells)}</tr>")
    return f"<div class=scroll><table><thead><tr>{top}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The same table as Markdown, the first column to the left, numbers to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    escaped = [
        [cell if number == 1 else _MARKUP.sub(r"\\\1", cell) for cell in row] for number, row in enumerate(lines)
    ]
    return "".join(f"| {' | '.join(row)} |\n" for row in escaped)
