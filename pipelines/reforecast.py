"""Forecast with the champion, judge what it forecast before, and retrain it when it degrades: the one to schedule.

Each parameter is one step's section of the recipe, as `modelmill.components.core.step.section` writes it. As long as
there is no reason to retrain, the run ends with the published forecast; nobody waits for a training to have it. A
tuned model that becomes the champion forecasts at once, and its forecast is published in place of the first. The last
step reports however the run ended.
"""

from kfp import dsl

from modelmill.components.evaluation import component as evaluation
from modelmill.components.forecasting import component as forecasting
from modelmill.components.registry import component as registry
from modelmill.pipelines.naming import named

_fetch_champion = named(registry.fetch_model, "fetch_champion")
_forecast_promoted = named(forecasting.forecast, "forecast_promoted")
_publish_promoted = named(forecasting.publish_forecasts, "publish_promoted")
_tune = named(forecasting.tune_forecaster, "tune")
_backtest_champion = named(forecasting.backtest, "backtest_champion")
_backtest_tuned = named(forecasting.backtest, "backtest_tuned")


@dsl.pipeline(name="reforecast", description="Forecast with the champion, and retrain it when it degrades.")
def reforecast(
    fetch_champion: str,
    prepare_series: str,
    detect_drift: str,
    forecast: str,
    publish_forecasts: str,
    judge_forecasts: str,
    backtest_champion: str,
    check_degradation: str,
    tune: str,
    backtest_tuned: str,
    gate: str,
    register_model: str,
    promote: str,
    forecast_promoted: str,
    publish_promoted: str,
    report_outcome: str,
) -> None:
    """Wire drift, forecast, publication, backtest -> degraded? -> tune -> gate -> register -> promote -> forecast."""
    with dsl.ExitHandler(registry.report_outcome(section=report_outcome)):
        champion = _fetch_champion(section=fetch_champion).outputs["manifest"]
        series = forecasting.prepare_series(section=prepare_series).outputs["manifest"]
        drift = forecasting.detect_drift(section=detect_drift, series=series, champion=champion)
        forecasts = forecasting.forecast(section=forecast, series=series, model=champion).outputs["manifest"]
        published = forecasting.publish_forecasts(section=publish_forecasts, forecasts=forecasts, series=series)
        judged = forecasting.judge_forecasts(section=judge_forecasts, series=series, champion=champion)
        theirs = _backtest_champion(section=backtest_champion, series=series, model=champion).outputs["manifest"]
        degraded = forecasting.check_degradation(
            section=check_degradation,
            drift=drift.outputs["manifest"],
            judged=judged.outputs["manifest"],
            backtest=theirs,
        )
        with dsl.If(degraded.outputs["Output"] == True, name="degraded"):  # noqa: E712 (kfp overloads the comparison)
            tuned = _tune(section=tune, series=series, base=champion).outputs["manifest"]
            ours = _backtest_tuned(section=backtest_tuned, series=series, model=tuned).outputs["manifest"]
            verdict = evaluation.gate(section=gate, candidate=ours, reference=theirs).outputs["manifest"]
            registered = registry.register_model(section=register_model, model=tuned, evaluation=verdict)
            promoted = registry.promote(section=promote, registration=registered.outputs["manifest"], gate=verdict)
            with dsl.If(promoted.outputs["Output"] == True, name="promoted"):  # noqa: E712
                anew = _forecast_promoted(section=forecast_promoted, series=series, model=tuned).outputs["manifest"]
                _publish_promoted(
                    section=publish_promoted, forecasts=anew, series=series, replaced=published.outputs["manifest"]
                )
