"""KFP shells of the forecasting steps. `section` is made by `modelmill.components.core.step.section`."""

from typing import Optional

from kfp import dsl

from modelmill.components.core.images import image


@dsl.component(base_image=image("cpu"), install_kfp_package=False)
def prepare_series(
    section: str,
    manifest: dsl.Output[dsl.Dataset],
    report: dsl.Output[dsl.HTML],
    table: dsl.Output[dsl.Markdown],
) -> None:
    """Read, check and store real series."""
    from modelmill.components.core.step import run_step
    from modelmill.components.forecasting.series import prepare_series as step

    run_step(step, section, {}, {"manifest": manifest.path, "report.html": report.path, "report.md": table.path})


@dsl.component(base_image=image("cpu"), install_kfp_package=False)
def synthesise_series(
    section: str,
    manifest: dsl.Output[dsl.Dataset],
    report: dsl.Output[dsl.HTML],
    table: dsl.Output[dsl.Markdown],
    series: Optional[dsl.Input[dsl.Dataset]] = None,  # noqa: UP045 (kfp reads no `| None`)
) -> None:
    """Make series from Gaussian processes, or mix them from given ones."""
    from modelmill.components.core.step import run_step
    from modelmill.components.forecasting.synthesise import synthesise_series as step

    inputs = {"series": series.path} if series is not None else {}
    run_step(step, section, inputs, {"manifest": manifest.path, "report.html": report.path, "report.md": table.path})


@dsl.component(base_image=image("cpu"), install_kfp_package=False)
def backtest(
    section: str,
    series: dsl.Input[dsl.Dataset],
    manifest: dsl.Output[dsl.Artifact],
    report: dsl.Output[dsl.HTML],
    table: dsl.Output[dsl.Markdown],
    metrics: dsl.Output[dsl.Metrics],
    model: Optional[dsl.Input[dsl.Model]] = None,  # noqa: UP045 (kfp reads no `| None`)
) -> None:
    """Judge a model, or the best baseline, on rolling origins."""
    from modelmill.components.core.step import run_step
    from modelmill.components.forecasting.backtest import backtest as step

    inputs = {"series": series.path} | ({"model": model.path} if model is not None else {})
    outputs = {"manifest": manifest.path, "report.html": report.path, "report.md": table.path}
    for name, value in run_step(step, section, inputs, outputs).metrics.items():
        metrics.log_metric(name, value)


@dsl.component(base_image=image("cpu"), install_kfp_package=False)
def forecast(
    section: str,
    series: dsl.Input[dsl.Dataset],
    model: dsl.Input[dsl.Model],
    manifest: dsl.Output[dsl.Dataset],
    report: dsl.Output[dsl.HTML],
    table: dsl.Output[dsl.Markdown],
) -> None:
    """Forecast what follows every series."""
    from modelmill.components.core.step import run_step
    from modelmill.components.forecasting.forecast import forecast as step

    outputs = {"manifest": manifest.path, "report.html": report.path, "report.md": table.path}
    run_step(step, section, {"series": series.path, "model": model.path}, outputs)


@dsl.component(base_image=image("cpu"), install_kfp_package=False)
def train_chronos(
    section: str,
    series: dsl.Input[dsl.Dataset],
    manifest: dsl.Output[dsl.Model],
    base: Optional[dsl.Input[dsl.Model]] = None,  # noqa: UP045 (kfp reads no `| None`)
) -> None:
    """Train a new Chronos on series, or tune a given one."""
    from modelmill.components.core.step import run_step
    from modelmill.components.forecasting.train_chronos import train_chronos as step

    inputs = {"series": series.path} | ({"base": base.path} if base is not None else {})
    run_step(step, section, inputs, {"manifest": manifest.path})


@dsl.component(base_image=image("cpu"), install_kfp_package=False)
def benchmark(
    section: str,
    manifest: dsl.Output[dsl.Artifact],
    report: dsl.Output[dsl.HTML],
    table: dsl.Output[dsl.Markdown],
    metrics: dsl.Output[dsl.Metrics],
    model: Optional[dsl.Input[dsl.Model]] = None,  # noqa: UP045 (kfp reads no `| None`)
) -> None:
    """Judge a model on the tasks of a public benchmark."""
    from modelmill.components.core.step import run_step
    from modelmill.components.forecasting.benchmark import benchmark as step

    inputs = {"model": model.path} if model is not None else {}
    outputs = {"manifest": manifest.path, "report.html": report.path, "report.md": table.path}
    for name, value in run_step(step, section, inputs, outputs).metrics.items():
        metrics.log_metric(name, value)


@dsl.component(base_image=image("cpu"), install_kfp_package=False)
def tune_chronos2(
    section: str, series: dsl.Input[dsl.Dataset], base: dsl.Input[dsl.Model], manifest: dsl.Output[dsl.Model]
) -> None:
    """Tune a Chronos-2 on series, all weights or LoRA."""
    from modelmill.components.core.step import run_step
    from modelmill.components.forecasting.tune_chronos2 import tune_chronos2 as step

    run_step(step, section, {"series": series.path, "base": base.path}, {"manifest": manifest.path})
