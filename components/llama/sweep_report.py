"""The page of an activation sweep: speed against memory, and the table. One HTML file that needs nothing else."""

from __future__ import annotations

import html
import io
from collections.abc import Mapping, Sequence
from typing import Any

from modelmill.components.llama.sweep_config import ActivationSweepConfig

_MIB = 2**20
_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.55 system-ui, sans-serif; max-width: 60rem; margin: 2.5rem auto; padding: 0 1.25rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .925rem; }
th, td { text-align: right; padding: .4rem .6rem; border-bottom: 1px solid #8884; }
th:first-child, td:first-child { text-align: left; }
svg { display: block; width: 100%; height: auto; background: #fff; border-radius: .4rem; }
p { opacity: .75; font-size: .875rem; }
"""


def render_report(config: ActivationSweepConfig, rows: Sequence[Mapping[str, Any]]) -> str:
    """The whole page.

    Args:
        config: of the sweep.
        rows: records of `activation_sweep.measure`.
    """
    sweep = config.sweep
    setting = (
        f"{config.model.num_parameters():,} parameters, {config.model.num_layers} layers; {sweep.micro_batch_size} x "
        f"{sweep.sequence_length} tokens a step, {sweep.precision}, on {rows[0]['device']}; medians of "
        f"{sweep.repeats} steps with smallest and largest."
    )
    heads = ("mode", "saved MiB", "estimate", "peak MiB", "step ms", "range", "tokens/s", "recomputed GFLOP", "Pareto")
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in _cells(row)) + "</tr>" for row in rows)
    notes = (
        "Saved: what the forward pass leaves behind for the backward pass. Peak: the most that all tensors made in a"
        " step held at once, gradients included. The two are different questions.",
        "Pareto: no other mode saves less without a longer step. Recomputed: operations run a second time; not known"
        " of compiled blocks.",
    )
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><title>Activation memory</title>"
        f"<style>{_STYLE}</style><h1>Activation memory</h1><p>{html.escape(setting)}</p>{diagram(rows)}"
        f"<table><thead><tr>{''.join(f'<th>{head}</th>' for head in heads)}</tr></thead><tbody>{body}</tbody></table>"
        + "".join(f"<p>{note}</p>" for note in notes)
        + "</html>\n"
    )


def _cells(row: Mapping[str, Any]) -> list[str]:
    low, high = row["step_seconds_low"] * 1e3, row["step_seconds_high"] * 1e3
    recomputed = row["recomputed_flops"]
    return [
        row["mode"],
        f"{row['saved_bytes'] / _MIB:,.1f}",
        f"{row['estimated_saved_bytes'] / _MIB:,.1f}",
        f"{row['peak_bytes'] / _MIB:,.1f}",
        f"{row['step_seconds'] * 1e3:,.1f}",
        f"{low:,.1f} to {high:,.1f}",
        f"{row['tokens_per_second']:,.0f}",
        "" if recomputed is None else f"{recomputed / 1e9:,.2f}",
        "yes" if row["pareto"] else "",
    ]


def diagram(rows: Sequence[Mapping[str, Any]]) -> str:
    """Tokens a second over saved MiB, one point a mode with its spread, Pareto-optimal ones joined: an `<svg>`."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "modelmill", "font.size": 10}):
        figure = Figure(figsize=(8.6, 4.2), layout="constrained")
        axes = figure.add_subplot()
        front = sorted((row["saved_bytes"] / _MIB, row["tokens_per_second"]) for row in rows if row["pareto"])
        axes.plot(*zip(*front, strict=True), color="#12a067", linewidth=1.2, zorder=1)
        for row in rows:
            memory, speed = row["saved_bytes"] / _MIB, row["tokens_per_second"]
            tokens = speed * row["step_seconds"]
            spread = ([speed - tokens / row["step_seconds_high"]], [tokens / row["step_seconds_low"] - speed])
            colour = "#12a067" if row["pareto"] else "#4c8bf5"
            axes.errorbar([memory], [speed], yerr=spread, fmt="o", color=colour, capsize=3, zorder=2)
            axes.annotate(row["mode"], (memory, speed), xytext=(7, 5), textcoords="offset points")
        axes.set_xlabel("saved for the backward pass (MiB)")
        axes.set_ylabel("tokens per second")
        axes.margins(x=0.15, y=0.15)
        axes.grid(alpha=0.15)
        buffer = io.StringIO()
        FigureCanvasSVG(figure).print_svg(buffer, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = buffer.getvalue()
    return text[text.index("<svg") :].rstrip()
