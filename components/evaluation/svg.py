"""Figures as SVG text that is the same for the same numbers, in the font and colour of the page around them."""

from __future__ import annotations

import io
from typing import Any

from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

INK = "#123456"  # a colour that occurs nowhere else, replaced by the page's own text colour
STYLE: Any = {
    "svg.hashsalt": "modelmill",
    "svg.fonttype": "none",  # real text: smaller, searchable, and in the page's font
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": INK,
    "grid.alpha": 0.12,
    "lines.linewidth": 1.6,
    "legend.frameon": False,
}


def svg(figure: Figure, title: str) -> str:
    """The figure without prologue, date or fixed size, in the colour of the text around it."""
    buffer = io.StringIO()
    FigureCanvasSVG(figure).print_svg(buffer, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = buffer.getvalue()
    head, _, body = text[text.index("<svg") :].partition(">")
    start = head.index('viewBox="')
    box = head[start : head.index('"', start + len('viewBox="')) + 1]
    tag = f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" {box}'
    return f'{tag} role="img" aria-label="{title}">{body.replace(INK, "currentColor").rstrip()}'
