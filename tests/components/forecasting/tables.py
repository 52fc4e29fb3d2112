"""Tables of series, and the step run on them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

from modelmill.components.core.manifest import Manifest
from modelmill.components.forecasting.series import prepare_series
from modelmill.components.forecasting.series_config import SeriesConfig
from modelmill.components.forecasting.series_table import SeriesTable, open_series

Frame = pd.DataFrame
Produce = Callable[..., Manifest]


def long(*items: tuple[str, str, str, list[float]]) -> Frame:
    """Items as (name, first timestamp, frequency, values)."""
    parts = [
        Frame({"item_id": name, "timestamp": pd.date_range(start, periods=len(values), freq=freq), "target": values})
        for name, start, freq, values in items
    ]
    return pd.concat(parts, ignore_index=True)


def config(paths: list[Path] | Path, **values: Any) -> SeriesConfig:
    columns = {name: values.pop(name) for name in list(values) if name in COLUMNS}
    paths = paths if isinstance(paths, list) else [paths]
    source = {"type": "files", "paths": [str(path) for path in paths]} | columns
    return SeriesConfig.model_validate({"source": source, "horizon": 1, "min_context": 1} | values)


COLUMNS = {
    "item_id",
    "timestamp",
    "target",
    "past_covariates",
    "known_covariates",
    "timestamp_format",
    "delimiter",
}


class Prepare:
    """Writes a table as csv and runs the step on it."""

    def __init__(self, produce: Produce, folder: Path) -> None:
        self._produce, self._folder = produce, folder

    def manifest(self, frame: Frame | str, **values: Any) -> Manifest:
        path = self._folder / "a.csv"
        if isinstance(frame, str):
            path.write_text(frame)
        else:
            frame.to_csv(path, index=False)
        return self._produce(prepare_series, config(path, **values))

    def __call__(self, frame: Frame | str, **values: Any) -> SeriesTable:
        return open_series(self.manifest(frame, **values))
