"""A series and its forecasts as a picture: median and central intervals, beside what came."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
from matplotlib.dates import AutoDateLocator, ConciseDateFormatter
from matplotlib.figure import Figure

from modelmill.components.evaluation.svg import INK, STYLE, svg
from modelmill.components.forecasting.metrics import intervals

FORECAST, BASELINE = "#4c8bf5", "#e8710a"


@dataclass(frozen=True)
class Fan:
    """A forecast from one origin.

    Attributes:
        times: of its steps, datetime64 [steps].
        quantiles: [steps, levels], nan where there is none.
        baseline: another forecaster's median [steps], if it is shown.
    """

    times: np.ndarray
    quantiles: np.ndarray
    baseline: np.ndarray | None = None


def fan_chart(
    times: np.ndarray,
    values: np.ndarray,
    fans: Sequence[Fan],
    levels: Sequence[float],
    *,
    title: str,
    name: str = "forecast",
    baseline: str = "",
) -> str:
    """Draw a series with forecasts.

    Args:
        times: of the points, datetime64 [points].
        values: of the points, nan where missing.
        fans: forecasts, the earliest first.
        levels: of their quantiles, rising, with 0.5 among them.
        title: what the picture is of, for readers who cannot see it.
        name: of the forecaster, in the legend.
        baseline: name of the other forecaster.

    Returns:
        An `<svg>` element.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8.6, 3.0), layout="constrained")
        axes = figure.add_subplot()
        axes.plot(times, values, color=INK, linewidth=1.1, label="actual")
        for number, fan in enumerate(fans):
            first = number == 0
            for low, high in intervals(levels):
                axes.fill_between(
                    fan.times, fan.quantiles[:, low], fan.quantiles[:, high], color=FORECAST, alpha=0.12, linewidth=0
                )
            median, marker = fan.quantiles[:, list(levels).index(0.5)], "o" if len(fan.times) == 1 else None
            axes.plot(fan.times, median, color=FORECAST, marker=marker, label=name if first else None)
            if fan.baseline is not None:
                label, dashes = baseline if first else None, (0, (4, 3))
                axes.plot(fan.times, fan.baseline, color=BASELINE, linewidth=1, linestyle=dashes, label=label)
            axes.axvline(fan.times[0], color=INK, alpha=0.25, linewidth=0.8)
        locator = AutoDateLocator()
        axes.xaxis.set_major_locator(locator)
        axes.xaxis.set_major_formatter(ConciseDateFormatter(locator))
        axes.margins(x=0.01)
        figure.legend(loc="outside upper left", ncols=3)
        return svg(figure, title)
