"""Tune a given Chronos on series, prove on windows it never saw that tuning helped, register it and forecast.

Each parameter is one step's section of the recipe, as `modelmill.components.core.step.section` writes it. The section
of `tune` says of which family the model is. The last step reports however the run ended.
"""

from kfp import dsl

from modelmill.components.evaluation import component as evaluation
from modelmill.components.forecasting import component as forecasting
from modelmill.components.registry import component as registry
from modelmill.pipelines.naming import named

_tune = named(forecasting.tune_forecaster, "tune")
_backtest_base = named(forecasting.backtest, "backtest_base")
_backtest_tuned = named(forecasting.backtest, "backtest_tuned")


@dsl.pipeline(name="chronos-tune", description="Tune, backtest, register and use a Chronos of any family.")
def chronos_tune(
    fetch_model: str,
    prepare_series: str,
    tune: str,
    backtest_base: str,
    backtest_tuned: str,
    gate: str,
    register_model: str,
    promote: str,
    forecast: str,
    report_outcome: str,
) -> None:
    """Wire fetch and series -> tune -> backtest both -> gate -> register -> promote, and the forecast."""
    with dsl.ExitHandler(registry.report_outcome(section=report_outcome)):
        base = registry.fetch_model(section=fetch_model).outputs["manifest"]
        series = forecasting.prepare_series(section=prepare_series).outputs["manifest"]
        tuned = _tune(section=tune, series=series, base=base).outputs["manifest"]
        judged = evaluation.gate(
            section=gate,
            candidate=_backtest_tuned(section=backtest_tuned, series=series, model=tuned).outputs["manifest"],
            reference=_backtest_base(section=backtest_base, series=series, model=base).outputs["manifest"],
        ).outputs["manifest"]
        registered = registry.register_model(section=register_model, model=tuned, evaluation=judged)
        registry.promote(section=promote, registration=registered.outputs["manifest"], gate=judged)
        forecasting.forecast(section=forecast, series=series, model=tuned)
