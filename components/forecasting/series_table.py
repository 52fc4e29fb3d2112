"""The `series` artifact: how series are stored, and the reader that every later step uses.

`series.arrow` is an Arrow IPC file with one row a series and its points in list columns, so the points of a series
lie side by side and a reader maps them instead of loading them:

    item_id string, start timestamp[ns], frequency string, season_length int32, target list<double>,
    past:<name> and known:<name> list<double> or list<dictionary<string>> for each covariate

A series is regular: point `t` has the timestamp `start + t * frequency`; a missing point is nan. Past covariates have
the length of the target, known ones may go on beyond it. Nothing is cut off: metadata `horizon` and `windows` say that
the last `horizon * windows` points are for the backtest.

Reading:

    table = open_series(manifest)            # kind `series`: of prepare_series or synthesise_series
    len(table), table.item_ids, table.lengths, table.starts, table.frequencies, table.season_lengths
    table.horizon, table.windows             # 0 when the artifact holds nothing back
    table.past_names, table.known_names      # covariates
    table.target(i)                          # float64 [length] with nan, a read-only view of the file
    table.train(i)                           # the target without the last horizon * windows points
    table.origins(i)                         # first forecast position of each backtest window, oldest first
    table.context(i, origin, horizon=h)      # what a model may see to forecast positions origin ... origin + h - 1
    table.actual(i, origin, horizon)         # what came
    table.timestamps(i, begin, end)          # pandas.DatetimeIndex; may go beyond the last point
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from modelmill.components.core.errors import UserError
from modelmill.components.core.manifest import Manifest

if TYPE_CHECKING:
    import pandas as pd

FILE = "series.arrow"
PAST, KNOWN = "past:", "known:"


@dataclass(frozen=True)
class Context:
    """What a model may see of a series before an origin.

    Attributes:
        item_id: of the series.
        target: float64 [n], the points before the origin; nan where missing.
        past: every covariate's values at the same points, float64 or object (text or None) [n].
        future: values of the known covariates at the points to forecast [horizon]; empty without a horizon.
        frequency: pandas alias.
        season_length: steps of a season, 1 for none.
    """

    item_id: str
    target: np.ndarray
    past: dict[str, np.ndarray] = field(default_factory=dict)
    future: dict[str, np.ndarray] = field(default_factory=dict)
    frequency: str = ""
    season_length: int = 1


class SeriesTable:
    """Series of an artifact, mapped from disk; see the module's text."""

    def __init__(self, path: Path | str, *, horizon: int = 0, windows: int = 0) -> None:
        """Open a file.

        Args:
            path: of `series.arrow`.
            horizon: steps of a backtest window.
            windows: number of backtest windows.
        """
        with pa.memory_map(str(path)) as source:
            self._batches = [b for b in _batches(source) if b.num_rows]
            schema = pa.ipc.open_file(source).schema
        self.path, self.horizon, self.windows = Path(path), horizon, windows
        self.past_names = tuple(n.removeprefix(PAST) for n in schema.names if n.startswith(PAST))
        self.known_names = tuple(n.removeprefix(KNOWN) for n in schema.names if n.startswith(KNOWN))
        self._ends = np.cumsum([batch.num_rows for batch in self._batches], dtype=np.int64)
        self._length = int(self._ends[-1]) if len(self._ends) else 0
        self._views: dict[tuple[int, str], tuple[np.ndarray, Any]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process maps the file itself instead of receiving it."""
        return _reopen, (self.path, self.horizon, self.windows)

    def __len__(self) -> int:
        return self._length

    def _strings(self, name: str) -> list[str]:
        return [text for batch in self._batches for text in batch.column(name).to_pylist()]

    def _numbers(self, name: str, dtype: str) -> np.ndarray:
        parts = [batch.column(name).to_numpy(zero_copy_only=False) for batch in self._batches]
        return np.concatenate(parts).astype(dtype) if parts else np.empty(0, dtype)

    @cached_property
    def item_ids(self) -> list[str]:
        return self._strings("item_id")

    @cached_property
    def frequencies(self) -> list[str]:
        """pandas alias of each series."""
        return self._strings("frequency")

    @cached_property
    def starts(self) -> np.ndarray:
        """Timestamp of each series' first point, datetime64[ns]."""
        return self._numbers("start", "datetime64[ns]")

    @cached_property
    def season_lengths(self) -> np.ndarray:
        """Steps of a season of each series, int64; 1 for none."""
        return self._numbers("season_length", "int64")

    @cached_property
    def lengths(self) -> np.ndarray:
        """Points of each series, int64, missing ones included."""
        parts = [np.diff(self._list(number, "target")[0]) for number in range(len(self._batches))]
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    @cached_property
    def _index(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.item_ids)}

    def index(self, item_id: str) -> int:
        """Number of a series.

        Raises:
            UserError: there is none of that name.
        """
        found = self._index.get(item_id)
        if found is None:
            some = ", ".join(self.item_ids[:3])
            raise UserError(
                f"series: there is no item {item_id!r} among {len(self)} (such as {some}); give one of them"
            )
        return found

    def _list(self, batch: int, column: str) -> tuple[np.ndarray, Any]:
        """Offsets and flat values of a list column: numpy for numbers, an Arrow array for text."""
        view = self._views.get((batch, column))
        if view is None:
            array = self._batches[batch].column(column)
            values = array.values
            flat = values if pa.types.is_dictionary(values.type) else values.to_numpy(zero_copy_only=True)
            view = self._views[batch, column] = (array.offsets.to_numpy(), flat)
        return view

    def _values(self, index: int, column: str) -> np.ndarray:
        if not -self._length <= index < self._length:
            raise IndexError(f"series {index} of {self._length}")
        index %= self._length
        batch = int(np.searchsorted(self._ends, index, side="right")) if len(self._ends) > 1 else 0
        row = index - (int(self._ends[batch - 1]) if batch else 0)
        offsets, flat = self._list(batch, column)
        part = flat[int(offsets[row]) : int(offsets[row + 1])]
        return part if isinstance(part, np.ndarray) else part.to_numpy(zero_copy_only=False)

    def target(self, index: int) -> np.ndarray:
        """Values of a series, float64 [length], nan where missing; read-only."""
        return self._values(index, "target")

    def covariate(self, index: int, name: str) -> np.ndarray:
        """Values of a covariate, float64 or object [length]; a known one may be longer than the target.

        Raises:
            UserError: the series have no such covariate.
        """
        for prefix, names in ((PAST, self.past_names), (KNOWN, self.known_names)):
            if name in names:
                return self._values(index, prefix + name)
        held = ", ".join(self.past_names + self.known_names) or "none"
        raise UserError(f"series: there is no covariate {name!r}; the covariates are {held}")

    def train(self, index: int) -> np.ndarray:
        """The target without what is held back for the backtest."""
        target = self.target(index)
        return target[: max(0, len(target) - self.horizon * self.windows)]

    def origins(self, index: int) -> list[int]:
        """Position of the first forecast point of each backtest window, oldest first; windows lie end to end."""
        length = int(self.lengths[index])
        return [length - self.horizon * left for left in range(self.windows, 0, -1)]

    def actual(self, index: int, origin: int, horizon: int | None = None) -> np.ndarray:
        """Points from an origin on, at most a horizon of them (default the artifact's own)."""
        return self.target(index)[origin : origin + (self.horizon if horizon is None else horizon)]

    def context(
        self, index: int, origin: int | None = None, *, horizon: int = 0, max_length: int | None = None
    ) -> Context:
        """What may be seen before an origin; nothing that is known only later is in it.

        Args:
            index: of the series.
            origin: position of the first point to forecast; None forecasts what follows the last point.
            horizon: points to forecast, for which the known covariates are read.
            max_length: points before the origin that are returned at most.

        Raises:
            UserError: a known covariate ends before the horizon does.
        """
        length = int(self.lengths[index])
        end = length if origin is None else origin
        if not 0 < end <= length:
            raise UserError(f"series: origin {end} of {self.item_ids[index]} lies outside its {length} points")
        begin = 0 if max_length is None else max(0, end - max_length)
        past = {name: self.covariate(index, name)[begin:end] for name in self.past_names + self.known_names}
        future = {}
        for name in self.known_names if horizon else ():
            values = self.covariate(index, name)[end : end + horizon]
            if len(values) < horizon:
                what = f"{self.item_ids[index]} has {len(values)} of {horizon} future values of {name!r}"
                raise UserError(f"series: {what}; add rows with the covariate and an empty target, or forecast less")
            future[name] = values
        return Context(
            item_id=self.item_ids[index],
            target=self.target(index)[begin:end],
            past=past,
            future=future,
            frequency=self.frequencies[index],
            season_length=int(self.season_lengths[index]),
        )

    def timestamps(self, index: int, begin: int = 0, end: int | None = None) -> pd.DatetimeIndex:
        """Timestamps of positions `begin` to `end` (excluded; default the last point), which may go beyond the end."""
        import pandas as pd

        last = int(self.lengths[index]) if end is None else end
        dates = pd.date_range(pd.Timestamp(self.starts[index]), periods=max(last, 0), freq=self.frequencies[index])
        return dates[begin:last]

    def digest(self) -> str:
        """SHA-256, as hex, of everything that is stored, whatever the file's batches."""
        found = hashlib.sha256(json.dumps([self.item_ids, self.frequencies]).encode())
        found.update(self.starts.astype("<M8[ns]").tobytes() + self.season_lengths.astype("<i8").tobytes())
        columns = ["target", *(PAST + name for name in self.past_names), *(KNOWN + name for name in self.known_names)]
        for column in columns:
            found.update(column.encode())
            lists = [self._list(number, column) for number in range(len(self._batches))]
            for offsets, _ in lists:
                found.update(np.diff(offsets).astype("<i8").tobytes())
            for offsets, flat in lists:
                part = flat[int(offsets[0]) : int(offsets[-1])]
                numbers = isinstance(part, np.ndarray)
                found.update(part.astype("<f8").tobytes() if numbers else json.dumps(part.to_pylist()).encode())
        return found.hexdigest()


def _reopen(path: Path, horizon: int, windows: int) -> SeriesTable:
    return SeriesTable(path, horizon=horizon, windows=windows)


def _batches(source: pa.MemoryMappedFile) -> list[pa.RecordBatch]:
    reader = pa.ipc.open_file(source)
    return [reader.get_batch(number) for number in range(reader.num_record_batches)]


def open_series(manifest: Manifest) -> SeriesTable:
    """Open the series of an artifact.

    Raises:
        UserError: the artifact is of another kind, or its file is missing or corrupt.
    """
    if manifest.kind != "series":
        raise UserError(f"series: {manifest.uri} is of kind {manifest.kind!r}; give what prepare_series made")
    metadata = manifest.metadata
    return SeriesTable(
        manifest.path(FILE), horizon=int(metadata.get("horizon", 0)), windows=int(metadata.get("windows", 0))
    )


@dataclass(frozen=True)
class Points:
    """A list column: values of series one after the other.

    Attributes:
        offsets: int64 [series + 1].
        values: float64 [points], or an Arrow dictionary array for text.
    """

    offsets: np.ndarray
    values: Any

    def arrow(self) -> pa.LargeListArray:
        values = self.values
        if isinstance(values, np.ndarray):
            values = pa.array(np.ascontiguousarray(values, np.float64), pa.float64(), from_pandas=False)
        return pa.LargeListArray.from_arrays(pa.array(self.offsets, pa.int64()), values)


class SeriesWriter:
    """Writes `series.arrow`, batch after batch; equal series give equal bytes."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._writer: pa.RecordBatchFileWriter | None = None

    def __enter__(self) -> SeriesWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writer is not None:
            self._writer.close()

    def append(
        self,
        item_ids: Sequence[str],
        starts: np.ndarray,
        frequencies: Sequence[str],
        season_lengths: np.ndarray,
        target: Points,
        covariates: Mapping[str, Points] | None = None,
    ) -> None:
        """Add series.

        Args:
            item_ids: their names, each once in a file.
            starts: datetime64[ns] of the first points.
            frequencies: pandas aliases.
            season_lengths: steps of a season, 1 for none.
            target: their values.
            covariates: by column name, `past:<name>` or `known:<name>`; the same columns in every call.
        """
        columns: dict[str, pa.Array] = {
            "item_id": pa.array(item_ids, pa.string()),
            "start": pa.array(starts.astype("datetime64[ns]"), pa.timestamp("ns")),
            "frequency": pa.array(frequencies, pa.string()),
            "season_length": pa.array(season_lengths, pa.int32()),
            "target": target.arrow(),
        }
        columns |= {name: points.arrow() for name, points in (covariates or {}).items()}
        batch = pa.RecordBatch.from_pydict(columns)
        if self._writer is None:
            self._writer = pa.ipc.new_file(str(self._path), batch.schema)
        self._writer.write_batch(batch)
