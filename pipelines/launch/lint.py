"""Refuse pipelines that kfp's local runner would run wrongly, slowly or dangerously; one sentence a problem.

The rules read the compiled pipeline (KFP IR), so they see what kfp will see. Each was observed with kfp 2.17; several
are silent there: a condition on a string is skipped and the pipeline succeeds, a whole number in a list becomes a
float, text in `{{$...}}` is replaced inside a parameter's value.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from modelmill.components.core.errors import UserError
from modelmill.pipelines.launch.references import dangling

ARGUMENT_LIMIT = 120 * 1024  # bytes; Linux takes 128 KiB in one argument, on a laptop and in a pod alike
_EXECUTOR = "kfp.dsl.executor_main"
_CHANNEL = re.compile(r"inputs\.parameter_values\['([^']+)'\]")
_PLACEHOLDER = re.compile(r"\{\{\$\.inputs\.parameters\['([^']+)'\]\}\}")
_UNSUPPORTED = {
    "{{$.pipeline_job_resource_name}}": "PIPELINE_JOB_RESOURCE_NAME_PLACEHOLDER",
    "{{$.pipeline_job_create_time_utc}}": "PIPELINE_JOB_CREATE_TIME_UTC_PLACEHOLDER",
    "{{$.pipeline_job_schedule_time_utc}}": "PIPELINE_JOB_SCHEDULE_TIME_UTC_PLACEHOLDER",
    "{{$.workspace_path}}": "WORKSPACE_PATH_PLACEHOLDER",
}
_WHOLE_LISTS = ("LIST", "STRUCT")


@dataclass(frozen=True)
class _Task:
    """A task anywhere in the pipeline, with the DAG it stands in."""

    name: str
    spec: Mapping[str, Any]
    component: Mapping[str, Any]
    scope: Mapping[str, Any]  # parameters of the surrounding DAG
    siblings: Mapping[str, Mapping[str, Any]]  # components of the tasks beside it

    @property
    def inputs(self) -> Mapping[str, Any]:
        return self.spec.get("inputs", {}).get("parameters", {})

    @property
    def declared(self) -> Mapping[str, Any]:
        return self.component.get("inputDefinitions", {}).get("parameters", {})

    @property
    def is_dag(self) -> bool:
        return "dag" in self.component

    def type_of(self, channel: str) -> str:
        """KFP type of a value this task receives, wherever it comes from."""
        source = self.inputs.get(channel, {})
        if output := source.get("taskOutputParameter"):
            producer = self.siblings.get(output["producerTask"], {}).get("outputDefinitions", {})
            return producer.get("parameters", {}).get(output["outputParameterKey"], {}).get("parameterType", "")
        known = {**self.scope, **self.declared}
        return known.get(source.get("componentInputParameter", channel), {}).get("parameterType", "")


def check(pipeline_spec: Any, sections: Mapping[str, str]) -> None:
    """Raise one line for a pipeline that must not run.

    Args:
        pipeline_spec: the compiled pipeline (`pipeline.pipeline_spec`).
        sections: step -> its section; the pipeline takes exactly these parameters.

    Raises:
        UserError: every problem found, naming the task and the fix.
    """
    if problems := lint(pipeline_spec, sections):
        raise UserError(f"pipeline: {'; '.join(problems)}")


def lint(pipeline_spec: Any, sections: Mapping[str, str]) -> list[str]:
    """Problems of a compiled pipeline, one sentence each: see `check`."""
    from google.protobuf import json_format

    spec = json_format.MessageToDict(pipeline_spec)
    tasks = list(_tasks(spec["root"], spec.get("components", {})))
    executors = spec.get("deploymentSpec", {}).get("executors", {})
    problems = [*_parameters(spec["root"], sections), *_names(tasks, executors, sections), *_sizes(sections)]
    for task in tasks:
        problems += [*_condition(task), *_loop(task), *_numbers(task), *_missing(task), *_placeholders(task)]
        if not task.is_dag:
            problems += _executor(task, executors.get(task.component.get("executorLabel", ""), {}))
    problems += dangling(spec)
    for name, dag in [("pipeline", spec["root"]), *spec.get("components", {}).items()]:
        problems += _outputs(name.removeprefix("comp-"), dag)
    return list(dict.fromkeys(problems))


def check_references(pipeline_spec: Any) -> None:
    """Raise one line for a compiled pipeline that names what it does not define.

    Raises:
        UserError: every dangling reference.
    """
    from google.protobuf import json_format

    if problems := list(dangling(json_format.MessageToDict(pipeline_spec))):
        raise UserError(f"pipeline: {'; '.join(problems)}")


def _tasks(dag: Mapping[str, Any], components: Mapping[str, Any]) -> Iterator[_Task]:
    specs = dag.get("dag", {}).get("tasks", {})
    siblings = {name: components.get(spec.get("componentRef", {}).get("name", ""), {}) for name, spec in specs.items()}
    scope = dag.get("inputDefinitions", {}).get("parameters", {})
    for name, spec in specs.items():
        yield _Task(name, spec, siblings[name], scope, siblings)
        yield from _tasks(siblings[name], components)


def _parameters(root: Mapping[str, Any], sections: Mapping[str, str]) -> Iterator[str]:
    definitions = root.get("inputDefinitions", {})
    for name in definitions.get("artifacts", {}):
        yield f"input artifact {name}: the local runner takes none; let a step read it from a path in its section"
    parameters = definitions.get("parameters", {})
    for name, definition in parameters.items():
        if definition.get("parameterType") != "STRING":
            kind = definition.get("parameterType", "unknown")
            yield f"parameter {name} is a {kind}: every parameter is one step's section; declare `{name}: str`"
        elif name not in sections:
            none = definition.get("isOptional") and "defaultValue" not in definition
            fix = "it would be None, which the local runner refuses; " if none else ""
            yield f"parameter {name} belongs to no step: {fix}name it as the step that receives it, or remove it"
    for name in sections:
        if name not in parameters:
            yield f"step {name} has no parameter: add `{name}: str` to the pipeline"


def _names(tasks: list[_Task], executors: Mapping[str, Any], sections: Mapping[str, str]) -> Iterator[str]:
    """A task is found by its step's name with dashes, so both must be unique and belong together."""
    dashed: dict[str, str] = {}
    for step in sections:
        other = dashed.setdefault(step.replace("_", "-"), step)
        if other != step:
            yield f"steps {other} and {step} make one task name; rename one of them"
    seen: list[str] = []
    for task in tasks:
        if task.is_dag or "importer" in executors.get(task.component.get("executorLabel", ""), {}):
            continue
        if task.name in seen:
            yield f"task {task.name} appears twice; call .set_display_name on neither, give one step a name of its own"
        seen.append(task.name)
        if task.name not in dashed:
            yield f"task {task.name} is no step of the recipe; name the component (or the step) so that they agree"
    for name, step in dashed.items():
        if name not in seen:
            yield f"step {step} has no task; call its component in the pipeline"


def _sizes(sections: Mapping[str, str]) -> Iterator[str]:
    for step, text in sections.items():
        size = len(json.dumps(text))  # as kfp writes it on the command line
        if size > ARGUMENT_LIMIT:
            limit = ARGUMENT_LIMIT // 1024
            yield f"section of {step} takes {size // 1024} KiB, over the {limit} KiB of one argument; put it in a file"
        if "{{$" in text:
            yield f"section of {step} holds '{{{{$', which kfp replaces by its own values; write it another way"


def _condition(task: _Task) -> Iterator[str]:
    condition = task.spec.get("triggerPolicy", {}).get("condition", "")
    channels = _CHANNEL.findall(condition)
    literals = _CHANNEL.sub("", condition)
    if "'" in literals or '"' in literals or any(task.type_of(name) == "STRING" for name in channels):
        yield (
            f"condition of {task.name} compares text ({condition}): kfp evaluates it as code and skips the branch on "
            "an error; let the step return a bool or a number"
        )


def _loop(task: _Task) -> Iterator[str]:
    iterator = task.spec.get("parameterIterator") or task.spec.get("artifactIterator")
    if not iterator:
        return
    items = iterator.get("items", {})
    if "raw" in items:
        return  # a list that stands in the pipeline; kfp itself refuses an empty one
    channel = items.get("inputParameter") or items.get("inputArtifact")
    source = task.inputs.get(channel, {}).get("taskOutputParameter", {})
    output = source.get("outputParameterKey", "")
    if source and output != "Output":
        yield (
            f"loop {task.name} runs over the named output {output!r} of {source.get('producerTask')}, which the local "
            "runner cannot find; return it as the component's only value (`.output`)"
        )
    yield f"loop {task.name} has a length that is not known when compiled; loop over a list the recipe fixes"


def _numbers(task: _Task) -> Iterator[str]:
    if task.is_dag:
        return
    for name, value in task.inputs.items():
        kind = task.declared.get(name, {}).get("parameterType", "")
        if kind in _WHOLE_LISTS and "taskFinalStatus" not in value:
            yield f"task {task.name}: whole numbers in {name} ({kind}) arrive as floats; pass it in the section"
        text = value.get("runtimeValue", {}).get("constant")
        for channel in _PLACEHOLDER.findall(text) if isinstance(text, str) else ():
            if task.type_of(channel) not in ("STRING", ""):
                yield f"task {task.name}: a number put into the text of {name} reads 1.0 for 1; pass it as a number"
        size = len(json.dumps(text)) if text is not None else 0
        if size > ARGUMENT_LIMIT:
            yield f"task {task.name}: the value of {name} takes {size // 1024} KiB, over the limit of one argument"


def _missing(task: _Task) -> Iterator[str]:
    """A DAG inside the pipeline whose parameter is None stops the local runner, whether it is used or not."""
    if not task.is_dag:
        return
    for name, definition in task.declared.items():
        if definition.get("isOptional") and "defaultValue" not in definition and name not in task.inputs:
            yield f"task {task.name}: parameter {name} may be None, which the local runner refuses; default it to ''"


def _placeholders(task: _Task) -> Iterator[str]:
    text = json.dumps(task.inputs)
    for placeholder, name in _UNSUPPORTED.items():
        if placeholder in text:
            yield f"task {task.name} uses dsl.{name}, which the local runner cannot fill; put the value in the section"


def _executor(task: _Task, executor: Mapping[str, Any]) -> Iterator[str]:
    if "importer" in executor:
        uri = executor["importer"].get("artifactUri", {})
        address = uri.get("constant")
        if address is None:
            yield f"importer {task.name} takes its URI from a parameter; give a constant path or read it in a step"
        elif "://" in address and not address.startswith("file://"):
            yield f"importer {task.name}: {address} is remote and would not be downloaded; read it in a step"
        return
    container = executor.get("container", {})
    command = [*container.get("command", []), *container.get("args", [])]
    image = container.get("image", "")
    if "createpvc" in image or "deletepvc" in image:
        yield f"task {task.name} makes a volume, which exists on a cluster only; leave volumes to a platform profile"
    elif not any(_EXECUTOR in word for word in command):
        yield f"task {task.name} is a container component, which cannot run here; write a Python component"
    elif command[:3] == ["python3", "-m", _EXECUTOR]:
        yield f"task {task.name} has a target_image, which cannot run here; give it a base_image that holds its code"
    if any("pip install" in word for word in command):
        yield (
            f"task {task.name} installs packages while it runs, here into your own environment; put them in the image "
            "and set install_kfp_package=False without packages_to_install"
        )
    for word in command:
        if len(word.encode()) > ARGUMENT_LIMIT:
            yield f"task {task.name} carries {len(word) // 1024} KiB of code or files; put them in the image"
        for placeholder, name in _UNSUPPORTED.items():
            if placeholder in word:
                yield f"task {task.name} uses dsl.{name}, which the local runner cannot fill; put it in the section"


def _outputs(name: str, dag: Mapping[str, Any]) -> Iterator[str]:
    for output, selector in dag.get("dag", {}).get("outputs", {}).get("artifacts", {}).items():
        if len(selector.get("artifactSelectors", [])) > 1:
            yield f"{name}: output {output} is a dsl.OneOf over artifacts; let one step choose between both manifests"
