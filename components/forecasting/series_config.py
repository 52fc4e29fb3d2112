"""Sections `series` and `synthesis` of a recipe: which series there are, and which are made up."""

from __future__ import annotations

from datetime import date, datetime, time
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from modelmill.components.core.errors import UserError
from modelmill.components.core.recipe import Section
from modelmill.components.data.files import TABLE_FORMATS, Formats
from modelmill.components.data.source_config import DataSource, LocalFiles, S3Objects, SourcesConfig
from modelmill.components.forecasting.frequency import parse_frequency

PARAMETER = "series.source"
PackagedName = Literal[
    "air_passengers",
    "co2",
    "danish_data",
    "elec_equip",
    "elnino",
    "interest_inflation",
    "macrodata",
    "nile",
    "sunspots",
]


class LongTable(DataSource):
    """What the columns of a long table are: one row a point, the items one below the other, in any order."""

    parameter: ClassVar[str] = PARAMETER
    formats: ClassVar[Formats] = TABLE_FORMATS
    item_id: str | None = Field(
        default="item_id", min_length=1, description="Column with the item; null: the table is a single series."
    )
    timestamp: str = Field(default="timestamp", min_length=1, description="Column with the time of a point.")
    target: str = Field(default="target", min_length=1, description="Column with what is forecast; empty: missing.")
    past_covariates: list[str] = Field(
        default=[], description="Columns with what is known up to the present, numbers or text."
    )
    known_covariates: list[str] = Field(
        default=[], description="Columns known ahead; rows after the last target extend them into the future."
    )
    timestamp_format: str | None = Field(
        default=None, min_length=1, description="strftime format of timestamps that are text; null reads ISO 8601."
    )
    delimiter: str = Field(default=",", min_length=1, max_length=1, description="Between the cells of a csv file.")

    @model_validator(mode="after")
    def _distinct(self) -> LongTable:
        names = [self.timestamp, self.target, *self.past_covariates, *self.known_covariates]
        names += [self.item_id] if self.item_id else []
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"columns: {twice[0]!r} is named twice; name each column once")
        return self

    @property
    def columns(self) -> list[str]:
        """Every column that is read."""
        names = [self.item_id] if self.item_id else []
        return [*names, self.timestamp, self.target, *self.past_covariates, *self.known_covariates]


class FileSeries(LocalFiles, LongTable):
    """Local files or folders: `.csv` and `.parquet`, plain, `.gz` or `.zst`; several are parts of one table."""


class S3Series(S3Objects, LongTable):
    """Objects below an S3 prefix (or one object), of the same formats as local files."""


class PackagedSeries(Section):
    """Real series that come with installed packages (statsmodels, statsforecast): nothing is downloaded."""

    type: Literal["packaged"]
    names: list[PackagedName] = Field(min_length=1, description="Data sets to read; one may hold several series.")

    @field_validator("names")
    @classmethod
    def _once(cls, names: list[PackagedName]) -> list[PackagedName]:
        if len(set(names)) < len(names):
            raise ValueError("a data set is named twice; remove one")
        return names

    @property
    def label(self) -> str:
        return ", ".join(self.names)

    def fingerprint(self) -> str:
        from modelmill.components.forecasting.packaged_series import installed_versions

        return installed_versions(self.names)


SeriesSource = Annotated[FileSeries | S3Series | PackagedSeries, Field(discriminator="type")]


class SeriesConfig(SourcesConfig):
    """Which series there are, what is done about their faults, and how much is held back for the backtest."""

    source: list[SeriesSource] = Field(min_length=1, description="One source or several with equal covariates.")
    horizon: int = Field(ge=1, description="Steps of one forecast.")
    windows: int = Field(
        default=1, ge=0, description="Backtest windows of a horizon each, held back at the end of every series."
    )
    min_context: int = Field(default=3, ge=1, description="Points before the first window that must not be missing.")
    as_of: str = Field(
        default="",
        description="Date (its end) or time, without an offset, up to which rows are read; empty: all. Later rows"
        " count for known covariates only, so that a run of the past can be done now, and again.",
    )
    frequency: str | None = Field(
        default=None, description="pandas alias such as h, D, W-SUN or MS for all series; null infers one for each."
    )
    season_lengths: dict[str, Annotated[int, Field(ge=1)]] = Field(
        default={}, description="Steps of a season by frequency, where the usual one does not fit, such as `D: 365`."
    )
    timezone: str | None = Field(
        default=None,
        min_length=1,
        description="Zone that timestamps with an offset are converted to; null: UTC. Plain ones stay as they are.",
    )
    duplicates: Literal["refuse", "first", "last", "mean", "sum"] = Field(
        default="refuse", description="Rows of one item for one timestamp: refuse them, or what takes their place."
    )
    irregular: Literal["refuse", "round"] = Field(
        default="refuse",
        description="Timestamps off the grid: refuse them, or round them down to `frequency` (see `duplicates` then).",
    )
    gaps: Literal["refuse", "missing"] = Field(
        default="missing", description="Timestamps without a row: refuse them, or fill them with missing points."
    )
    infinite: Literal["refuse", "missing"] = Field(
        default="refuse", description="Infinite values: refuse them, or take them as missing."
    )
    too_short: Literal["refuse", "drop"] = Field(
        default="refuse", description="Series with fewer than `min_context` points before the windows."
    )
    all_missing: Literal["refuse", "drop"] = Field(default="refuse", description="Series without a single value.")
    constant: Literal["keep", "refuse", "drop"] = Field(
        default="keep", description="Series that never change; errors scaled by their changes are undefined."
    )

    @field_validator("as_of", mode="before")
    @classmethod
    def _time(cls, value: Any) -> Any:
        if isinstance(value, date):  # what YAML makes of a date
            value = value.isoformat()
        if isinstance(value, str) and value:
            try:
                parsed = datetime.fromisoformat(value)
            except ValueError:
                raise ValueError(f"{value!r} is no time; write 2024-01-31 or 2024-01-31T12:00:00") from None
            if parsed.tzinfo is not None:
                raise ValueError(f"{value!r} has an offset; write it without, in the zone of series.timezone")
        return value

    @field_validator("frequency")
    @classmethod
    def _canonical(cls, alias: str | None) -> str | None:
        return alias if alias is None else _frequency(alias)

    @field_validator("season_lengths")
    @classmethod
    def _by_alias(cls, lengths: dict[str, int]) -> dict[str, int]:
        return {_frequency(alias): length for alias, length in lengths.items()}

    @field_validator("timezone")
    @classmethod
    def _zone(cls, name: str | None) -> str | None:
        from zoneinfo import ZoneInfo

        try:
            ZoneInfo(name or "UTC")
        except (KeyError, ValueError, OSError):
            raise ValueError(f"{name!r} is not a zone; write one such as Europe/Berlin") from None
        return name

    @model_validator(mode="after")
    def _consistent(self) -> SeriesConfig:
        if self.irregular == "round" and self.frequency is None:
            raise ValueError("irregular: round needs a frequency to round to; set frequency")
        named = [
            (source.past_covariates, source.known_covariates) if isinstance(source, LongTable) else ([], [])
            for source in self.source
        ]
        if any(pair != named[0] for pair in named):
            raise ValueError("source: the sources differ in their covariates; give each the same ones")
        return self

    def known_until(self) -> datetime | None:
        """The last moment of `as_of`; None where every row counts."""
        if not self.as_of:
            return None
        moment = datetime.fromisoformat(self.as_of)
        return datetime.combine(moment, time.max) if len(self.as_of) <= len("2024-01-31") else moment


def _frequency(alias: str) -> str:
    try:
        return parse_frequency(alias).alias
    except UserError as error:
        raise ValueError(str(error).partition(": ")[2]) from None


class KernelSynthesis(Section):
    """KernelSynth: draws from Gaussian processes with random kernels (Ansari et al. 2024, arXiv:2403.07815)."""

    count: int = Field(ge=1, description="Series to make.")
    length: int = Field(default=1024, ge=2, le=8192, description="Points of each.")
    max_kernels: int = Field(
        default=5, ge=1, le=8, description="Kernels combined in one series at most; the number is drawn evenly."
    )


class TsMixup(Section):
    """TSMixup: weighted means of pieces of given series (Ansari et al. 2024, arXiv:2403.07815)."""

    count: int = Field(ge=1, description="Series to make.")
    max_series: int = Field(
        default=3, ge=1, description="Series mixed into one at most; the number is drawn evenly from 1 on."
    )
    min_length: int = Field(default=128, ge=2, description="Points of a mixture at least.")
    max_length: int = Field(default=2048, ge=2, description="Points of a mixture at most.")
    alpha: float = Field(default=1.5, gt=0, description="Of the symmetric Dirichlet distribution of the weights.")

    @model_validator(mode="after")
    def _consistent(self) -> TsMixup:
        if self.max_length < self.min_length:
            raise ValueError(f"max_length: {self.max_length} is below min_length {self.min_length}; raise it")
        return self


class SynthesisConfig(Section):
    """Series that are made up, to train on."""

    kernel: KernelSynthesis | None = Field(default=None, description="Draws from Gaussian processes; null for none.")
    mixup: TsMixup | None = Field(default=None, description="Mixtures of the series given to the step; null for none.")
    frequency: str = Field(default="h", description="pandas alias that all of them are stamped with.")
    seed: int = Field(default=0, ge=0, lt=2**63, description="Another seed gives other series.")
    workers: int | None = Field(
        default=None, ge=1, description="Processes at most; null: one a core. They do not change the series."
    )

    @field_validator("frequency")
    @classmethod
    def _canonical(cls, alias: str) -> str:
        return _frequency(alias)

    @model_validator(mode="after")
    def _anything(self) -> SynthesisConfig:
        if self.kernel is None and self.mixup is None:
            raise ValueError("kernel, mixup: both are null; set at least one of them")
        return self
