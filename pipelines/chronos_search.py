"""Search for the best training of a Chronos with several workers at once, and judge the winner beside its base.

Each parameter is one step's section of the recipe, as `modelmill.components.core.step.section` writes it. The workers
are tasks of a loop whose length is fixed here; those beyond `search.max_parallel_jobs` end at once.
"""

from kfp import dsl

from modelmill.components.forecasting import component as forecasting
from modelmill.pipelines.naming import named

WORKERS = 4  # most trials at once; each is a task, so a recipe that wants more needs a longer list here
_train_base = named(forecasting.train_chronos, "train_base")
_backtest_base = named(forecasting.backtest, "backtest_base")
_backtest_tuned = named(forecasting.backtest, "backtest_tuned")


@dsl.pipeline(name="chronos-search", description="Search for the best training of a Chronos with several workers.")
def chronos_search(
    prepare_series: str,
    synthesise_series: str,
    train_base: str,
    search_worker: str,
    select_trial: str,
    backtest_base: str,
    backtest_tuned: str,
) -> None:
    """Wire series and synthesis -> train -> trials, fanned out -> select -> backtest of both."""
    series = forecasting.prepare_series(section=prepare_series).outputs["manifest"]
    made = forecasting.synthesise_series(section=synthesise_series).outputs["manifest"]
    base = _train_base(section=train_base, series=made).outputs["manifest"]
    with dsl.ParallelFor(items=list(range(WORKERS)), name="trials", parallelism=WORKERS) as worker:
        trials = forecasting.search_worker(section=search_worker, worker=worker, series=series, base=base)
    tuned = forecasting.select_trial(
        section=select_trial, series=series, base=base, workers=dsl.Collected(trials.outputs["manifest"])
    ).outputs["manifest"]
    _backtest_base(section=backtest_base, series=series, model=base)
    _backtest_tuned(section=backtest_tuned, series=series, model=tuned)
