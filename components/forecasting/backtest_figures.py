"""Figures of a backtest: fan charts, calibration curve, error by step, as SVG text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from modelmill.components.evaluation.svg import INK, STYLE, svg
from modelmill.components.forecasting.backtest_config import SEASONAL_NAIVE
from modelmill.components.forecasting.fan_chart import BASELINE, FORECAST, Fan, fan_chart

_OTHERS = ("#12a067", "#a66bd6", "#d6336c", "#868e96", "#c99700")


def windows_chart(drawn: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    """A series with the forecasts of its last windows, and Seasonal Naive's median.

    Args:
        drawn: an entry of `drawn` in `backtest.json`.
        record: `backtest.json`.

    Returns:
        An `<svg>` element.
    """
    times = np.array(drawn["times"], "datetime64[s]")
    values = np.array([np.nan if value is None else value for value in drawn["values"]])
    name, fans = record["summary"]["candidate"], []
    for forecast in drawn["forecasts"]:
        begin = forecast["origin"] - drawn["begin"]
        shown = times[begin : begin + record["plan"]["horizon"]]
        naive = None if name == SEASONAL_NAIVE else np.array(forecast["naive"])
        fans.append(Fan(shown, np.array(forecast["quantiles"]), naive))
    levels, title = record["summary"]["calibration"]["levels"], f"Forecast and actual of the {drawn['role']} series"
    return fan_chart(times, values, fans, levels, title=title, name=name, baseline=SEASONAL_NAIVE)


def calibration_curve(summary: Mapping[str, Any]) -> str:
    """Share of actuals at or below each quantile against its level; on the diagonal a forecaster is calibrated."""
    levels = summary["calibration"]["levels"]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8.6, 4.2), layout="constrained")
        axes = figure.add_subplot()
        axes.plot([0, 1], [0, 1], color=INK, alpha=0.4, linewidth=1, linestyle=(0, (4, 3)))
        for name, color, width in _lines(summary):
            below = summary["calibration"]["below"][name]
            axes.plot(levels, below, color=color, linewidth=width, marker="o", markersize=3.5, label=name)
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1)
        axes.set_xlabel("level of the quantile")
        axes.set_ylabel("share of actuals at or below")
        figure.legend(loc="outside upper left", ncols=4)
        return svg(figure, "Calibration of the quantiles")


def error_by_step(summary: Mapping[str, Any]) -> str:
    """Scaled quantile loss by step ahead, as an `<svg>` element."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8.6, 3.2), layout="constrained")
        axes = figure.add_subplot()
        for name, color, width in _lines(summary):
            values = [np.nan if value is None else value for value in summary["by_step"][name]]
            marker = "o" if len(values) == 1 else None
            axes.plot(np.arange(1, len(values) + 1), values, color=color, linewidth=width, marker=marker, label=name)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("step ahead")
        axes.set_ylabel("scaled quantile loss")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.margins(x=0.01)
        figure.legend(loc="outside upper left", ncols=4)
        return svg(figure, "Error by step ahead")


def _lines(summary: Mapping[str, Any]) -> list[tuple[str, str, float]]:
    """Forecasters with the colours and widths of their lines, the candidate last and so on top."""
    others = iter(_OTHERS * 2)
    found = []
    for row in summary["rows"]:
        name = row["name"]
        if name == summary["candidate"]:
            continue
        found.append((name, BASELINE if name == SEASONAL_NAIVE else next(others), 1.3))
    return [*found, (summary["candidate"], FORECAST, 2.4)]
