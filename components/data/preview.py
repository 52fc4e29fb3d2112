"""What the model sees of instruction data: the tokens of some conversations, with those it does not learn marked."""

from __future__ import annotations

import html
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from modelmill.components.data.instruction_rows import InstructionRows

logger = logging.getLogger("modelmill")
_MASKED, _LEARNT = "masked", "learnt"
_STYLE = """\
body { font-family: ui-monospace, monospace; max-width: 60rem; margin: 2rem auto; line-height: 1.6; }
h2, p { font-family: system-ui, sans-serif; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; border: 1px solid #ccc; border-radius: 6px; padding: 0.8rem; }
span { border-radius: 2px; box-shadow: inset 1px 0 #0002; }
.masked { color: #888; }
.learnt { background: #c8efd0; color: #053; }
"""


@dataclass(frozen=True)
class Shown:
    """A conversation as it stands in its row.

    Attributes:
        title: which one it is.
        tokens: (id, text, whether it is learnt) of each token.
    """

    title: str
    tokens: tuple[tuple[int, str, bool], ...]

    def runs(self) -> list[tuple[str, bool]]:
        """Neighbouring tokens of one kind put together."""
        runs: list[tuple[str, bool]] = []
        for _, text, learnt in self.tokens:
            if runs and runs[-1][1] == learnt:
                runs[-1] = (runs[-1][0] + text, learnt)
            else:
                runs.append((text, learnt))
        return runs


def show(rows: InstructionRows, name: str, count: int, decode: Callable[[list[int]], str]) -> list[Shown]:
    """The first conversations of a split, read back from the packed rows.

    Args:
        rows: the split.
        name: of the split.
        count: conversations to show at most.
        decode: text of some ids, special tokens included.
    """
    shown = []
    for number, (row, start, size, targets) in enumerate(rows.places[:count].tolist(), 1):
        ids = np.asarray(rows.tokens[row, start : start + size]).tolist()
        mask = np.asarray(rows.loss_mask[row, start : start + size]).astype(bool).tolist()
        place = f"row {row}, positions {start} to {start + size - 1}"
        title = f"{name}, conversation {number}: {size} tokens, {targets} of them learnt ({place})"
        shown.append(Shown(title, tuple(zip(ids, _texts(ids, decode), mask, strict=True))))
    return shown


def _texts(ids: Sequence[int], decode: Callable[[list[int]], str]) -> list[str]:
    """Text of each token within its context: what the text grows by when it is added.

    A character that takes several tokens stands at the last of them; blanks that a decoder leaves out at the
    beginning of a text are kept.
    """
    texts, whole, first = [], "", 0
    for number in range(1, len(ids) + 1):
        grown = decode(list(ids[first:number]))
        if grown.endswith("\ufffd") and number < len(ids):
            texts.append("")
            continue
        texts.append(grown[len(whole) :])
        # Decoding on from the token before keeps the work linear, and what precedes a token may change its text.
        first, whole = number - 1, decode([ids[number - 1]])
    return texts


def write_preview(shown: Sequence[Shown], folder: Path) -> None:
    """Write `preview.txt` and `preview.html`."""
    lines = [f"Tokens that are learnt are marked {_LEARNT}; the loss passes over those marked {_MASKED}.", ""]
    for conversation in shown:
        lines += [conversation.title, *_marked(conversation), ""]
    (folder / "preview.txt").write_text("\n".join(lines), encoding="utf-8")
    (folder / "preview.html").write_text(_page(shown), encoding="utf-8")


def _marked(conversation: Shown) -> list[str]:
    """One line of output for each line of text, with its mark; line ends are shown where they are."""
    return [
        f"  {_LEARNT if learnt else _MASKED} | {line.replace(chr(10), chr(0x21B5))}"
        for text, learnt in conversation.runs()
        for line in text.splitlines(keepends=True)
    ]


def _page(shown: Sequence[Shown]) -> str:
    parts = [
        '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>Instruction data</title>\n'
        f"<style>{_STYLE}</style>\n"
        f'<p>What the model sees. <span class="{_LEARNT}">These tokens</span> are learnt, '
        f'<span class="{_MASKED}">these</span> are masked; each token shows its id.</p>'
    ]
    for conversation in shown:
        spans = [
            f'<span class="{_LEARNT if learnt else _MASKED}" title="{number}">{html.escape(text)}</span>'
            for number, text, learnt in conversation.tokens
        ]
        parts.append(f"<h2>{html.escape(conversation.title)}</h2>\n<pre>{''.join(spans)}</pre>")
    return "\n".join(parts) + "\n</html>\n"


def report(shown: Sequence[Shown]) -> None:
    """Say it in the log, or in colours where someone looks at a terminal."""
    from rich.console import Console
    from rich.text import Text

    console = Console(file=sys.stderr)
    for conversation in shown:
        if console.is_terminal:
            text = Text().append(f"{conversation.title}\n", style="bold")
            for part, learnt in conversation.runs():
                text.append(part, style="green" if learnt else "dim")
            console.print(text)
        else:
            logger.info("%s", conversation.title)
            for line in _marked(conversation):
                logger.info("%s", line)
