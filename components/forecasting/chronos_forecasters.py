"""Chronos models as forecasters. Importing this costs the import of torch.

Series are put into batches by length and scaled in float64, in a way the models' own scaling undoes. So a forecast
does not depend on what is forecast with it, but for rounding; and values that float32 cannot hold are forecast too.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from modelmill.components.core.errors import UserError
from modelmill.components.forecasting.chronos_groups import attend_within_groups
from modelmill.components.forecasting.chronos_model import Family, load_chronos
from modelmill.components.forecasting.chronos_sampling import sample_paths
from modelmill.components.forecasting.forecast_config import ChronosUseConfig
from modelmill.components.forecasting.series_table import Context

_DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16}


class ChronosForecaster(ABC):
    """A `Forecaster` around a pipeline of chronos-forecasting.

    A series without a value among the points that are read is nan throughout. One that never changes is forecast as
    the model does it: Bolt and Chronos-2 stay at its value, T5 near it.
    """

    def __init__(self, pipeline: Any, name: Family, config: ChronosUseConfig, report: Callable[[int], None]) -> None:
        self._pipeline, self._name, self._config, self._report = pipeline, name, config, report
        limit = int(pipeline.model_context_length)
        self.context_length = min(limit, config.context_length or limit)
        self.prediction_length = int(pipeline.model_prediction_length)

    @property
    def name(self) -> str:
        return self._name

    def predict(self, contexts: Sequence[Context], horizon: int, quantiles: Sequence[float]) -> np.ndarray:
        """See `Forecaster.predict`.

        Raises:
            UserError: the horizon is longer than what the model reads, or a named covariate does not exist.
        """
        if horizon > self.context_length:
            raise UserError(
                f"horizon: {horizon} is more than the {self.context_length} points that the model reads, so its last"
                f" steps would follow from forecasts alone; forecast at most {self.context_length}"
            )
        found = np.full((len(contexts), horizon, len(quantiles)), np.nan)
        present = [~np.isnan(context.target[-self.context_length :]) for context in contexts]
        usable = [number for number, points in enumerate(present) if points.any()]
        if not self._config.cross_learning:  # a batch pads to its longest
            usable.sort(key=lambda number: (-len(present[number]), number))
        size = self._series_per_batch(contexts, horizon)
        for begin in range(0, len(usable), size):
            places = usable[begin : begin + size]
            found[places] = self._predict_batch([contexts[place] for place in places], horizon, quantiles)
            self._report(len(places))
        return found

    def _predict_batch(self, contexts: Sequence[Context], horizon: int, quantiles: Sequence[float]) -> np.ndarray:
        scaled, locs, scales = [], [], []
        for context in contexts:
            values = np.asarray(context.target[-self.context_length :], np.float64)
            loc, scale = self._scaling(values[~np.isnan(values)])
            scaled.append((values - loc) / scale)
            locs.append(loc)
            scales.append(scale)
        with warnings.catch_warnings(), torch.inference_mode():
            warnings.simplefilter("ignore")  # on horizons beyond the model's own, which are asked for on purpose
            values = self._forecast(contexts, scaled, horizon, quantiles)
        values = values * np.array(scales)[:, None, None] + np.array(locs)[:, None, None]
        values[~np.isfinite(values).all(axis=(1, 2))] = np.nan
        return np.sort(values, axis=-1)

    def _series_per_batch(self, contexts: Sequence[Context], horizon: int) -> int:
        rows = self._rows(contexts[0], horizon) if contexts else 1
        return max(1, self._config.batch_size // rows)

    def _scaling(self, present: np.ndarray) -> tuple[float, float]:
        """What to subtract from a series, and then to divide it by."""
        size = float(np.abs(present).max()) or 1.0  # squares of large values are beyond float64 too
        part = present / size
        return float(part.mean()) * size, float(part.std()) * size or 1.0

    @abstractmethod
    def _rows(self, context: Context, horizon: int) -> int:
        """Rows of a forward pass for one series."""

    @abstractmethod
    def _forecast(
        self, contexts: Sequence[Context], scaled: Sequence[np.ndarray], horizon: int, quantiles: Sequence[float]
    ) -> np.ndarray:
        """Quantiles of scaled series, [series, horizon, quantiles]."""


class BoltForecaster(ChronosForecaster):
    """Chronos-Bolt. Beyond its prediction length each quantile is continued as a path, as the library does."""

    def _rows(self, context: Context, horizon: int) -> int:
        return 1 if horizon <= self.prediction_length else len(self._pipeline.quantiles)

    def _forecast(
        self, contexts: Sequence[Context], scaled: Sequence[np.ndarray], horizon: int, quantiles: Sequence[float]
    ) -> np.ndarray:
        inputs = [torch.from_numpy(values).to(torch.float32) for values in scaled]
        values = self._pipeline.predict(inputs, prediction_length=horizon)
        return interpolate(self._pipeline.quantiles, values.numpy().swapaxes(1, 2), quantiles)


class Chronos2Forecaster(ChronosForecaster):
    """Chronos-2, with covariates."""

    def __init__(self, pipeline: Any, name: Family, config: ChronosUseConfig, report: Callable[[int], None]) -> None:
        super().__init__(pipeline, name, config, report)
        attend_within_groups(pipeline.model)

    def _names(self, context: Context) -> list[str]:
        wanted = self._config.covariates
        if wanted is None:
            return sorted(context.past)
        if unknown := [name for name in wanted if name not in context.past]:
            held = ", ".join(sorted(context.past)) or "none"
            raise UserError(f"covariates: the series have no {unknown[0]!r}; the covariates are {held}")
        return sorted(wanted)

    def _rows(self, context: Context, horizon: int) -> int:
        unrolled = 1 if horizon <= self.prediction_length else 9  # levels that the library reads on
        return (1 + len(self._names(context))) * unrolled

    def _forecast(
        self, contexts: Sequence[Context], scaled: Sequence[np.ndarray], horizon: int, quantiles: Sequence[float]
    ) -> np.ndarray:
        names = self._names(contexts[0])
        inputs: list[Any] = list(scaled)
        if names:
            inputs = [
                {
                    "target": values,
                    "past_covariates": {name: context.past[name][-len(values) :] for name in names},
                    "future_covariates": {name: context.future[name] for name in names if name in context.future},
                }
                for context, values in zip(contexts, scaled, strict=True)
            ]
        options = {"prediction_length": horizon, "context_length": self.context_length}
        options["cross_learning"] = self._config.cross_learning
        rows = len(contexts) * (1 + len(names))  # one batch, whose size was chosen above
        values = torch.stack(self._pipeline.predict(inputs, batch_size=rows, **options))[:, 0]
        return interpolate(self._pipeline.quantiles, values.numpy().swapaxes(1, 2), quantiles)


class T5Forecaster(ChronosForecaster):
    """Chronos-T5: sample paths, each series with random numbers of its own."""

    @property
    def num_samples(self) -> int:
        return self._config.num_samples or int(self._pipeline.model.config.num_samples)

    def _rows(self, context: Context, horizon: int) -> int:
        return self.num_samples

    def _scaling(self, present: np.ndarray) -> tuple[float, float]:
        size = float(np.abs(present).max()) or 1.0
        return 0.0, float(
            np.abs(present / size).mean()
        ) * size or 1.0  # its tokens are multiples of the mean absolute value

    def _forecast(
        self, contexts: Sequence[Context], scaled: Sequence[np.ndarray], horizon: int, quantiles: Sequence[float]
    ) -> np.ndarray:
        names = [context.item_id for context in contexts]
        paths = sample_paths(
            self._pipeline, scaled, names, horizon=horizon, num_samples=self.num_samples, seed=self._config.seed
        )
        return np.moveaxis(np.quantile(paths, quantiles, axis=1), 0, -1)


def interpolate(held: Sequence[float], values: np.ndarray, wanted: Sequence[float]) -> np.ndarray:
    """Values [..., held] at levels `held`, interpolated linearly at levels `wanted`; beyond the ends the outermost."""
    values, levels = np.sort(values.astype(np.float64), axis=-1), np.asarray(held, np.float64)
    upper = np.searchsorted(levels, np.asarray(wanted)).clip(1, len(levels) - 1)
    share = ((np.asarray(wanted) - levels[upper - 1]) / (levels[upper] - levels[upper - 1])).clip(0, 1)
    return values[..., upper - 1] * (1 - share) + values[..., upper] * share


_CLASSES: dict[Family, type[ChronosForecaster]] = {
    "chronos-bolt": BoltForecaster,
    "chronos-2": Chronos2Forecaster,
    "chronos-t5": T5Forecaster,
}


def load_forecaster(
    folder: Path, family: Family, config: ChronosUseConfig, report: Callable[[int], None]
) -> ChronosForecaster:
    """Load a model; see `forecast_model.open_forecaster`."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("device: cuda is not in this machine; use auto or cpu")
    device = "cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu"
    return _CLASSES[family](load_chronos(folder, _DTYPES[config.precision], device), family, config, report)
