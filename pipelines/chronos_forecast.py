"""Train a small Chronos on made-up series, tune it on real ones, prove that tuning helped, register it and forecast.

Each parameter is one step's section of the recipe, as `modelmill.components.core.step.section` writes it.
"""

from kfp import dsl

from modelmill.components.evaluation import component as evaluation
from modelmill.components.forecasting import component as forecasting
from modelmill.components.registry import component as registry
from modelmill.pipelines.naming import named

_train_base = named(forecasting.train_chronos, "train_base")
_tune = named(forecasting.train_chronos, "tune")
_backtest_base = named(forecasting.backtest, "backtest_base")
_backtest_tuned = named(forecasting.backtest, "backtest_tuned")


@dsl.pipeline(name="chronos-forecast", description="Train, tune, backtest, register and use a small Chronos.")
def chronos_forecast(
    prepare_series: str,
    synthesise_series: str,
    train_base: str,
    tune: str,
    backtest_base: str,
    backtest_tuned: str,
    gate: str,
    register_model: str,
    promote: str,
    forecast: str,
) -> None:
    """Wire series and synthesis -> train -> tune -> backtest both -> gate -> register -> promote, and the forecast."""
    series = forecasting.prepare_series(section=prepare_series).outputs["manifest"]
    made = forecasting.synthesise_series(section=synthesise_series).outputs["manifest"]
    base = _train_base(section=train_base, series=made).outputs["manifest"]
    tuned = _tune(section=tune, series=series, base=base).outputs["manifest"]
    judged = evaluation.gate(
        section=gate,
        candidate=_backtest_tuned(section=backtest_tuned, series=series, model=tuned).outputs["manifest"],
        reference=_backtest_base(section=backtest_base, series=series, model=base).outputs["manifest"],
    ).outputs["manifest"]
    registered = registry.register_model(section=register_model, model=tuned, evaluation=judged)
    registry.promote(section=promote, registration=registered.outputs["manifest"], gate=judged)
    forecasting.forecast(section=forecast, series=series, model=tuned)
