"""Section `tuning` of a recipe: how a given Chronos is tuned, whatever its family. Torch-free."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from modelmill.components.core.recipe import Section
from modelmill.components.forecasting.chronos2_config import Chronos2TuneConfig
from modelmill.components.forecasting.chronos_train_config import ChronosTrainConfig
from modelmill.components.forecasting.search_config import SearchConfig
from modelmill.components.training.config import TrainingConfig


class ForecasterTuneConfig(Section):
    """One of three ways to tune a given Chronos; it must be of the family that is named."""

    chronos: ChronosTrainConfig | None = Field(
        default=None, description="All weights of a Chronos-T5 or Chronos-Bolt, on the training engine."
    )
    chronos2: Chronos2TuneConfig | None = Field(
        default=None, description="A Chronos-2 with the method of its library, all weights or LoRA."
    )
    search: SearchConfig | None = Field(
        default=None, description="Several trainings, of which the best is kept; the untuned model is one of them."
    )

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        given = [name for name in ("chronos", "chronos2", "search") if getattr(self, name) is not None]
        if len(given) != 1:
            what = " and ".join(given) + " are given" if given else "nothing is given"
            raise ValueError(
                f"chronos, chronos2, search: {what}; give chronos for a Chronos-T5 or Chronos-Bolt, chronos2 for a"
                " Chronos-2, or search with one of them inside"
            )
        if self.chronos is not None and self.chronos.model is not None:
            raise ValueError("chronos.model: the tuning starts from a given model; remove it")
        return self

    def training(self) -> TrainingConfig | None:
        """What the training engine is asked for; None where it trains nothing."""
        chronos = self.search.chronos if self.search is not None else self.chronos
        return chronos.training if chronos is not None else None
