"""Shells and DAG of the sample with a loop; kfp reads no postponed annotations."""

from kfp import dsl

TASKS = 3  # as `fanned.TASKS`


@dsl.component(base_image="python:3.11", install_kfp_package=False)
def draw_number(section: str, number: int, manifest: dsl.Output[dsl.Artifact]) -> None:
    """Draw the task's own number."""
    from modelmill.components.core.step import run_step
    from tests.pipelines.sample.fanned import draw_number as step

    run_step(step, section, {}, {"manifest": manifest.path}, {"number": int(number)}, int(number))


@dsl.component(base_image="python:3.11", install_kfp_package=False)
def add_numbers(section: str, numbers: dsl.Input[list[dsl.Artifact]], manifest: dsl.Output[dsl.Artifact]) -> None:
    """Add what was drawn."""
    from modelmill.components.core.step import run_step
    from tests.pipelines.sample.fanned import add_numbers as step

    inputs = {f"number_{index}": each.path for index, each in enumerate(numbers)}
    run_step(step, section, inputs, {"manifest": manifest.path})


_draw, _add = draw_number, add_numbers


@dsl.pipeline(name="fanned")
def fanned(draw_number: str, add_numbers: str) -> None:
    """Draw in a loop, add."""
    with dsl.ParallelFor(items=list(range(TASKS)), name="tasks", parallelism=TASKS) as number:
        drawn = _draw(section=draw_number, number=number)
    _add(section=add_numbers, numbers=dsl.Collected(drawn.outputs["manifest"]))


@dsl.component(base_image="python:3.11", install_kfp_package=False)
def missing(section: str, number: int, manifest: dsl.Output[dsl.Artifact]) -> None:
    """Draw the task's own number, if only the code of the last task were there."""
    from modelmill.components.core.step import run_step
    from tests.pipelines.sample.fanned import draw_number as step

    if int(number) == 2:
        from tests.pipelines.sample.nowhere import draw_number as step
    run_step(step, section, {}, {"manifest": manifest.path}, {"number": int(number)}, int(number))


missing.component_spec.name = "draw-number"


@dsl.pipeline(name="fanned-unimportable")
def fanned_unimportable(draw_number: str, add_numbers: str) -> None:
    """The same with one task whose module cannot be imported."""
    with dsl.ParallelFor(items=list(range(TASKS)), name="tasks", parallelism=TASKS) as number:
        drawn = missing(section=draw_number, number=number)
    _add(section=add_numbers, numbers=dsl.Collected(drawn.outputs["manifest"]))
