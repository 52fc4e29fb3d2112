"""KFP shells of the embedding steps. `section` is made by `modelmill.components.core.step.section`."""

from kfp import dsl

from modelmill.components.core.images import image


@dsl.component(base_image=image("cpu"), install_kfp_package=False)
def prepare_pairs(section: str, manifest: dsl.Output[dsl.Dataset]) -> None:
    """Read pairs of texts that belong together, and hold some out."""
    from modelmill.components.core.step import run_step
    from modelmill.components.embedding.pairs import prepare_pairs as step

    run_step(step, section, {}, {"manifest": manifest.path})


@dsl.component(base_image=image("cpu"), install_kfp_package=False)
def finetune_embedding(
    section: str, pairs: dsl.Input[dsl.Dataset], base: dsl.Input[dsl.Model], manifest: dsl.Output[dsl.Model]
) -> None:
    """Tune an embedding model, so that questions lie near the texts that belong to them."""
    from modelmill.components.core.step import run_step
    from modelmill.components.embedding.finetune_embedding import finetune_embedding as step

    run_step(step, section, {"pairs": pairs.path, "base": base.path}, {"manifest": manifest.path})


@dsl.component(base_image=image("cpu"), install_kfp_package=False)
def evaluate_retrieval(
    section: str,
    model: dsl.Input[dsl.Model],
    pairs: dsl.Input[dsl.Dataset],
    manifest: dsl.Output[dsl.Artifact],
    report: dsl.Output[dsl.Markdown],
    metrics: dsl.Output[dsl.Metrics],
) -> None:
    """Measure how well a model finds held-out texts by their questions, and keep each question's scores."""
    from modelmill.components.core.step import run_step
    from modelmill.components.embedding.evaluate_retrieval import evaluate_retrieval as step

    outputs = {"manifest": manifest.path, "report.md": report.path}
    result = run_step(step, section, {"model": model.path, "pairs": pairs.path}, outputs)
    for name, value in result.metrics.items():
        metrics.log_metric(name, value)
