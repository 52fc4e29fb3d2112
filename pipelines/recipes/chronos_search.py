"""The recipe of the `chronos_search` pipeline."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from modelmill.components.core.recipe import PlannedStep, Recipe
from modelmill.components.forecasting.backtest_config import BacktestConfig
from modelmill.components.forecasting.chronos_train_config import BoltConfig, ChronosTrainConfig
from modelmill.components.forecasting.search_config import SearchConfig
from modelmill.components.forecasting.series_config import SeriesConfig, SynthesisConfig
from modelmill.components.training.config import TrainingConfig

_FORECASTING = "modelmill.components.forecasting"
_WORKERS = 4  # tasks of the pipeline's loop; not imported from there, since that would import kfp


class ChronosSearchRecipe(Recipe):
    """Train a small Chronos on made-up series, and search for its best training on real ones with several workers."""

    pipeline: Literal["chronos_search"]
    series: SeriesConfig = Field(description="What is forecast; its last windows are for the backtest.")
    synthesis: SynthesisConfig = Field(description="Made-up series that the base learns from.")
    model: BoltConfig = Field(default=BoltConfig(), description="Sizes of the base.")
    pretraining: TrainingConfig = Field(description="Training of the base.")
    short_contexts: float = Field(
        default=0.5, ge=0, le=1, description="Share of windows in it whose context is cut to a random length."
    )
    search: SearchConfig = Field(description="Which trainings of the base are tried.")
    backtest: BacktestConfig = Field(default=BacktestConfig(), description="Windows, quantiles and baselines.")

    @model_validator(mode="after")
    def _sections_fit(self) -> Self:
        if self.search.max_parallel_jobs > _WORKERS:
            raise ValueError(
                f"search.max_parallel_jobs: {self.search.max_parallel_jobs} is more than the {_WORKERS} workers of"
                " this pipeline; lower it"
            )
        if self.search.chronos is None:
            raise ValueError("search.chronos2: the base of this pipeline is a Chronos-Bolt; write search.chronos")
        if self.synthesis.mixup is not None:
            raise ValueError("synthesis.mixup: there are no series to mix here; use kernel alone")
        self.pretrain()
        return self

    def pretrain(self) -> ChronosTrainConfig:
        """Section of the base's training."""
        return ChronosTrainConfig(model=self.model, short_contexts=self.short_contexts, training=self.pretraining)

    def check_local(self) -> None:
        """See `Recipe.check_local`: the layout, precision and accelerator must be ones that this machine has."""
        from modelmill.components.training.launch import LocalLauncher

        assert self.search.chronos is not None
        for training in (self.pretraining, self.search.chronos.training):
            LocalLauncher().check(training)

    def headline(self) -> list[str]:
        name = f"validation_{self.search.metric}"
        return [f"select_trial.{name}", f"select_trial.zero_shot_{name}", "backtest_tuned.sql", "backtest_base.sql"]

    def steps(self) -> list[PlannedStep]:
        given = {"series": "prepare_series", "base": "train_base"}
        backtest, series = f"{_FORECASTING}.backtest:backtest", {"series": "prepare_series"}
        # The baselines are the same for both models; they are fitted and shown once.
        alone = self.backtest.model_copy(update={"baselines": []})
        search = f"{_FORECASTING}.search_chronos"
        return [
            PlannedStep("prepare_series", self.series, f"{_FORECASTING}.series:prepare_series"),
            PlannedStep("synthesise_series", self.synthesis, f"{_FORECASTING}.synthesise:synthesise_series"),
            PlannedStep(
                "train_base",
                self.pretrain(),
                f"{_FORECASTING}.train_chronos:train_chronos",
                {"series": "synthesise_series"},
            ),
            PlannedStep("search_worker", self.search, f"{search}:search_worker", given, _WORKERS),
            PlannedStep("select_trial", self.search, f"{search}:select_trial", {**given, "workers": "search_worker"}),
            PlannedStep("backtest_base", alone, backtest, {"model": "train_base", **series}),
            PlannedStep("backtest_tuned", self.backtest, backtest, {"model": "select_trial", **series}),
        ]
