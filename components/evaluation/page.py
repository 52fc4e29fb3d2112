"""What every report shares: the page, text that cannot become markup, and tables as HTML and Markdown."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --good: #12803c; --bad: #c5221f; --flat: #9a6700; }
@media (prefers-color-scheme: dark) { :root { --good: #5bd48a; --bad: #ff8a80; --flat: #ffc766; } }
body { font: 16px/1.55 system-ui, sans-serif; max-width: 60rem; margin: 2.5rem auto; padding: 0 1.25rem; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; } h2 { font-size: 1.1rem; margin: 2.5rem 0 .75rem; }
p.note { opacity: .75; font-size: .875rem; margin: .5rem 0; max-width: 48rem; }
.verdict { border-left: .3rem solid; padding: .6rem 1rem; margin: 1.25rem 0; background: var(--soft);
  font-size: 1.1rem; }
.verdict.better { border-color: var(--good); } .verdict.worse { border-color: var(--bad); }
.verdict.unclear { border-color: var(--flat); }
.numbers { display: flex; flex-wrap: wrap; gap: .75rem; }
.numbers div { flex: 1 1 8.5rem; border: 1px solid var(--line); border-radius: .4rem; padding: .6rem .9rem; }
.numbers b { display: block; font-size: 1.5rem; font-variant-numeric: tabular-nums; }
.numbers span { opacity: .75; font-size: .85rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .925rem; }
th, td { text-align: right; padding: .4rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top; }
th:first-child, td:first-child { text-align: left; } thead th { font-weight: 600; }
table.facts td { text-align: left; overflow-wrap: anywhere; } table.facts td:first-child { white-space: nowrap; }
td.better { color: var(--good); } td.worse { color: var(--bad); }
svg { display: block; width: 100%; height: auto; margin: .5rem 0; }
figure { margin: 0 0 1.25rem; } figcaption { font-size: .875rem; opacity: .75; }
.sample { border: 1px solid var(--line); border-radius: .4rem; margin: 0 0 1rem; padding: .25rem 1rem .75rem; }
.sample h3 { font-size: .8rem; font-weight: 600; margin: .75rem 0 .2rem; opacity: .75; }
.text { font: .875rem/1.5 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; max-height: 15rem;
  overflow-y: auto; }
.text mark { background: #4c8bf533; color: inherit; border-radius: .2rem; }
code { font: .85em ui-monospace, monospace; }
"""
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_MARKUP = re.compile(r"([\\`*_{}\[\]<>#|~])")


def text(value: object) -> str:
    """Text that cannot become markup; control characters, which a small model does write, are made visible."""
    return html.escape(_CONTROL.sub("\N{REPLACEMENT CHARACTER}", str(value)))


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
