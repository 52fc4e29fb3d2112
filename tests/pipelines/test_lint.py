"""Every rule of the pipeline lint against a small pipeline that breaks it, and none against our own."""

import json
import sys
from collections.abc import Callable
from typing import Any, NamedTuple, Optional

import pytest
from kfp import dsl, kubernetes

from modelmill.components.core.errors import UserError
from modelmill.pipelines import catalog, plan
from modelmill.pipelines.launch.lint import ARGUMENT_LIMIT, check, lint
from tests.pipelines.sample.catalog import CATALOG

HERE = sys.modules[__name__]  # components have the names of the parameters, as in every pipeline of ours
_OURS = {"base_image": "python:3.11", "install_kfp_package": False}


@dsl.component(**_OURS)
def step(section: str) -> str:
    return section


@dsl.component(**_OURS)
def other(section: str) -> str:
    return section


@dsl.component(**_OURS)
def number(section: str) -> int:
    return len(section)


@dsl.component(**_OURS)
def texts(section: str) -> list:
    return [section]


@dsl.component(**_OURS)
def lists(section: str, values: list) -> None:
    print(section, values)


@dsl.component(**_OURS)
def named(section: str) -> NamedTuple("Outputs", configs=list):  # type: ignore[valid-type]
    return ([section],)


@dsl.component(**_OURS)
def make(section: str, manifest: dsl.Output[dsl.Artifact]) -> None:
    print(section, manifest)


@dsl.component(**_OURS)
def use(section: str, data: dsl.Input[dsl.Artifact]) -> None:
    print(section, data)


@dsl.container_component
def container(section: str):  # type: ignore[no-untyped-def] - kfp refuses other annotations
    return dsl.ContainerSpec(image="python:3.11", command=["echo", section])


@dsl.component(base_image="python:3.11", target_image="registry/python-step:1", install_kfp_package=False)
def baked(section: str) -> None:
    print(section)


@dsl.component(base_image="python:3.11", packages_to_install=["attrs"])
def installing(section: str) -> None:
    print(section)


@dsl.pipeline(name="inner")
def inner(section: str, extra: Optional[str] = None) -> None:  # noqa: UP045 - kfp reads this form
    step(section=section)


@dsl.pipeline(name="choice")
def choice(section: str) -> dsl.Artifact:
    with dsl.If(number(section=section).output > 1):
        a = make(section=section)
    with dsl.Else():
        b = make(section=section)
    return dsl.OneOf(a.outputs["manifest"], b.outputs["manifest"])


def text_condition(step: str) -> None:
    with dsl.If(HERE.step(section=step).output == "yes"):
        other(section=step)


def text_against_text(step: str) -> None:
    first = HERE.step(section=step)
    with dsl.If(first.output == other(section=step).output):
        number(section=step)


def container_task(container: str) -> None:
    HERE.container(section=container)


def target_image(baked: str) -> None:
    HERE.baked(section=baked)


def remote_importer(use: str) -> None:
    data = dsl.importer(artifact_uri="s3://bucket/data", artifact_class=dsl.Artifact)
    HERE.use(section=use, data=data.output)


def importer_of_a_parameter(use: str) -> None:
    HERE.use(section=use, data=dsl.importer(artifact_uri=use, artifact_class=dsl.Artifact).output)


def loop_over_a_named_output(named: str) -> None:
    with dsl.ParallelFor(HERE.named(section=named).outputs["configs"]) as item:
        step(section=item)


def loop_over_an_output(texts: str) -> None:
    with dsl.ParallelFor(HERE.texts(section=texts).output) as item:
        step(section=item)


def list_of_whole_numbers(lists: str) -> None:
    HERE.lists(section=lists, values=[1, 2])


def number_in_text(number: str) -> None:
    step(section=f"{HERE.number(section=number).output} rows")


def loop_item_in_text(step: str) -> None:
    with dsl.ParallelFor([1, 2]) as item:
        HERE.step(section=f"shard {item}")


def none_in_a_nested_pipeline(step: str) -> None:
    inner(section=step)


def none_parameter(step: str, extra: Optional[str] = None) -> None:  # noqa: UP045
    HERE.step(section=step)


def whole_number_parameter(step: str, rows: int = 3) -> None:
    HERE.step(section=step)


def artifact_parameter(use: str, data: dsl.Input[dsl.Artifact]) -> None:
    HERE.use(section=use, data=data)


def artifact_one_of(use: str) -> None:
    HERE.use(section=use, data=choice(section=use).output)


def volume(step: str) -> None:
    kubernetes.CreatePVC(access_modes=["ReadWriteMany"], size="1Gi", storage_class_name="fast")
    HERE.step(section=step)


def pip_at_run_time(installing: str) -> None:
    HERE.installing(section=installing)


def big_constant(step: str) -> None:
    HERE.step(section="x" * (ARGUMENT_LIMIT + 1))


def unfilled_placeholder(step: str) -> None:
    HERE.step(section=f"{dsl.PIPELINE_JOB_CREATE_TIME_UTC_PLACEHOLDER}")


def workspace(step: str) -> None:
    HERE.step(section=dsl.WORKSPACE_PATH_PLACEHOLDER)


def one_component_twice(step: str) -> None:
    HERE.step(section=step)
    HERE.step(section=step)


def foreign_task(step: str) -> None:
    HERE.step(section=step)
    other(section=step)


def step_without_a_task(step: str, other: str) -> None:
    HERE.step(section=step)


CASES: list[tuple[Callable[..., Any], str]] = [
    (text_condition, "condition of condition-1 compares text"),
    (text_against_text, "compares text"),
    (container_task, "task container is a container component"),
    (target_image, "task baked has a target_image"),
    (remote_importer, "importer importer: s3://bucket/data is remote"),
    (importer_of_a_parameter, "takes its URI from a parameter"),
    (loop_over_a_named_output, "runs over the named output 'configs' of named"),
    (loop_over_an_output, "a length that is not known when compiled"),
    (list_of_whole_numbers, "task lists: whole numbers in values (LIST) arrive as floats"),
    (number_in_text, "task step: a number put into the text of section reads 1.0"),
    (loop_item_in_text, "task step: a number put into the text of section reads 1.0"),
    (none_in_a_nested_pipeline, "task inner: parameter extra may be None"),
    (none_parameter, "parameter extra belongs to no step: it would be None"),
    (whole_number_parameter, "parameter rows is a NUMBER_INTEGER"),
    (artifact_parameter, "input artifact data: the local runner takes none"),
    (artifact_one_of, "is a dsl.OneOf over artifacts"),
    (volume, "task createpvc makes a volume"),
    (pip_at_run_time, "task installing installs packages while it runs"),
    (big_constant, "task step: the value of section takes 120 KiB"),
    (unfilled_placeholder, "uses dsl.PIPELINE_JOB_CREATE_TIME_UTC_PLACEHOLDER"),
    (one_component_twice, "task step-2 is no step of the recipe"),
    (foreign_task, "task other is no step of the recipe"),
    (step_without_a_task, "step other has no task"),
]


def sections_of(function: Callable[..., Any]) -> dict[str, str]:
    """A section for every text parameter without a default."""
    words = function.__annotations__
    return {name: json.dumps({"step": name}) for name, kind in words.items() if kind in (str, "str")}


def test_a_workspace_is_refused() -> None:
    """The local runner deletes it with the run, and a resumed run would miss it."""
    volume = dsl.PipelineConfig(workspace=dsl.WorkspaceConfig(size="1Gi"))
    compiled = dsl.pipeline(name="workspace", pipeline_config=volume)(workspace)
    assert any("WORKSPACE_PATH_PLACEHOLDER" in found for found in lint(compiled.pipeline_spec, sections_of(workspace)))


@pytest.mark.parametrize(("function", "problem"), CASES, ids=[function.__name__ for function, _ in CASES])
def test_a_bad_pipeline_is_refused_by_name(function: Callable[..., Any], problem: str) -> None:
    compiled = dsl.pipeline(name=function.__name__.replace("_", "-"))(function)
    problems = lint(compiled.pipeline_spec, sections_of(function))
    assert any(problem in found for found in problems), problems
    with pytest.raises(UserError):
        check(compiled.pipeline_spec, sections_of(function))


def good(step: str, number: str) -> None:
    """What may be done: conditions on numbers and booleans, loops over fixed lists of text."""
    rows = HERE.number(section=number)
    with dsl.If(rows.output > 3):
        HERE.step(section=step)


def test_conditions_on_numbers_are_allowed() -> None:
    compiled = dsl.pipeline(name="good")(good)
    assert lint(compiled.pipeline_spec, sections_of(good)) == []


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("x" * (ARGUMENT_LIMIT + 1), "section of step takes 120 KiB"),
        ("é" * (ARGUMENT_LIMIT // 6 + 1), "section of step takes 120 KiB"),  # kfp writes each as \u00e9
        ("{{$.inputs}}", "which kfp replaces"),
    ],
    ids=["long", "long when escaped", "placeholder"],
)
def test_a_section_kfp_cannot_carry_is_refused(text: str, problem: str) -> None:
    def only(step: str) -> None:
        HERE.step(section=step)

    compiled = dsl.pipeline(name="only")(only)
    assert any(problem in found for found in lint(compiled.pipeline_spec, {"step": text}))


def test_steps_that_differ_only_in_dashes_are_refused() -> None:
    def clash(step: str) -> None:
        HERE.step(section=step)

    compiled = dsl.pipeline(name="clash")(clash)
    problems = lint(compiled.pipeline_spec, {"step": "", "a_b": "", "a-b": ""})
    assert "steps a_b and a-b make one task name; rename one of them" in problems


@pytest.mark.parametrize("name", catalog.SHIPPED.recipe_names())
def test_our_own_pipelines_pass(name: str) -> None:
    recipe = catalog.SHIPPED.load(name)
    dag = catalog.resolve(catalog.SHIPPED.pipeline(recipe.pipeline).dag)
    sections = {step: text for step, (text, _) in plan.portable_sections(recipe).items()}
    assert lint(dag.pipeline_spec, sections) == []


def test_the_sample_passes() -> None:
    recipe = CATALOG.load("words")
    assert lint(catalog.resolve(CATALOG.pipeline("sample").dag).pipeline_spec, plan.sections(recipe)) == []
