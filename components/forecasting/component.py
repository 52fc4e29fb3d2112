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


@dsl.component(base_image=image("cpu"), install_kfp_package=False)
def tune_forecaster(
    section: str, series: dsl.Input[dsl.Dataset], base: dsl.Input[dsl.Model], manifest: dsl.Output[dsl.Model]
) -> None:
    """Tune a Chronos of any family on series, alone or in a search."""
    from modelmill.components.core.step import run_step
    from modelmill.components.forecasting.tune_forecaster import tune_forecaster as step

    run_step(step, section, {"series": series.path, "base": base.path}, {"manifest": manifest.path})


@dsl.component(base_image=image("cpu"), install_kfp_package=False)
def detect_drift(
    section: str,
    series: dsl.Input[dsl.Dataset],
    champion: dsl.Input[dsl.Model],
    manifest: dsl.Output[dsl.Artifact],
    report: dsl.Output[dsl.HTML],
    table: dsl.Output[dsl.Markdown],
) -> None:
    """Compare series with those that the champion was tuned on."""
    from modelmill.components.core.step import run_step
    from modelmill.components.forecasting.drift import detect_drift as step

    outputs = {"manifest": manifest.path, "report.html": report.path, "report.md": table.path}
    run_step(step, section, {"series": series.path, "champion": champion.path}, outputs)


@dsl.component(base_image=image("cpu"), install_kfp_package=False)
def judge_forecasts(
    section: str,
    series: dsl.Input[dsl.Dataset],
    champion: dsl.Input[dsl.Model],
    manifest: dsl.Output[dsl.Artifact],
    report: dsl.Output[dsl.HTML],
    table: dsl.Output[dsl.Markdown],
) -> None:
    """Judge the champion's published forecasts by what has become known."""
    from modelmill.components.core.step import run_step
    from modelmill.components.forecasting.judge_forecasts import judge_forecasts as step

    outputs = {"manifest": manifest.path, "report.html": report.path, "report.md": table.path}
    run_step(step, section, {"series": series.path, "champion": champion.path}, outputs)


@dsl.component(base_image=image("cpu"), install_kfp_package=False)
def publish_forecasts(
    section: str,
    forecasts: dsl.Input[dsl.Dataset],
    series: dsl.Input[dsl.Dataset],
    manifest: dsl.Output[dsl.Artifact],
    replaced: Optional[dsl.Input[dsl.Artifact]] = None,  # noqa: UP045 (kfp reads no `| None`)
) -> None:
    """Add a forecast to the archive, perhaps in place of an earlier one of the same series."""
    from modelmill.components.core.step import run_step
    from modelmill.components.forecasting.publish_forecasts import publish_forecasts as step

    inputs = {"forecasts": forecasts.path, "series": series.path}
    inputs |= {"replaced": replaced.path} if replaced is not None else {}
    run_step(step, section, inputs, {"manifest": manifest.path})


@dsl.component(base_image=image("cpu"), install_kfp_package=False)
def check_degradation(
    section: str,
    drift: dsl.Input[dsl.Artifact],
    judged: dsl.Input[dsl.Artifact],
    backtest: dsl.Input[dsl.Artifact],
    manifest: dsl.Output[dsl.Artifact],
    report: dsl.Output[dsl.Markdown],
) -> bool:
    """Say whether the champion is to be retrained."""
    from modelmill.components.core.step import run_step
    from modelmill.components.forecasting.degradation import check_degradation as step

    inputs = {"drift": drift.path, "judged": judged.path, "backtest": backtest.path}
    outputs = {"manifest": manifest.path, "report.md": report.path}
    return bool(run_step(step, section, inputs, outputs).metadata["found"])


@dsl.component(base_image=image("cpu"), install_kfp_package=False)
def search_chronos(
    section: str,
    series: dsl.Input[dsl.Dataset],
    base: dsl.Input[dsl.Model],
    manifest: dsl.Output[dsl.Model],
    report: dsl.Output[dsl.HTML],
    table: dsl.Output[dsl.Markdown],
    metrics: dsl.Output[dsl.Metrics],
) -> None:
    """Search for the best training of a Chronos."""
    from modelmill.components.core.step import run_step
    from modelmill.components.forecasting.search_chronos import search_chronos as step

    inputs = {"series": series.path, "base": base.path}
    outputs = {"manifest": manifest.path, "report.html": report.path, "report.md": table.path}
    for name, value in run_step(step, section, inputs, outputs).metrics.items():
        metrics.log_metric(name, value)


@dsl.component(base_image=image("cpu"), install_kfp_package=False)
def search_worker(
    section: str,
    worker: int,
    series: dsl.Input[dsl.Dataset],
    base: dsl.Input[dsl.Model],
    manifest: dsl.Output[dsl.Model],
) -> None:
    """Run trials of a search that other workers share."""
    from modelmill.components.core.step import run_step
    from modelmill.components.forecasting.search_chronos import search_worker as step

    inputs = {"series": series.path, "base": base.path}
    number = int(worker)  # loops make it a float
    run_step(step, section, inputs, {"manifest": manifest.path}, {"worker": number}, number)


@dsl.component(base_image=image("cpu"), install_kfp_package=False)
def select_trial(
    section: str,
    series: dsl.Input[dsl.Dataset],
    base: dsl.Input[dsl.Model],
    workers: dsl.Input[list[dsl.Model]],
    manifest: dsl.Output[dsl.Model],
    report: dsl.Output[dsl.HTML],
    table: dsl.Output[dsl.Markdown],
    metrics: dsl.Output[dsl.Metrics],
) -> None:
    """Take the best trial of all workers, or the base."""
    from modelmill.components.core.step import run_step
    from modelmill.components.forecasting.search_chronos import select_trial as step

    inputs = {"series": series.path, "base": base.path}
    inputs |= {f"worker_{number}": worker.path for number, worker in enumerate(workers)}
    outputs = {"manifest": manifest.path, "report.html": report.path, "report.md": table.path}
    for name, value in run_step(step, section, inputs, outputs).metrics.items():
        metrics.log_metric(name, value)
