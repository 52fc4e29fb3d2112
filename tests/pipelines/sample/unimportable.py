"""A shell whose step's module is missing, as with an image that was built without it."""

from kfp import dsl


@dsl.component(base_image="python:3.11", install_kfp_package=False)
def count_words(section: str, words: dsl.Input[dsl.Artifact], manifest: dsl.Output[dsl.Artifact]) -> None:
    """Count the words, if only the code were there."""
    from modelmill.components.core.step import run_step
    from tests.pipelines.sample.nowhere import count_words as step

    run_step(step, section, {"words": words.path}, {"manifest": manifest.path})
