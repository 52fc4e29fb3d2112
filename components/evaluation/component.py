"""KFP shells of the evaluations and the gate. `section` is made by `modelmill.components.core.step.section`."""

from typing import Optional

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


@dsl.component(base_image=image("cpu"), install_kfp_package=False)
def generate(
    section: str,
    model: dsl.Input[dsl.Model],
    instructions: dsl.Input[dsl.Dataset],
    manifest: dsl.Output[dsl.Artifact],
    samples: dsl.Output[dsl.Markdown],
    metrics: dsl.Output[dsl.Metrics],
) -> None:
    """Let a model answer the prompts of prepared conversations."""
    from modelmill.components.core.step import run_step
    from modelmill.components.evaluation.generate import generate as step

    inputs = {"model": model.path, "instructions": instructions.path}
    result = run_step(step, section, inputs, {"manifest": manifest.path, "samples.md": samples.path})
    for name, value in result.counts.items():
        metrics.log_metric(name, value)


@dsl.component(base_image=image("cpu"), install_kfp_package=False)
def score_answers(
    section: str,
    model: dsl.Input[dsl.Model],
    instructions: dsl.Input[dsl.Dataset],
    manifest: dsl.Output[dsl.Artifact],
    metrics: dsl.Output[dsl.Metrics],
) -> None:
    """Score how likely a model finds the reference answers of prepared conversations."""
    from modelmill.components.core.step import run_step
    from modelmill.components.evaluation.answers import score_answers as step

    inputs = {"model": model.path, "instructions": instructions.path}
    result = run_step(step, section, inputs, {"manifest": manifest.path})
    for name, value in result.metrics.items():
        metrics.log_metric(name, value)


@dsl.component(base_image=image("cpu"), install_kfp_package=False)
def score_texts(
    section: str,
    model: dsl.Input[dsl.Model],
    corpus: dsl.Input[dsl.Dataset],
    manifest: dsl.Output[dsl.Artifact],
    metrics: dsl.Output[dsl.Metrics],
) -> None:
    """Score how likely a model finds the documents of a corpus."""
    from modelmill.components.core.step import run_step
    from modelmill.components.evaluation.texts import score_texts as step

    inputs = {"model": model.path, "corpus": corpus.path}
    result = run_step(step, section, inputs, {"manifest": manifest.path})
    for name, value in result.metrics.items():
        metrics.log_metric(name, value)


@dsl.component(base_image=image("cpu"), install_kfp_package=False)
def score_generations(
    section: str,
    generations: dsl.Input[dsl.Artifact],
    manifest: dsl.Output[dsl.Artifact],
    report: dsl.Output[dsl.HTML],
    table: dsl.Output[dsl.Markdown],
    metrics: dsl.Output[dsl.Metrics],
) -> None:
    """Score what a model wrote against its references, with intervals, and keep each example's scores."""
    from modelmill.components.core.step import run_step
    from modelmill.components.evaluation.generation import score_generations as step

    outputs = {"manifest": manifest.path, "report.html": report.path, "report.md": table.path}
    result = run_step(step, section, {"generations": generations.path}, outputs)
    for name, value in result.metrics.items():
        metrics.log_metric(name, value)


@dsl.component(base_image=image("cpu"), install_kfp_package=False)
def gate(
    section: str,
    candidate: dsl.Input[dsl.Artifact],
    reference: dsl.Input[dsl.Artifact],
    manifest: dsl.Output[dsl.Artifact],
    report: dsl.Output[dsl.HTML],
    table: dsl.Output[dsl.Markdown],
    metrics: dsl.Output[dsl.Metrics],
    guard_candidate: Optional[dsl.Input[dsl.Artifact]] = None,  # noqa: UP045 (kfp reads no `| None`)
    guard_reference: Optional[dsl.Input[dsl.Artifact]] = None,  # noqa: UP045 (kfp reads no `| None`)
) -> bool:
    """Decide whether a candidate is better than the reference by enough; returns it, and never fails for a "no"."""
    from modelmill.components.core.step import run_step
    from modelmill.components.evaluation.gate import gate as step

    given = {"candidate": candidate, "reference": reference}
    given |= {"guard_candidate": guard_candidate, "guard_reference": guard_reference}
    inputs = {name: artifact.path for name, artifact in given.items() if artifact is not None}
    outputs = {"manifest": manifest.path, "report.html": report.path, "report.md": table.path}
    result = run_step(step, section, inputs, outputs)
    for name, value in result.metrics.items():
        metrics.log_metric(name, value)
    return bool(result.metadata["passed"])


@dsl.component(base_image=image("cpu"), install_kfp_package=False)
def score_preferences(
    section: str,
    model: dsl.Input[dsl.Model],
    preferences: dsl.Input[dsl.Dataset],
    manifest: dsl.Output[dsl.Artifact],
    metrics: dsl.Output[dsl.Metrics],
) -> None:
    """Score held-out pairs of answers by whether the model finds the better one more likely."""
    from modelmill.components.core.step import run_step
    from modelmill.components.evaluation.preferences import score_preferences as step

    inputs = {"model": model.path, "preferences": preferences.path}
    result = run_step(step, section, inputs, {"manifest": manifest.path})
    for name, value in result.metrics.items():
        metrics.log_metric(name, value)
