"""KFP shells of the registry. `section` is made by `modelmill.components.core.step.section`."""

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


@dsl.component(base_image=image("cpu"), install_kfp_package=False)
def register_tuned(
    section: str,
    model: dsl.Input[dsl.Model],
    evaluation: dsl.Input[dsl.Artifact],
    instructions: dsl.Input[dsl.Dataset],
    manifest: dsl.Output[dsl.Artifact],
    model_card: dsl.Output[dsl.Markdown],
) -> None:
    """Register a judged model with the ids of the records it learnt from."""
    from modelmill.components.core.step import run_step
    from modelmill.components.registry.register import register_model as step

    inputs = {"model": model.path, "evaluation": evaluation.path, "instructions": instructions.path}
    run_step(step, section, inputs, {"manifest": manifest.path, "model_card.md": model_card.path})


@dsl.component(base_image=image("cpu"), install_kfp_package=False)
def promote(
    section: str,
    registration: dsl.Input[dsl.Artifact],
    gate: dsl.Input[dsl.Artifact],
    manifest: dsl.Output[dsl.Artifact],
    report: dsl.Output[dsl.Markdown],
) -> bool:
    """Make a version that passed its gate the champion, and say whether it is that; a gate that failed is a result."""
    from modelmill.components.core.step import run_step
    from modelmill.components.registry.promote import promote as step

    outputs = {"manifest": manifest.path, "report.md": report.path}
    found = run_step(step, section, {"registration": registration.path, "gate": gate.path}, outputs).metadata
    return bool(found["champion"] == found["version"])


@dsl.component(base_image=image("cpu"), install_kfp_package=False)
def mirror_to_sagemaker(
    section: str,
    registration: dsl.Input[dsl.Artifact],
    promotion: dsl.Input[dsl.Artifact],
    manifest: dsl.Output[dsl.Artifact],
) -> None:
    """Let the SageMaker Model Registry follow a promotion."""
    from modelmill.components.core.step import run_step
    from modelmill.components.registry.sagemaker_mirror import mirror_to_sagemaker as step

    inputs = {"registration": registration.path, "promotion": promotion.path}
    run_step(step, section, inputs, {"manifest": manifest.path})


@dsl.component(base_image=image("cpu"), install_kfp_package=False)
def find_new_data(
    section: str, data: dsl.Input[dsl.Dataset], champion: dsl.Input[dsl.Model], manifest: dsl.Output[dsl.Artifact]
) -> bool:
    """Say whether there is enough that the champion has not been trained on."""
    from modelmill.components.core.step import run_step
    from modelmill.components.registry.new_data import find_new_data as step

    inputs = {"data": data.path, "champion": champion.path}
    return bool(run_step(step, section, inputs, {"manifest": manifest.path}).metadata["found"])


@dsl.component(base_image=image("cpu"), install_kfp_package=False)
def report_outcome(
    section: str,
    status: dsl.PipelineTaskFinalStatus,
    manifest: dsl.Output[dsl.Artifact],
    report: dsl.Output[dsl.Markdown],
) -> None:
    """Report what the run came to, however it ended."""
    from modelmill.components.core.step import run_step
    from modelmill.components.registry.outcome import report_outcome as step

    ended = {"state": status.state, "error": status.error_message or ""}
    outputs = {"manifest": manifest.path, "report.md": report.path}
    run_step(step, section, {}, outputs, values={"status": ended})


@dsl.component(base_image=image("cpu"), install_kfp_package=False)
def package_model(section: str, model: dsl.Input[dsl.Model], manifest: dsl.Output[dsl.Artifact]) -> None:
    """Pack a model with its serving code and make a SageMaker model package of it."""
    from modelmill.components.core.step import run_step
    from modelmill.components.registry.sagemaker_package import package_model as step

    run_step(step, section, {"model": model.path}, {"manifest": manifest.path})


@dsl.component(base_image=image("cpu"), install_kfp_package=False)
def deploy_endpoint(section: str, package: dsl.Input[dsl.Artifact], manifest: dsl.Output[dsl.Artifact]) -> None:
    """Serve a model package by an endpoint of this run."""
    from modelmill.components.core.step import run_step
    from modelmill.components.registry.sagemaker_endpoint import deploy_endpoint as step

    run_step(step, section, {"package": package.path}, {"manifest": manifest.path})


@dsl.component(base_image=image("cpu"), install_kfp_package=False)
def invoke_endpoint(
    section: str,
    package: dsl.Input[dsl.Artifact],
    endpoint: dsl.Input[dsl.Artifact],
    manifest: dsl.Output[dsl.Artifact],
) -> None:
    """Ask the endpoint what it must answer, and what it must refuse."""
    from modelmill.components.core.step import run_step
    from modelmill.components.registry.sagemaker_endpoint import invoke_endpoint as step

    run_step(step, section, {"package": package.path, "endpoint": endpoint.path}, {"manifest": manifest.path})


@dsl.component(base_image=image("cpu"), install_kfp_package=False)
def delete_endpoint(section: str, status: dsl.PipelineTaskFinalStatus, manifest: dsl.Output[dsl.Artifact]) -> None:
    """Delete what this run has deployed, however it ended."""
    from modelmill.components.core.step import run_step
    from modelmill.components.registry.sagemaker_deletion import delete_endpoint as step

    run_step(step, section, {}, {"manifest": manifest.path}, values={"status": {"state": status.state}})
