"""Shells and DAG of the guarded sample; kfp reads no postponed annotations."""

from kfp import dsl

from tests.pipelines.sample.component import count_words as count
from tests.pipelines.sample.component import write_words as write


@dsl.component(base_image="python:3.11", install_kfp_package=False)
def is_long(section: str, words: dsl.Input[dsl.Artifact], manifest: dsl.Output[dsl.Artifact]) -> bool:
    """Whether there are enough words."""
    from modelmill.components.core.step import run_step
    from tests.pipelines.sample.guarded import is_long as step

    return bool(run_step(step, section, {"words": words.path}, {"manifest": manifest.path}).metadata["found"])


@dsl.component(base_image="python:3.11", install_kfp_package=False)
def report(section: str, status: dsl.PipelineTaskFinalStatus, manifest: dsl.Output[dsl.Artifact]) -> None:
    """Keep what the engine said."""
    from modelmill.components.core.step import run_step
    from tests.pipelines.sample.guarded import report as step

    ended = {"state": status.state, "error": status.error_message or ""}
    run_step(step, section, {}, {"manifest": manifest.path}, values={"status": ended})


_is_long, _report = is_long, report


@dsl.pipeline(name="guarded")
def guarded(write_words: str, is_long: str, count_words: str, report: str) -> None:
    """Write, count if long, report."""
    with dsl.ExitHandler(_report(section=report)):
        words = write(section=write_words).outputs["manifest"]
        answer = _is_long(section=is_long, words=words)
        with dsl.If(answer.outputs["Output"] == True):  # noqa: E712 (kfp overloads the comparison)
            count(section=count_words, words=words)
