"""KFP shell of the registration. `section` is made by `modelmill.components.core.step.section`."""

from kfp import dsl

from modelmill.components.core.images import image


@dsl.component(base_image=image("cpu"), install_kfp_package=False)
def register_model(
    section: str,
    model: dsl.Input[dsl.Model],
    evaluation: dsl.Input[dsl.Artifact],
    manifest: dsl.Output[dsl.Artifact],
    model_card: dsl.Output[dsl.Markdown],
) -> None:
    """Register an evaluated model under an alias; the same weights are registered once."""
    from modelmill.components.core.step import run_step
    from modelmill.components.registry.register import register_model as step

    outputs = {"manifest": manifest.path, "model_card.md": model_card.path}
    run_step(step, section, {"model": model.path, "evaluation": evaluation.path}, outputs)


@dsl.component(base_image=image("cpu"), install_kfp_package=False)
def fetch_model(section: str, manifest: dsl.Output[dsl.Model]) -> None:
    """Take a model from a folder, the registry or the Hub, once for the whole pipeline."""
    from modelmill.components.core.step import run_step
    from modelmill.components.registry.fetch_model import fetch_model as step

    run_step(step, section, {}, {"manifest": manifest.path})
