"""Sections of the steps that only a scheduled retraining has."""

from __future__ import annotations

from pydantic import Field, PositiveInt

from modelmill.components.core.recipe import Section


class NewDataConfig(Section):
    """When a retraining is worth its cost."""

    min_records: PositiveInt = Field(
        default=1, description="Training records the champion has not seen, from which on a run goes on."
    )


class OutcomeConfig(Section):
    """Which registered model a retraining reports on."""

    name: str = Field(min_length=1, description="Registered model whose champion the run may have replaced.")
