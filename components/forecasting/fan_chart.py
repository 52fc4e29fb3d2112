"""A forecast as a picture: the end of a series, the median, bands between pairs of quantiles, and what came."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from modelmill.components.evaluation.page import text

_WIDTH, _HEIGHT, _MARGIN = 600.0, 160.0, 4.0
_LINE, _BAND, _ACTUAL = "#4c8bf5", "#e8710a", "currentColor"


def fan_chart(
    history: np.ndarray,
    forecast: np.ndarray,
    levels: Sequence[float],
    *,
    title: str,
    actual: np.ndarray | None = None,
    shown: int | None = None,
) -> str:
    """Draw a forecast.

    Args:
        history: points before the origin, nan where missing.
        forecast: quantiles [horizon, levels]; nan where there is none.
        levels: rising, with 0.5 among them.
        title: what the picture is of, for readers who cannot see it.
        actual: what came [at most horizon], if it is known.
        shown: points of the history that are drawn at most; default three times the horizon and at least 50.

    Returns:
        An `<svg>` element.
    """
    horizon = len(forecast)
    recent = np.asarray(history, np.float64)[-(shown or max(3 * horizon, 50)) :]
    came = np.full(horizon, np.nan) if actual is None else np.asarray(actual, np.float64)
    everything = np.concatenate([recent, forecast.reshape(-1), came])
    finite = everything[np.isfinite(everything)]
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
    middle = high == low
    total = max(len(recent) + horizon - 1, 1)

    def points(values: np.ndarray, begin: int) -> list[str]:
        """Coordinates, cut where points are missing."""
        parts: list[list[str]] = [[]]
        for number, value in enumerate(values):
            if not np.isfinite(value):
                parts.append([])
                continue
            share = 0.5 if middle else (value - low) / (high - low)
            x = (begin + number) / total * _WIDTH
            parts[-1].append(f"{x:.1f},{(1 - share) * (_HEIGHT - 2 * _MARGIN) + _MARGIN:.1f}")
        return [" ".join(part) for part in parts if part]

    shapes = []
    lower, upper = 0, len(levels) - 1
    while lower < upper:
        bottom, top = (points(forecast[:, level], len(recent)) for level in (lower, upper))
        if bottom and top:
            outline = " ".join([*bottom, *" ".join(top).split()[::-1]])
            shapes.append(f'<polygon points="{outline}" fill="{_BAND}" fill-opacity="0.18"/>')
        lower, upper = lower + 1, upper - 1
    lines = [(part, _LINE, "") for part in points(recent, 0)]
    median = forecast[:, list(levels).index(0.5)]
    lines += [(part, _BAND, "") for part in points(median, len(recent))]
    lines += [(part, _ACTUAL, ' stroke-dasharray="3 3"') for part in points(came, len(recent))]
    for coordinates, colour, dash in lines:
        look = f'fill="none" stroke="{colour}"{dash} vector-effect="non-scaling-stroke"'
        shapes.append(f'<polyline points="{coordinates}" {look}/>')
    box = f'viewBox="0 0 {_WIDTH:g} {_HEIGHT:g}" preserveAspectRatio="none" style="height:{_HEIGHT:g}px"'
    return f'<svg {box} role="img" aria-label="{text(title)}">{"".join(shapes)}</svg>'
