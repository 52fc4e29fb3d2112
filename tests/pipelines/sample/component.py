"""KFP shells of the sample steps."""

from kfp import dsl


@dsl.component(base_image="python:3.11", install_kfp_package=False)
def write_words(section: str, manifest: dsl.Output[dsl.Artifact]) -> None:
    """Write the words."""
    from modelmill.components.core.step import run_step
    from tests.pipelines.sample.steps import write_words as step

    run_step(step, section, {}, {"manifest": manifest.path})


@dsl.component(base_image="python:3.11", install_kfp_package=False)
def count_words(section: str, words: dsl.Input[dsl.Artifact], manifest: dsl.Output[dsl.Artifact]) -> None:
    """Count them."""
    from modelmill.components.core.step import run_step
    from tests.pipelines.sample.steps import count_words as step

    run_step(step, section, {"words": words.path}, {"manifest": manifest.path})


@dsl.component(base_image="python:3.11", install_kfp_package=False)
def announce(section: str, count: dsl.Input[dsl.Artifact], manifest: dsl.Output[dsl.Artifact]) -> None:
    """Announce the count."""
    from modelmill.components.core.step import run_step
    from tests.pipelines.sample.steps import announce as step

    run_step(step, section, {"count": count.path}, {"manifest": manifest.path})


@dsl.component(base_image="python:3.11", install_kfp_package=False)
def archive(section: str, announcement: dsl.Input[dsl.Artifact], manifest: dsl.Output[dsl.Artifact]) -> None:
    """Archive the announcement."""
    from modelmill.components.core.step import run_step
    from tests.pipelines.sample.steps import archive as step

    run_step(step, section, {"announcement": announcement.path}, {"manifest": manifest.path})
