"""Serve a registered model by SageMaker, try it, and delete the endpoint however the run ends.

Each parameter is one step's section of the recipe, as `modelmill.components.core.step.section` writes it.
"""

from kfp import dsl

from modelmill.components.registry import component as registry


@dsl.pipeline(name="deploy-forecaster", description="Serve a registered model, try it, and leave nothing behind.")
def deploy_forecaster(
    fetch_model: str,
    package_model: str,
    deploy_endpoint: str,
    invoke_endpoint: str,
    delete_endpoint: str,
) -> None:
    """Wire fetch -> package -> deploy -> invoke, and the deletion as exit handler."""
    with dsl.ExitHandler(registry.delete_endpoint(section=delete_endpoint)):
        model = registry.fetch_model(section=fetch_model).outputs["manifest"]
        package = registry.package_model(section=package_model, model=model).outputs["manifest"]
        endpoint = registry.deploy_endpoint(section=deploy_endpoint, package=package).outputs["manifest"]
        registry.invoke_endpoint(section=invoke_endpoint, package=package, endpoint=endpoint)
