"""Every pipeline compiled for a cluster: the same steps, parameters and recipe as here, and no surprise in the file.

The golden files are compiled pipelines with versions and digests masked. After a change that is meant:

    MODELMILL_UPDATE_GOLDEN=1 python -m pytest tests/pipelines/test_kfp_compiled.py
"""

from __future__ import annotations

import copy
import difflib
import json
import os
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from modelmill.components.core.errors import UserError
from modelmill.components.core.pod import read_announcement
from modelmill.components.core.recipe import Recipe
from modelmill.pipelines.catalog import SHIPPED, resolve
from modelmill.pipelines.launch.platform_tasks import (
    CLOSING_TASK,
    Placement,
    check_admissible,
    cluster_sections,
    placed,
)
from modelmill.pipelines.launch.references import dangling
from modelmill.pipelines.plan import declared_options
from modelmill.pipelines.platform import Profile, load_profile
from tests.fakes.kfp_api import read_package
from tests.pipelines import cluster  # noqa: F401 (makes kfp quick)

GOLDEN = Path(__file__).parent / "golden"
_MASKS = (
    (re.compile(r"(MODELMILL_RECIPE_HASH: ).*"), r"\1<digest>"),
    (re.compile(r"(modelmill-\w+-python:)[\w.+-]+"), r"\1<version>"),
    (re.compile(r"sdkVersion: kfp-[\w.]+"), "sdkVersion: kfp-<version>"),
)


@cache
def recipes() -> dict[str, tuple[str, Recipe]]:
    """The first shipped recipe of every pipeline, by pipeline."""
    found: dict[str, tuple[str, Recipe]] = {}
    for name in SHIPPED.recipe_names():
        loaded = SHIPPED.load(name)
        found.setdefault(loaded.pipeline, (name, loaded))
    return found


@cache
def profile() -> Profile:
    """A cluster with everything a profile can say, and the same on every machine."""
    return load_profile(
        "eks-cpu", ["images.registry=registry.example/team", "secrets.HF_TOKEN=hub/token", "launcher=local"]
    )


@cache
def compiled(pipeline: str) -> str:
    """A pipeline as the file that is uploaded."""
    import tempfile

    from kfp.compiler import Compiler

    name, recipe = recipes()[pipeline]
    dag = placed(resolve(SHIPPED.pipeline(pipeline).dag), Placement(recipe, profile(), name))
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "pipeline.yaml"
        Compiler().compile(dag, str(target), pipeline_parameters=cluster_sections(recipe))
        return target.read_text()


def leaves(spec: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Tasks of a pipeline that run something, wherever they stand."""
    found: dict[str, dict[str, Any]] = {}

    def walk(dag: dict[str, Any]) -> None:
        for name, task in dag["dag"]["tasks"].items():
            component = spec["components"][task["componentRef"]["name"]]
            if "dag" in component:
                walk(component)
            else:
                assert name not in found
                found[name] = spec["deploymentSpec"]["executors"][component["executorLabel"]]["container"]

    walk(spec["root"])
    return found


def environment(container: dict[str, Any]) -> dict[str, str]:
    return {each["name"]: each["value"] for each in container["env"]}


@pytest.mark.parametrize("pipeline", sorted(SHIPPED.pipelines))
def test_here_and_there_have_the_same_steps_parameters_and_recipe(pipeline: str) -> None:
    _, recipe = recipes()[pipeline]
    spec = read_package(compiled(pipeline))["pipeline"]
    tasks = leaves(spec)
    steps = {step.name: step for step in recipe.steps()}
    assert tasks.keys() - {CLOSING_TASK} == {name.replace("_", "-") for name in steps}
    plain = leaves(as_dict(resolve(SHIPPED.pipeline(pipeline).dag)))
    for name, container in tasks.items():
        seen = environment(container)
        assert seen["MODELMILL_RECIPE_HASH"] == recipe.hash
        told = read_announcement(seen["MODELMILL_ANNOUNCEMENT"])
        assert told["recipe"] == recipe.model_dump(mode="json")
        if name != CLOSING_TASK:  # what runs in the pod is what runs here
            assert (container["command"], container["args"]) == (plain[name]["command"], plain[name]["args"])
    defaults = spec["root"]["inputDefinitions"]["parameters"]
    for name, step in steps.items():
        record = json.loads(defaults[name]["defaultValue"])
        assert (record["step"], record["config"]) == (name, step.config.model_dump(mode="json"))
        assert record["fingerprint"] == (None if hasattr(step.config, "fingerprint") else "")


def as_dict(dag: Any) -> dict[str, Any]:
    from google.protobuf import json_format

    return json_format.MessageToDict(dag.pipeline_spec)


@pytest.mark.parametrize("pipeline", sorted(SHIPPED.pipelines))
def test_every_pod_is_limited_unprivileged_and_cached_by_us_alone(pipeline: str) -> None:
    package = read_package(compiled(pipeline))
    for name, container in leaves(package["pipeline"]).items():
        limits = container["resources"]
        assert limits["cpuLimit"] == limits["cpuRequest"]
        assert limits["memoryLimit"] == limits["memoryRequest"]
        config = package["platform"][f"exec-{name}"]
        assert config["securityContext"] == {"runAsUser": "1000", "runAsGroup": "1000", "runAsNonRoot": True}
        assert [each["mountPath"] for each in config["pvcMount"]] == ["/mnt/modelmill"]
        assert config["fieldPathAsEnv"][0]["name"] == "MODELMILL_RUN_ID"
        assert not {"MLFLOW_TRACKING_PASSWORD", "HF_TOKEN"} & environment(container).keys()
    for component in package["pipeline"]["components"].values():
        for task in component.get("dag", {}).get("tasks", {}).values():
            assert not task.get("cachingOptions", {}).get("enableCache")


@pytest.mark.parametrize("pipeline", sorted(SHIPPED.pipelines))
def test_retries_leave_side_effects_alone(pipeline: str) -> None:
    _, recipe = recipes()[pipeline]
    reuse = {step.name.replace("_", "-"): declared_options(step.function).reuse for step in recipe.steps()}
    spec = read_package(compiled(pipeline))["pipeline"]
    for dag in [spec["root"], *spec["components"].values()]:
        for name, task in dag.get("dag", {}).get("tasks", {}).items():
            if name in reuse:
                assert ("retryPolicy" in task) is reuse[name]


@pytest.mark.parametrize("pipeline", sorted(SHIPPED.pipelines))
def test_the_compiled_file_is_the_golden_one(pipeline: str) -> None:
    text = normalised(compiled(pipeline))
    golden = GOLDEN / f"{pipeline}.yaml"
    if os.environ.get("MODELMILL_UPDATE_GOLDEN"):
        golden.write_text(text)
    kept = golden.read_text() if golden.is_file() else ""
    lines = difflib.unified_diff(kept.splitlines(), text.splitlines(), golden.name, "now", lineterm="", n=1)
    difference = "\n".join(list(lines)[:60])
    assert not difference, f"if this is meant: MODELMILL_UPDATE_GOLDEN=1 python -m pytest {__file__}\n{difference}"


def normalised(text: str) -> str:
    """The file without what changes with every edit or machine, and with what all tasks share said once."""
    spec, platform = (yaml.safe_load(each) for each in text.split("\n---\n"))
    containers = list(leaves(spec).values())
    for container in containers:
        seen = environment(container)
        # Recipes are tested elsewhere; that the whole one is announced is tested above.
        seen["MODELMILL_ANNOUNCEMENT"] = ", ".join(sorted(read_announcement(seen["MODELMILL_ANNOUNCEMENT"])))
        container["env"] = seen
        container["command"] = {"shell": container["command"][:-1], "source": container["command"][-1]}
    for parameter in spec["root"]["inputDefinitions"]["parameters"].values():
        record = json.loads(parameter["defaultValue"])
        parameter["defaultValue"] = {**record, "code": "<digest>", "config": ", ".join(sorted(record["config"]))}
    every_task = {
        "env": _taken_out([each["env"] for each in containers]),
        "command": _taken_out([each["command"] for each in containers]),
        "resources": _taken_out([each["resources"] for each in containers]),
        "pod": _taken_out(list(platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"].values())),
    }
    made = yaml.safe_dump_all([every_task, spec, platform], sort_keys=True, width=110)
    for pattern, replacement in _MASKS:
        made = pattern.sub(replacement, made)
    return made


def _taken_out(records: list[dict[str, Any]]) -> dict[str, Any]:
    """What all records say alike, removed from each."""
    shared = {key: value for key, value in records[0].items() if all(each.get(key) == value for each in records)}
    for each in records:
        for key in shared:
            del each[key]
    return shared


def test_compiling_twice_gives_the_same_bytes() -> None:
    first = compiled("llama_pretrain")
    compiled.cache_clear()
    assert compiled("llama_pretrain") == first


def test_references_that_lead_nowhere_are_named() -> None:
    spec = read_package(compiled("llama_pretrain"))["pipeline"]
    assert list(dangling(spec)) == []
    inner = spec["components"]["comp-exit-handler-1"]["dag"]["tasks"]

    def broken(path: list[str], key: str, value: Any) -> list[str]:
        changed = copy.deepcopy(spec)
        place: Any = changed
        for part in path:
            place = place[part]
        place[key] = value
        return list(dangling(changed))

    task = ["components", "comp-exit-handler-1", "dag", "tasks", "pretrain"]
    source = inner["pretrain"]["inputs"]["artifacts"]["tokens"]["taskOutputArtifact"]
    cases = [
        (broken([*task, "componentRef"], "name", "comp-nothing"), "names a component that is not defined"),
        (broken(task, "dependentTasks", ["nothing"]), "waits for nothing, which is not in it"),
        (
            broken(
                [*task, "inputs", "artifacts", "tokens"], "taskOutputArtifact", {**source, "producerTask": "nothing"}
            ),
            "from manifest of nothing",
        ),
        (
            broken(
                [*task, "inputs", "artifacts", "tokens"], "taskOutputArtifact", {**source, "outputArtifactKey": "x"}
            ),
            "takes tokens from x of pack-tokens",
        ),
        (broken([*task, "inputs", "parameters"], "section", {"componentInputParameter": "x"}), "the parameter x"),
        (broken([*task, "inputs"], "parameters", {}), "lacks the parameter section"),
        (broken(["components", "comp-pretrain"], "executorLabel", "exec-nothing"), "names the executor exec-nothing"),
        (broken(["components"], "comp-idle", {"dag": {"tasks": {}}}), "component comp-idle belongs to no task"),
        (broken(["deploymentSpec", "executors"], "exec-idle", {}), "executor exec-idle belongs to no component"),
    ]
    for problems, words in cases:
        assert any(words in problem for problem in problems), (words, problems)


def test_a_launching_step_gets_its_launcher_and_no_other_does() -> None:
    name, recipe = recipes()["llama_pretrain"]
    place = load_profile("eks-p5", ["images.registry=registry.example/team"])
    dag = placed(resolve(SHIPPED.pipeline("llama_pretrain").dag), Placement(recipe, place, name))
    tasks = leaves(as_dict(dag))
    launched = {name: environment(each).get("MODELMILL_LAUNCHER") for name, each in tasks.items()}
    record = json.loads(launched.pop("pretrain") or "{}")
    assert record["launcher"] == "modelmill.components.launchers.trainjob:TrainJobLauncher"
    assert record["config"]["accelerator"] == "nvidia.com/gpu"
    assert record["config"]["image"].startswith("registry.example/team/modelmill-gpu")
    assert set(launched.values()) == {None}
    assert "gpu" in tasks["evaluate-heldout"]["image"]
    assert tasks["evaluate-heldout"]["resources"]["accelerator"]["resourceType"] == "nvidia.com/gpu"
    assert "cpu" in tasks["pack-tokens"]["image"]


@pytest.mark.parametrize(
    ("change", "place", "words"),
    [
        (
            ["training.parallel.nodes=2", "training.parallel.processes_per_node=1"],
            [],
            "training.parallel.nodes: 2 needs a profile with launcher",
        ),
        (["training.accelerator=cuda"], [], "training.accelerator: 'cuda' is not what the steps run on"),
        ([], ["images.registry=''"], "images.registry: empty"),
        ([], ["where=laptop", "launcher=local"], "is for this machine"),
    ],
    ids=["nodes", "accelerator", "registry", "laptop"],
)
def test_what_a_profile_cannot_run_is_refused_by_name(change: list[str], place: list[str], words: str) -> None:
    recipe = SHIPPED.load("laptop/llama-demo", change)
    chosen = load_profile("eks-cpu", ["images.registry=registry.example/team", "launcher=local", *place])
    with pytest.raises(UserError, match=re.escape(words)):
        check_admissible(recipe, chosen)


def test_a_recipe_too_long_to_announce_leaves_its_parameters_to_the_steps() -> None:
    from modelmill.pipelines.launch import platform_tasks

    _, recipe = recipes()["llama_pretrain"]
    long = recipe.model_copy(update={"description": "".join(f"{number:x}" for number in range(20_000))})
    told = read_announcement(platform_tasks._announcement(Placement(long, profile())))
    assert told["recipe"] == {}
    assert told["name"] == recipe.name
