"""The plot of the attention benchmark: operations a second and memory over the length of a row."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

_PANEL = (4.2, 2.8)  # inches
_COLUMNS = (("forward_backward_tflops", "TFLOP/s, forward and backward", 1.0), ("peak_bytes", "peak MiB", 2.0**20))
_SHAPE = ("dtype", "head_dim", "num_heads", "kv_heads", "document_length")
_STYLE: Any = {
    "svg.hashsalt": "modelmill",
    "svg.fonttype": "none",
    "axes.grid": True,
    "grid.alpha": 0.2,
    "font.size": 9,
}


def plot(measured: Sequence[dict[str, Any]], device: str) -> str:
    """Draw the records of `attention_measures.measure` that have figures.

    Args:
        measured: at least one record.
        device: named in the title.

    Returns:
        An SVG document.
    """
    shapes = list(dict.fromkeys(tuple(record[name] for name in _SHAPE) for record in measured))
    kernels = list(dict.fromkeys(record["kernel"] for record in measured))
    with mpl.rc_context(_STYLE):
        size = (_PANEL[0] * len(_COLUMNS), _PANEL[1] * len(shapes) + 0.6)
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.subplots(len(shapes), len(_COLUMNS), squeeze=False, sharex="col")
        for row, shape in zip(grid, shapes, strict=True):
            own = [record for record in measured if tuple(record[name] for name in _SHAPE) == shape]
            for axes, (column, label, unit) in zip(row, _COLUMNS, strict=True):
                for number, kernel in enumerate(kernels):
                    points = [(r["sequence_length"], r[column] / unit) for r in own if r["kernel"] == kernel]
                    if points:
                        axes.plot(
                            *zip(*points, strict=True), color=f"C{number}", marker="o", markersize=4, label=kernel
                        )
                axes.set(xscale="log", ylabel=label, title=_title(shape), ylim=(0, None))
                axes.set_xscale("log", base=2)
                axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        for axes in grid[-1]:
            axes.set_xlabel("positions of a row")
        handles, labels = grid[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=len(kernels), title=f"attention on {device}")
        buffer = io.StringIO()
        FigureCanvasSVG(figure).print_svg(buffer, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return buffer.getvalue()


def _title(shape: tuple[Any, ...]) -> str:
    dtype, head_dim, num_heads, kv_heads, document = shape
    return f"{dtype}, {num_heads}/{kv_heads} heads of {head_dim}" + (f", documents of {document}" if document else "")
