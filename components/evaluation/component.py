"""KFP shell of the held-out evaluation. `section` is made by `modelmill.components.core.step.section`."""

from kfp import dsl

from modelmill.components.core.images import image


@dsl.component(base_image=image("cpu"), install_kfp_package=False)
def evaluate_heldout(
    section: str,
    model: dsl.Input[dsl.Model],
    tokens: dsl.Input[dsl.Dataset],
    manifest: dsl.Output[dsl.Artifact],
    report: dsl.Output[dsl.HTML],
    metrics: dsl.Output[dsl.Metrics],
) -> None:
    """Score a model on held-out text against n-gram baselines and write the report."""
    from modelmill.components.core.step import run_step
    from modelmill.components.evaluation.heldout import evaluate_heldout as step

    outputs = {"manifest": manifest.path, "report.html": report.path}
    result = run_step(step, section, {"model": model.path, "tokens": tokens.path}, outputs)
    for name, value in result.metrics.items():
        metrics.log_metric(name, value)
