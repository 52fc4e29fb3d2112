"""Loss, learning-rate and gradient-norm curves as SVG text that is the same for the same history."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from modelmill.components.evaluation.svg import INK, STYLE, svg

_TRAIN, _VALIDATION = "#4c8bf5", "#e8710a"
_BASELINES = {"bigram": "#12a067", "unigram": "#a66bd6"}
_MAX_POINTS = 1000


def curves(history: Sequence[Mapping[str, Any]], validation: Mapping[str, Mapping[str, float]]) -> dict[str, str]:
    """The figures of a report by name: `loss`, `learning_rate`, `grad_norm` if it was logged; none without a history.

    Args:
        history: records of `history.jsonl`.
        validation: `validation` of `evaluation.json`.
    """
    if not history:
        return {}
    lines = {name: validation[name]["loss"] for name in ("bigram", "unigram") if name in validation}
    found = {"loss": loss_curve(history, lines), "learning_rate": learning_rate_curve(history)}
    if _series(history, "grad_norm"):
        found["grad_norm"] = grad_norm_curve(history)
    return found


def loss_curve(history: Sequence[Mapping[str, Any]], baselines: Mapping[str, float]) -> str:
    """Training and validation loss by step, with the baselines' loss on the validation split as horizontal lines.

    Args:
        history: records of `history.jsonl`.
        baselines: name to loss in nats a token.

    Returns:
        An `<svg>` element.
    """
    with mpl.rc_context(STYLE):
        figure, axes = _axes("loss (nats per token)")
        train = _series(history, "loss")
        validation = _series(history, "validation_loss")
        if train:
            axes.plot(*zip(*_thin(train), strict=True), color=_TRAIN, label="training")
        if validation:
            axes.plot(
                *zip(*validation, strict=True), color=_VALIDATION, marker="o", markersize=3.5, label="validation"
            )
        for name, loss in baselines.items():
            axes.axhline(loss, color=_BASELINES.get(name, INK), linestyle=(0, (5, 3)), label=f"{name} baseline")
        figure.legend(loc="outside upper left", ncols=4)  # above the axes, where it hides no line
        return svg(figure, "Training and validation loss by step")


def learning_rate_curve(history: Sequence[Mapping[str, Any]]) -> str:
    """Learning rate by step, as an `<svg>` element."""
    with mpl.rc_context(STYLE):
        figure, axes = _axes("learning rate", height=2.0)
        rates = _series(history, "learning_rate")
        if rates:
            axes.plot(*zip(*_thin(rates), strict=True), color=_TRAIN)
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        return svg(figure, "Learning rate by step")


def grad_norm_curve(history: Sequence[Mapping[str, Any]]) -> str:
    """Norm of the gradient before clipping by step, its running mean, and the steps that were skipped.

    Returns:
        An `<svg>` element.
    """
    with mpl.rc_context(STYLE):
        figure, axes = _axes("gradient norm", height=2.4)
        axes.plot(*zip(*_thin(_series(history, "grad_norm")), strict=True), color=_TRAIN, label="gradient norm")
        if mean := _series(history, "grad_norm_mean"):
            axes.plot(*zip(*_thin(mean), strict=True), color=_VALIDATION, label="running mean")
        if skipped := [record["step"] for record in history if "skipped" in record]:
            axes.plot(skipped, [0.0] * len(skipped), "x", color=INK, label="update skipped", clip_on=False)
        axes.set_ylim(bottom=0)
        figure.legend(loc="outside upper left", ncols=3)
        return svg(figure, "Gradient norm by step")


def _axes(label: str, height: float = 3.4) -> tuple[Figure, Any]:
    figure = Figure(figsize=(8.6, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(label)
    axes.margins(x=0.01)
    return figure, axes


def _series(history: Sequence[Mapping[str, Any]], name: str) -> list[tuple[int, float]]:
    return [(int(record["step"]), float(record[name])) for record in history if record.get(name) is not None]


def _thin(points: list[tuple[int, float]]) -> list[tuple[float, float]]:
    """Means of neighbouring points when there are more than a screen can show."""
    width = -(-len(points) // _MAX_POINTS)
    groups = [points[begin : begin + width] for begin in range(0, len(points), width)]
    return [(sum(p[0] for p in group) / len(group), sum(p[1] for p in group) / len(group)) for group in groups]
