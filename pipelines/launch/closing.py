"""KFP shell of the task that ends a run in MLflow; runs on a cluster only, as nobody watches them to their end."""

from kfp import dsl

from modelmill.components.core.images import image


@dsl.component(base_image=image("cpu"), install_kfp_package=False)
def close_run(status: dsl.PipelineTaskFinalStatus) -> None:
    """Say in MLflow how the run ended."""
    from modelmill.components.core.pod import close_run as close

    close(status.state)
