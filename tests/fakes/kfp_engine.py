"""Runs a pipeline as Kubeflow Pipelines would: every step a process with the environment of its pod and nothing else.

It reads the compiled pipeline (IR and platform spec): inputs, conditions, exit handlers, retries, secrets, fields of
the pod as variables. Loops and importers are not implemented and fail by name.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

Json = dict[str, Any]
_CONDITION = re.compile(r"inputs\.parameter_values\['([^']+)'\] == (true|false|-?[\d.]+)")
_PARAMETER = re.compile(r"\{\{\$\.inputs\.parameters\['([^']+)'\]\}\}")
_FIELD = re.compile(r"metadata\.labels\['([^']+)'\]")
_ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Pod:
    """One attempt of one step."""

    name: str
    labels: dict[str, str]
    image: str
    environment: dict[str, str]
    log: Path
    exit_code: int | None = None


@dataclass
class Execution:
    """One run on its way.

    Attributes:
        without: packages that the images lack.
        tasks: what the API says of each task, by name.
        pods: every attempt, in order.
    """

    run_id: str
    package: Json
    parameters: Mapping[str, Any]
    folder: Path
    secrets: Mapping[str, Mapping[str, str]]
    started: Callable[[Pod], None] = lambda _pod: None
    ended: Callable[[Pod], None] = lambda _pod: None
    without: tuple[str, ...] = ()
    tasks: dict[str, Json] = field(default_factory=dict)
    pods: list[Pod] = field(default_factory=list)
    state: str = "PENDING"
    stopped: bool = False
    process: subprocess.Popen[bytes] | None = None

    def begin(self) -> threading.Thread:
        self.state = "RUNNING"
        thread = threading.Thread(target=self._run, daemon=True)
        thread.start()
        return thread

    def stop(self) -> None:
        """Terminate: the step that runs gets SIGTERM, no other is started, exit handlers included."""
        self.stopped, self.state = True, "CANCELING"
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)

    def _run(self) -> None:
        root = self.package["pipeline"]["root"]
        defaults = {
            name: each["defaultValue"]
            for name, each in root.get("inputDefinitions", {}).get("parameters", {}).items()
            if "defaultValue" in each
        }
        try:
            good = self._dag(root, {**defaults, **self.parameters}, {})[0]
        except Exception as error:  # a defect of the engine must not look like a run without an end
            self.tasks["engine"] = {"display_name": "engine", "state": "FAILED", "error": {"message": repr(error)}}
            good = False
        self.state = "SUCCEEDED" if good else "FAILED"  # also of a run that was terminated, as its workflow has failed

    def _dag(self, dag: Json, parameters: Mapping[str, Any], artifacts: Mapping[str, Any]) -> tuple[bool, str]:
        """Run the tasks of a DAG in the order of their dependencies; returns whether all went well, and why not."""
        tasks = dag["dag"]["tasks"]
        done: dict[str, tuple[str, Json, Json]] = {}  # name -> state, parameters, artifacts
        reason = ""
        while len(done) < len(tasks):
            name = next(
                name
                for name, task in tasks.items()
                if name not in done and all(other in done for other in task.get("dependentTasks", []))
            )
            task, states = tasks[name], [done[other][0] for other in tasks[name].get("dependentTasks", [])]
            policy = task.get("triggerPolicy", {})
            always = policy.get("strategy") == "ALL_UPSTREAM_TASKS_COMPLETED"
            if self.stopped or (not always and any(state != "SUCCEEDED" for state in states)):
                done[name] = ("SKIPPED", {}, {})
                continue
            given = self._inputs(task, parameters, artifacts, done)
            if "condition" in policy and not _holds(policy["condition"], given[0]):
                done[name] = ("SKIPPED", {}, {})
                continue
            state, why, made = self._task(name, task, *given)
            reason = reason or why
            done[name] = (state, *made)
        return all(state in ("SUCCEEDED", "SKIPPED") for state, *_ in done.values()) and not self.stopped, reason

    def _inputs(
        self,
        task: Json,
        parameters: Mapping[str, Any],
        artifacts: Mapping[str, Any],
        done: Mapping[str, tuple[str, Json, Json]],
    ) -> tuple[Json, Json]:
        values: Json = {}
        for name, source in task.get("inputs", {}).get("parameters", {}).items():
            if "runtimeValue" in source:
                values[name] = source["runtimeValue"]["constant"]
            elif "componentInputParameter" in source:
                values[name] = parameters[source["componentInputParameter"]]
            elif "taskOutputParameter" in source:
                output = source["taskOutputParameter"]
                values[name] = done[output["producerTask"]][1][output["outputParameterKey"]]
            elif "taskFinalStatus" in source:
                producer = source["taskFinalStatus"]["producerTask"]
                state = done[producer][0]
                error = {"code": 9, "message": "a task failed"} if state == "FAILED" else {}
                values[name] = {
                    "state": state,
                    "error": error,
                    "pipelineJobResourceName": self.run_id,
                    "pipelineTaskName": producer,
                }
        found: Json = {}
        for name, source in task.get("inputs", {}).get("artifacts", {}).items():
            if "componentInputArtifact" in source:
                found[name] = artifacts[source["componentInputArtifact"]]
            else:
                output = source["taskOutputArtifact"]
                found[name] = done[output["producerTask"]][2][output["outputArtifactKey"]]
        return values, found

    def _task(self, name: str, task: Json, parameters: Json, artifacts: Json) -> tuple[str, str, tuple[Json, Json]]:
        component = self.package["pipeline"]["components"][task["componentRef"]["name"]]
        if "parameterIterator" in task or "artifactIterator" in task:
            raise NotImplementedError(f"{name} is a loop")
        detail = {"display_name": name, "task_id": f"{self.run_id}-{name}", "run_id": self.run_id, "state": "RUNNING"}
        self.tasks[name] = {**detail, "start_time": _now()}
        made: tuple[Json, Json] = ({}, {})
        if "dag" in component:
            good, why = self._dag(component, parameters, artifacts)
        else:
            attempts = 1 + int(task.get("retryPolicy", {}).get("maxRetryCount", 0))
            good, why = False, ""
            for attempt in range(attempts):
                good, why, made = self._pod(name, component, parameters, artifacts, attempt)
                if good or self.stopped:
                    break
        state = "SUCCEEDED" if good else "CANCELED" if self.stopped else "FAILED"
        self.tasks[name] |= {"state": state, "end_time": _now(), **({"error": {"message": why}} if why else {})}
        return ("SUCCEEDED" if good else "FAILED"), why, made

    def _pod(
        self, name: str, component: Json, parameters: Json, artifacts: Json, attempt: int
    ) -> tuple[bool, str, tuple[Json, Json]]:
        label = component["executorLabel"]
        container = self.package["pipeline"]["deploymentSpec"]["executors"][label]["container"]
        platform = self.package["platform"].get(label, {})
        work = self.folder / self.run_id / f"{name}-{attempt}"
        work.mkdir(parents=True)
        executor_input, outputs = self._executor_input(work, component, parameters, artifacts)
        labels = {"pipeline/runid": self.run_id, **platform.get("podMetadata", {}).get("labels", {})}
        try:
            environment = self._environment(container, platform, labels, work)
        except KeyError as error:
            return False, f"CreateContainerConfigError: secret {error} not found", ({}, {})
        pod = Pod(f"{self.run_id[:8]}-{name}-{attempt}", labels, container["image"], environment, work / "log")
        self.pods.append(pod)
        self.started(pod)
        words = [_filled(word, executor_input, parameters) for word in [*container["command"], *container["args"]]]
        with pod.log.open("wb") as log:
            self.process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=work,
                start_new_session=True,
            )
            pod.exit_code = self.process.wait()
        self.ended(pod)
        if pod.exit_code:
            return False, f"{name} exited with code {pod.exit_code}", ({}, {})
        output = work / "executor_output.json"
        values = json.loads(output.read_text()).get("parameterValues", {}) if output.exists() else {}
        return True, "", (values, outputs)

    def _environment(self, container: Json, platform: Json, labels: Mapping[str, str], work: Path) -> dict[str, str]:
        """What the container sees: the image's own variables, the pipeline's, fields of the pod and secrets."""
        binaries = work / "bin"
        binaries.mkdir()
        hidden = "; ".join(f"sys.modules[{name!r}] = None" for name in self.without) or "pass"
        (binaries / "sitecustomize.py").write_text(f"import sys\n{hidden}\n")
        found = {
            "PATH": f"{binaries}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}/usr/bin{os.pathsep}/bin",
            "VIRTUAL_ENV": sys.prefix,
            "PYTHONPATH": f"{binaries}{os.pathsep}{_ROOT}",
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": "1",
            "HOME": str(work),
        }
        script = binaries / "python3"  # a link would lose the virtual environment
        script.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
        script.chmod(0o755)
        found |= {each["name"]: each.get("value", "") for each in container.get("env", [])}
        for each in platform.get("fieldPathAsEnv", []):
            label = _FIELD.fullmatch(each["fieldPath"])
            assert label, each
            found[each["name"]] = labels[label[1]]
        for each in platform.get("secretAsEnv", []):
            for key in each["keyToEnv"]:
                found[key["envVar"]] = self.secrets[each["secretName"]][key["secretKey"]]
        return found

    def _executor_input(self, work: Path, component: Json, parameters: Json, artifacts: Json) -> tuple[Json, Json]:
        outputs: Json = {}
        for name, definition in component.get("outputDefinitions", {}).get("artifacts", {}).items():
            kind = definition["artifactType"]
            outputs[name] = {"name": name, "uri": str(work / name), "metadata": {}, "type": kind}
        inputs = {name: {"artifacts": [artifact]} for name, artifact in artifacts.items()}
        made = {name: {"artifacts": [artifact]} for name, artifact in outputs.items()}
        results = {
            name: {"outputFile": str(work / f"parameter-{name}")}
            for name in component.get("outputDefinitions", {}).get("parameters", {})
        }
        record = {
            "inputs": {"parameterValues": parameters, "artifacts": inputs},
            "outputs": {
                "parameters": results,
                "artifacts": made,
                "outputFile": str(work / "executor_output.json"),
            },
        }
        return record, outputs


def _filled(word: str, executor_input: Json, parameters: Mapping[str, Any]) -> str:
    if word == "{{$}}":
        return json.dumps(executor_input)
    return _PARAMETER.sub(lambda found: str(parameters[found[1]]), word)


def _holds(condition: str, parameters: Mapping[str, Any]) -> bool:
    found = _CONDITION.fullmatch(condition)
    assert found, f"the engine cannot read {condition}"
    return bool(parameters[found[1]] == json.loads(found[2]))


def _now() -> str:
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")


def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    """Wait for something to hold."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)
