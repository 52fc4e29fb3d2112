"""Real series that installed packages ship: statsmodels' data sets and the airline passengers of statsforecast."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from importlib import metadata

import numpy as np
import pandas as pd

from modelmill.components.core.errors import UserError
from modelmill.components.forecasting.raw_series import RawSeries
from modelmill.components.forecasting.series_config import PARAMETER, PackagedName

_PACKAGES = {"air_passengers": "statsforecast"}  # the others are of statsmodels


def installed_versions(names: Sequence[PackagedName]) -> str:
    """Names and versions of the packages that ship these data sets.

    Raises:
        UserError: one of them is not installed.
    """
    packages = sorted({_PACKAGES.get(name, "statsmodels") for name in names})
    try:
        return ",".join(f"{package} {metadata.version(package)}" for package in packages)
    except metadata.PackageNotFoundError as error:
        needed = f"{error.name} is not installed; pip install 'modelmill[forecast]'"
        raise UserError(f"{PARAMETER}.names: {needed}") from None


def read_packaged(name: PackagedName) -> RawSeries:
    """Series of a data set: item `<name>`, or `<name>.<variable>` where it has several.

    Raises:
        UserError: the package that ships it is not installed.
    """
    installed_versions([name])
    frame = _air_passengers() if name == "air_passengers" else _statsmodels(name)
    items = [str(name)] if len(frame.columns) == 1 else [f"{name}.{column}" for column in frame.columns]
    rows = len(frame)
    return RawSeries(
        items=items,
        codes=np.repeat(np.arange(len(items)), rows),
        times=np.tile(frame.index.to_numpy("datetime64[ns]"), len(items)),
        target=frame.to_numpy(np.float64).T.reshape(-1),
        files=[(f"{_PACKAGES.get(name, 'statsmodels')}: {item}", number * rows) for number, item in enumerate(items)],
    )


def _air_passengers() -> pd.DataFrame:
    from statsforecast.utils import AirPassengersDF

    return AirPassengersDF.set_index("ds")[["y"]]


def _statsmodels(name: str) -> pd.DataFrame:
    """A data set as a table whose index holds the timestamps, one column a series."""
    data = importlib.import_module(f"statsmodels.datasets.{name}").load_pandas().data
    if name == "elnino":  # a row a year, a column a month
        months = data.set_index("YEAR")
        index = pd.date_range(f"{int(months.index[0])}-01-01", periods=months.size, freq="MS")
        return pd.DataFrame({name: months.to_numpy().reshape(-1)}, index=index)
    data = data.rename(columns=str.lower)
    if "quarter" in data:
        months = (data.pop("quarter").astype(int) * 3 - 2).astype(str)
        data.index = pd.to_datetime(data.pop("year").astype(int).astype(str) + "-" + months, format="%Y-%m")
    elif "year" in data:
        data.index = pd.to_datetime(data.pop("year").astype(int).astype(str), format="%Y")
    return data
