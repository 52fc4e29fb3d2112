"""What every forecaster offers, be it a baseline or a model: quantiles of what follows some contexts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from modelmill.components.forecasting.series_table import Context


class Forecaster(Protocol):
    """Forecasts series.

    A forecast depends on its own context, the horizon and the levels alone: not on the other contexts of a call, their
    number or their order, unless the forecaster says that it learns across series. Contexts differ in length,
    frequency and season; values may be missing (nan), all of them even.
    """

    @property
    def name(self) -> str:
        """What tables call it, such as `seasonal-naive`; without spaces."""

    def predict(self, contexts: Sequence[Context], horizon: int, quantiles: Sequence[float]) -> np.ndarray:
        """Forecast some series.

        Args:
            contexts: of each series what precedes its origin; `future` holds known covariates of `horizon` points.
            horizon: points to forecast, at least 1.
            quantiles: rising levels between 0 and 1, 0.5 among them.

        Returns:
            float64 [contexts, horizon, quantiles], finite and rising along the last axis; a series that could not be
            forecast is nan throughout, and its caller decides what takes its place.
        """
