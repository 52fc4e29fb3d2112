"""Names in a compiled pipeline that lead nowhere: KFP's server finds them when the run is on its way."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

_EXPRESSION = re.compile(r"inputs\.parameter_values\['([^']+)'\]")
_PLACEHOLDER = re.compile(r"\{\{\$\.inputs\.(parameters|artifacts)\['([^']+)'\]")


def dangling(spec: Mapping[str, Any]) -> Iterator[str]:
    """References of a pipeline spec (KFP IR as a dict) to what it does not define, one sentence each."""
    components, executors = spec.get("components", {}), spec.get("deploymentSpec", {}).get("executors", {})
    used: set[str] = set()
    for name, component in [("the pipeline", spec["root"]), *components.items()]:
        label = component.get("executorLabel")
        if label is not None:
            used.add(label)
            if label not in executors:
                yield f"component {name} names the executor {label}, which is not defined"
            else:
                yield from _placeholders(name, component, executors[label])
        yield from _dag(name, component, components)
    for label in executors.keys() - used:
        yield f"executor {label} belongs to no component"
    reached = _reached(spec["root"], components)
    for name in components.keys() - reached:
        yield f"component {name} belongs to no task"


def _reached(dag: Mapping[str, Any], components: Mapping[str, Any]) -> set[str]:
    found: set[str] = set()
    waiting = [dag]
    while waiting:
        for task in waiting.pop().get("dag", {}).get("tasks", {}).values():
            name = task.get("componentRef", {}).get("name", "")
            if name in components and name not in found:
                found.add(name)
                waiting.append(components[name])
    return found


def _dag(where: str, dag: Mapping[str, Any], components: Mapping[str, Any]) -> Iterator[str]:
    """Problems inside one DAG: what its tasks and outputs name must be in it."""
    tasks = dag.get("dag", {}).get("tasks", {})
    for name, task in tasks.items():
        component = components.get(task.get("componentRef", {}).get("name", ""))
        if component is None:
            yield f"task {name} in {where} names a component that is not defined"
            continue
        for other in task.get("dependentTasks", []):
            if other not in tasks:
                yield f"task {name} in {where} waits for {other}, which is not in it"
        for kind in ("parameters", "artifacts"):
            yield from _inputs(f"task {name} in {where}", kind, task, component, dag, tasks, components)
        yield from _conditions(f"task {name} in {where}", task, component)
    for kind, selectors in (("parameters", "valueFromParameter"), ("artifacts", "artifactSelectors")):
        for output, source in dag.get("dag", {}).get("outputs", {}).get(kind, {}).items():
            found = source.get(selectors, [])
            for each in found if isinstance(found, list) else [found]:
                producer, key = each.get("producerSubtask", ""), each.get(_output_key(kind), "")
                if not _produces(producer, kind, key, tasks, components):
                    yield f"output {output} of {where} comes from {key} of {producer}, which is not there"


def _inputs(
    who: str,
    kind: str,
    task: Mapping[str, Any],
    component: Mapping[str, Any],
    dag: Mapping[str, Any],
    tasks: Mapping[str, Any],
    components: Mapping[str, Any],
) -> Iterator[str]:
    declared = component.get("inputDefinitions", {}).get(kind, {})
    given = task.get("inputs", {}).get(kind, {})
    word = kind[:-1]
    surrounding = dag.get("inputDefinitions", {}).get(kind, {})
    produced, outer = (f"taskOutput{word.title()}", f"componentInput{word.title()}")
    for name, source in given.items():
        iterated = _iterated(task)
        if name not in declared and name not in iterated:
            yield f"{who} passes the {word} {name}, which its component does not take"
        if produced in source:
            producer, key = source[produced].get("producerTask", ""), source[produced].get(_output_key(kind), "")
            if not _produces(producer, kind, key, tasks, components):
                yield f"{who} takes {name} from {key} of {producer}, which is not there"
        elif outer in source and source[outer] not in surrounding:
            yield f"{who} takes {name} from the {word} {source[outer]}, which is not defined around it"
    for name, definition in declared.items():
        if name not in given and not definition.get("isOptional") and name not in _iterated(task):
            yield f"{who} lacks the {word} {name}"


def _iterated(task: Mapping[str, Any]) -> set[str]:
    """Parameters a loop gives its own body."""
    iterator = task.get("parameterIterator") or task.get("artifactIterator") or {}
    return {iterator.get("itemInput", ""), iterator.get("items", {}).get("inputParameter", "")} - {""}


def _output_key(kind: str) -> str:
    return "outputParameterKey" if kind == "parameters" else "outputArtifactKey"


def _produces(producer: str, kind: str, key: str, tasks: Mapping[str, Any], components: Mapping[str, Any]) -> bool:
    if producer not in tasks:
        return False
    component = components.get(tasks[producer].get("componentRef", {}).get("name", ""), {})
    return key in component.get("outputDefinitions", {}).get(kind, {})


def _conditions(who: str, task: Mapping[str, Any], component: Mapping[str, Any]) -> Iterator[str]:
    given = task.get("inputs", {}).get("parameters", {})
    for name in _EXPRESSION.findall(task.get("triggerPolicy", {}).get("condition", "")):
        if name not in given:
            yield f"the condition of {who} reads {name}, which the task does not receive"


def _placeholders(name: str, component: Mapping[str, Any], executor: Mapping[str, Any]) -> Iterator[str]:
    container = executor.get("container", {})
    for word in [*container.get("command", []), *container.get("args", [])]:
        for kind, key in _PLACEHOLDER.findall(word):
            if key not in component.get("inputDefinitions", {}).get(kind, {}):
                yield f"component {name} uses the input {key} in its command, which it does not take"
