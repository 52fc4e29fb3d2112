"""Figures of a search, as SVG text: validation over the learning rate, over the trials, and while they are trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from modelmill.components.evaluation.svg import INK, STYLE, svg

_COMPLETE, _PRUNED, _BASE = "#4c8bf5", "#868e96", "#e8710a"


def by_learning_rate(told: Mapping[str, Any]) -> str:
    """Last value of each trial over its learning rate, as an `<svg>` element.

    Args:
        told: content of `trials.json`.
    """
    with mpl.rc_context(STYLE):
        figure, axes = _axes(told)
        _points(axes, told, lambda trial: trial["params"]["learning_rate"])
        axes.set_xscale("log")
        axes.set_xlabel("learning rate")
        figure.legend(loc="outside upper left", ncols=4)
        return svg(figure, "Validation by learning rate")


def by_trial(told: Mapping[str, Any]) -> str:
    """Last value of each trial in their order, with the best until then."""
    with mpl.rc_context(STYLE):
        figure, axes = _axes(told)
        _points(axes, told, lambda trial: trial["number"])
        base = np.inf if told["zero_shot"] is None else told["zero_shot"]
        values = [trial["value"] if trial["state"] == "complete" else np.inf for trial in told["trials"]]
        best = np.minimum.accumulate(np.array([base, *values], float))
        numbers = [0, *(trial["number"] for trial in told["trials"])]
        shown = np.where(np.isfinite(best), best, np.nan)
        axes.step(numbers, shown, where="post", color=INK, alpha=0.6, linewidth=1.1, label="best so far")
        axes.set_xlabel("trial")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.legend(loc="outside upper left", ncols=4)
        return svg(figure, "Validation by trial")


def by_step(told: Mapping[str, Any]) -> str:
    """Every validation of each trial over its optimizer steps."""
    with mpl.rc_context(STYLE):
        figure, axes = _axes(told)
        for trial in told["trials"]:
            if not trial["course"]:
                continue
            steps, values = zip(*trial["course"], strict=True)
            won = trial["number"] == told["winner"]
            color = _COMPLETE if trial["state"] == "complete" else _PRUNED
            label = f"trial {trial['number']}, chosen" if won else None
            axes.plot(steps, values, color=color, marker="o", markersize=3, linewidth=2.4 if won else 1, label=label)
        axes.set_xlabel("optimizer step")
        figure.legend(loc="outside upper left", ncols=4)
        return svg(figure, "Validation while trials are trained")


def _axes(told: Mapping[str, Any]) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(8.6, 3.2), layout="constrained")
    axes = figure.add_subplot()
    if told["zero_shot"] is not None:
        axes.axhline(told["zero_shot"], color=_BASE, linewidth=1.2, linestyle=(0, (4, 3)), label="untrained base")
    axes.set_ylabel(f"validation {told['metric'].upper()}")
    return figure, axes


def _points(axes: Axes, told: Mapping[str, Any], place: Any) -> None:
    for state, color, label in (("complete", _COMPLETE, "complete"), ("pruned", _PRUNED, "given up")):
        chosen: Sequence[Mapping[str, Any]] = [trial for trial in told["trials"] if trial["state"] == state]
        chosen = [trial for trial in chosen if trial["value"] is not None]
        if chosen:
            values = [trial["value"] for trial in chosen]
            axes.plot([place(trial) for trial in chosen], values, "o", color=color, markersize=5, label=label)
    if won := [trial for trial in told["trials"] if trial["number"] == told["winner"]]:
        axes.plot(
            place(won[0]), won[0]["value"], "o", color="none", markeredgecolor=INK, markersize=10, label="chosen"
        )
