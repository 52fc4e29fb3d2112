"""Loads a registered Chronos for `mlflow.pyfunc`; a copy of this file travels with every version.

It imports nothing of modelmill, so that whoever loads the model needs only torch and chronos-forecasting. The weights
are the trained folder, byte for byte: no pickle is written or read.

    curl http://127.0.0.1:5000/invocations -H 'Content-Type: application/json' -d '{
        "dataframe_records": [{"item_id": "a", "timestamp": "2024-01-01", "target": 1.0}, ...],
        "params": {"horizon": 12, "quantile_levels": [0.1, 0.5, 0.9]}}'

answers with records of `item_id`, `timestamp` and a column for each level.
"""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path
from typing import Any

_LEVELS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
_BATCH = 256
_FEWEST = 3  # rows that a frequency can be told from
_TRIALS = 200  # parts of a series that its frequency is looked for in


class Forecaster:
    """A Chronos, as `mlflow.pyfunc` wants it."""

    def __init__(self, folder: str) -> None:
        import torch
        from chronos import BaseChronosPipeline

        self.pipeline: Any = BaseChronosPipeline.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
        self.pipeline.inner_model.to("cuda" if torch.cuda.is_available() else "cpu").eval()

    def get_raw_model(self) -> Any:
        """The pipeline of chronos-forecasting; MLflow returns it from `PyFuncModel.get_raw_model()`."""
        return self.pipeline

    def predict(self, model_input: Any, params: dict[str, Any] | None = None) -> Any:
        """Forecast what follows every series of a long table.

        Args:
            model_input: a table (or records) with `item_id`, `timestamp` and `target`, one row a point, in any order;
                an empty target is missing, as are timestamps between others that have no row.
            params: `horizon` (the model's own prediction length), `quantile_levels` (0.1 to 0.9).

        Returns:
            A table of `item_id`, `timestamp` and a column for each level, named as its number (`0.1`); items in the
            order of their first rows, `horizon` rows each.

        Raises:
            ValueError: a column is missing, two rows of an item have one timestamp, an item's frequency cannot be
                told or none of its latest targets is known, or a parameter makes no sense.
        """
        import numpy as np
        import pandas as pd

        given = params or {}
        horizon = int(given.get("horizon") or self.pipeline.model_prediction_length)
        levels = [float(level) for level in given.get("quantile_levels", _LEVELS)]
        if not 1 <= horizon <= self.pipeline.model_context_length:
            raise ValueError(f"horizon: {horizon} lies outside 1 to {self.pipeline.model_context_length}")
        if not levels or not all(0 < level < 1 for level in levels):
            raise ValueError(f"quantile_levels: {levels} must lie between 0 and 1")
        items = _read(model_input)
        values = self._forecast([values for _, values, _ in items], [name for name, _, _ in items], horizon, levels)
        times = [time for _, _, index in items for time in _following(index, horizon)]
        columns = {f"{level:g}": values[:, :, place].reshape(-1) for place, level in enumerate(levels)}
        names = np.repeat(np.array([name for name, _, _ in items], dtype=object), horizon)
        return pd.DataFrame({"item_id": names, "timestamp": pd.to_datetime(times), **columns})

    def _forecast(self, series: list[Any], names: list[str], horizon: int, levels: list[float]) -> Any:
        """float64 [series, horizon, levels]; series are scaled first, as float32 does not hold every value."""
        import numpy as np
        import torch

        length = self.pipeline.model_context_length
        found = np.full((len(series), horizon, len(levels)), np.nan)
        for name, values in zip(names, series, strict=True):
            if np.isnan(values[-length:]).all():
                raise ValueError(f"item {name!r} has no target among its latest {min(length, len(values))} points")
        order = sorted(range(len(series)), key=lambda place: -len(series[place]))  # a batch pads to its longest
        draws = type(self.pipeline).__name__ == "ChronosPipeline"
        for begin in range(0, len(order), 1 if draws else _BATCH):
            places = order[begin : begin + (1 if draws else _BATCH)]
            scales = [float(np.nanmax(np.abs(series[place][-length:]))) or 1.0 for place in places]
            inputs = [
                torch.from_numpy(series[place][-length:] / scale).float()
                for place, scale in zip(places, scales, strict=True)
            ]
            with torch.random.fork_rng(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                # A model that draws samples gives a series the same ones in any company.
                torch.manual_seed(int(hashlib.sha256(names[places[0]].encode()).hexdigest()[:8], 16))
                quantiles, _ = self.pipeline.predict_quantiles(
                    inputs, prediction_length=horizon, quantile_levels=levels
                )
            for place, scale, part in zip(places, scales, quantiles, strict=True):
                values = np.sort(part.reshape(horizon, -1).double().numpy(), axis=-1)
                found[place] = values[:, np.argsort(np.argsort(levels))] * scale
        return found


def _read(model_input: Any) -> list[tuple[str, Any, Any]]:
    """Name, values (nan where missing) and timestamps of each item, in the order of their first rows."""
    import pandas as pd

    table = pd.DataFrame(model_input).reset_index(drop=True)
    for name in ("item_id", "timestamp", "target"):
        if name not in table:
            raise ValueError(f"the column {name!r} is missing; give item_id, timestamp and target")
    times = pd.to_datetime(table["timestamp"])
    target = pd.to_numeric(table["target"])
    found = []
    for name, rows in table.groupby("item_id", sort=False).groups.items():
        values = pd.Series(target[rows].to_numpy("float64"), index=pd.DatetimeIndex(times[rows])).sort_index()
        if values.index.has_duplicates:
            twice = values.index[values.index.duplicated()][0]
            raise ValueError(f"item {name!r} has two rows for {twice}; give one")
        values = values.asfreq(_frequency(str(name), values.index))
        found.append((str(name), values.to_numpy(), values.index))
    return found


def _frequency(name: str, index: Any) -> Any:
    import pandas as pd

    if len(index) < _FEWEST:
        raise ValueError(f"item {name!r} has {len(index)} rows; give at least {_FEWEST} to tell its frequency")
    # Gaps hide the frequency of the whole, but not of every part.
    parts = [
        index,
        *(index[begin : begin + size] for size in (10, 5, 3) for begin in range(0, len(index) - size, size)),
    ]
    for part in parts[:_TRIALS]:
        found = pd.infer_freq(part)
        if found is not None and index.isin(pd.date_range(index[0], index[-1], freq=found)).all():
            return found
    step = (index[1:] - index[:-1]).min()
    if not ((index - index[0]) % step == pd.Timedelta(0)).all():
        raise ValueError(f"item {name!r}: its timestamps have no common step; give rows at regular times")
    return step


def _following(index: Any, horizon: int) -> Any:
    import pandas as pd

    return pd.date_range(index[-1], periods=horizon + 1, freq=index.freq)[1:]


def _load_pyfunc(path: str) -> Forecaster:
    """Entry point of `mlflow.pyfunc.load_model`; `path` is the folder the version was registered with."""
    folder = Path(path)
    return Forecaster(str(folder / "model" if (folder / "model").is_dir() else folder))
