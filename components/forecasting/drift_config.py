"""Sections of the steps that watch a forecaster: drift, the archive of forecasts, and when it has degraded."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, field_validator

from modelmill.components.core.errors import UserError
from modelmill.components.core.recipe import Section
from modelmill.components.core.uri import S3Endpoint, is_remote, local_path, split_s3


class DriftConfig(Section):
    """When the points since the champion's tuning count as drawn from another distribution."""

    min_points: PositiveInt = Field(
        default=24, description="Changes over a season that a series must have since then to be compared."
    )
    max_psi: PositiveFloat | None = Field(
        default=0.25,
        description="Population stability index of the scaled changes over a season, in deciles, above which a series"
        " drifted, if it is also more than chance gives; null: not looked at.",
    )
    confidence: float = Field(
        default=0.99, gt=0.5, lt=1, description="Of the index being more than chance gives (chi-squared)."
    )
    max_scale_ratio: float | None = Field(
        default=2.0, gt=1, description="Mean absolute change by what it was, or the inverse, above which it drifted."
    )
    max_strength_change: PositiveFloat | None = Field(
        default=0.4, description="Change of the strength of the season (at most 1) above which a series drifted."
    )
    max_drifted: NonNegativeFloat = Field(
        default=0.25, lt=1, description="Share of compared series that drifted above which the input drifted."
    )
    max_new: NonNegativeFloat = Field(
        default=0.5, le=1, description="Share of series the champion never saw above which the input drifted."
    )


class ArchiveConfig(Section):
    """Where forecasts are published, and found again when what they forecast has become known."""

    uri: str | None = Field(
        default=None,
        min_length=1,
        description="Folder or s3://bucket/prefix; null: forecasts/<registered model> in the home of the runs.",
    )
    endpoint_url: S3Endpoint = None

    @field_validator("uri")
    @classmethod
    def _place(cls, uri: str | None) -> str | None:
        if uri is not None:
            try:
                if is_remote(uri):
                    split_s3(uri, parameter="uri")
                else:
                    local_path(uri, parameter="uri")
            except UserError as error:
                raise ValueError(str(error).partition(": ")[2]) from None
        return uri


class PublishConfig(ArchiveConfig):
    """What the step that publishes forecasts is given."""

    name: str = Field(min_length=1, description="Registered model whose forecasts they are.")


class JudgeConfig(PublishConfig):
    """What the step that judges published forecasts is given."""

    max_forecasts: PositiveInt = Field(default=24, description="Published forecasts that are judged, the latest ones.")

    def fingerprint(self) -> str:
        """Which forecasts there are.

        Raises:
            UserError: the archive cannot be listed.
        """
        from modelmill.components.forecasting.archive import open_archive

        return open_archive(self).state()


class DegradationConfig(Section):
    """When a champion is to be retrained."""

    metric: Literal["sql", "mase", "wql"] = Field(default="sql", description="What it is judged by; lower is better.")
    max_ratio: PositiveFloat | None = Field(
        default=1.0,
        description="Error by that of Seasonal Naive over the same windows; shown to be above it, the champion has"
        " degraded. null: accuracy is no reason.",
    )
    on_drift: bool = Field(default=True, description="Whether drift of the input alone is a reason.")
    min_pairs: PositiveInt = Field(
        default=20,
        description="Windows of published forecasts from which on these decide; before, the rolling backtest does.",
    )
    min_new_points: NonNegativeInt = Field(
        default=1, description="Points since the champion's tuning without which a retraining would change nothing."
    )
    confidence: float = Field(default=0.95, gt=0.5, lt=1, description="One-sided confidence of the paired test.")
    resamples: int = Field(default=10_000, ge=100, le=1_000_000, description="Random signs that are drawn.")
    seed: NonNegativeInt = Field(default=0, lt=2**63, description="Of the draws.")
