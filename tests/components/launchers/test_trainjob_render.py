"""Rendered TrainJobs: what the CRD takes, what the pods may do, and which recipes fit which profiles."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from modelmill.components.core.errors import UserError
from modelmill.components.launchers.trainjob import TrainJobLauncher
from modelmill.components.launchers.trainjob_config import TrainJobConfig
from modelmill.components.launchers.trainjob_render import cores, launch_id, render
from modelmill.components.training.config import TrainingConfig
from modelmill.components.training.launch import TrainingJob
from modelmill.pipelines import catalog
from modelmill.pipelines.plan import declared_options
from modelmill.pipelines.platform import load_profile, profile_names
from tests import schemas
from tests.components.launchers.trainjobs import KEY, job, place, training
from tests.fakes.kubernetes_trainer import RUNTIME, pod_template
from tests.manifests import restricted

SCRATCH = Path(f"/mnt/modelmill/store/pretrain/{KEY}.partial")
RUNTIMES = Path(__file__).parents[3] / "manifests/base/runtimes"
REGISTRY = "registry.example/team"
ENVIRONMENT = {
    "MODELMILL_HOME": "/mnt/modelmill",
    "MODELMILL_RUN_ID": "5b2c1c1e-0000-4000-8000-000000000000",
    "MODELMILL_RUN_DIR": "/mnt/modelmill/runs/5b2c1c1e-0000-4000-8000-000000000000",
    "MODELMILL_STEP": "pretrain",
    "MODELMILL_RECIPE_HASH": "a" * 16,
    "MLFLOW_TRACKING_URI": "http://mlflow:5000",
    # What must not come along.
    "MODELMILL_LAUNCHER": "{}",
    "MODELMILL_PARENT_PID": "7",
    "MODELMILL_SEARCH_STORAGE": "postgresql://user:hidden@db/search",
    "MODELMILL_ELSEWHERE": "https://user:hidden@host/",
    "MLFLOW_TRACKING_PASSWORD": "hidden",
    "AWS_SECRET_ACCESS_KEY": "hidden",
    "PATH": "/bin",
}


def profiles() -> list[str]:
    return [name for name in profile_names() if load_profile(name).launcher == "trainjob"]


def trainings() -> Iterator[tuple[str, str, TrainingConfig]]:
    """(recipe, step, section) of every step of a shipped recipe that launches training processes."""
    for name in catalog.SHIPPED.recipe_names():
        for step in catalog.load(name).steps():
            section = getattr(step.config, "training", None)
            if declared_options(step.function).launches and isinstance(section, TrainingConfig):
                yield name, step.name, section


def config_of(profile: str) -> TrainJobConfig:
    config = load_profile(profile, [f"images.registry={REGISTRY}"]).trainjob
    assert config is not None
    return config


def rendered(section: TrainingConfig, config: TrainJobConfig, step: str = "pretrain") -> dict[str, Any]:
    scratch = Path(config.mount) / f"store/{step}/{KEY}.partial"
    work = TrainingJob("modelmill.components.llama.pretrain", {"output": str(scratch)}, section, scratch)
    return render(work, config, attempt="1", launched=1.0, environment=ENVIRONMENT)


def refused_because(section: TrainingConfig, config: TrainJobConfig) -> str:
    try:
        TrainJobLauncher(config).check(section)
    except UserError as error:
        return str(error)
    return ""


def runtime_of(config: TrainJobConfig) -> dict[str, Any]:
    path = RUNTIMES / f"{config.runtime}.yaml"
    return yaml.safe_load(path.read_text()) if path.is_file() else RUNTIME


def check_pod(work: dict[str, Any], config: TrainJobConfig) -> dict[str, Any]:
    """The merged pod, after everything that must hold for it."""
    template = pod_template(work, runtime_of(config))
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a", **template.get("metadata", {})}}
    pod["spec"] = {"restartPolicy": "Never", **template["spec"]}
    schemas.assert_valid(pod)
    assert restricted.violations(pod["spec"]) == []
    (container,) = pod["spec"]["containers"]
    names = [entry["name"] for entry in container["env"]]
    assert len(names) == len(set(names))
    assert container["resources"]["limits"] == container["resources"]["requests"]
    assert {"cpu", "memory"} <= set(container["resources"]["limits"])
    mounted = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert len(mounted) == len(container["volumeMounts"])
    assert {config.mount, "/dev/shm", "/tmp"} <= mounted
    assert {mount["name"] for mount in container["volumeMounts"]} <= {v["name"] for v in pod["spec"]["volumes"]}
    return pod["spec"]


@pytest.mark.parametrize("profile", profiles())
def test_every_recipe_on_every_profile_is_taken_or_refused_by_name(profile):
    schemas.require_crds()
    config = config_of(profile)
    taken = refused = 0
    for recipe, step, section in trainings():
        if refusal := refused_because(section, config):
            assert re.match(r"training\.[\w.]+: ", refusal), f"{recipe}: {refusal}"
            refused += 1
            continue
        work = rendered(section, config, step)
        schemas.assert_valid(work)
        assert schemas.with_defaults(work) != work  # the defaults of the CRD were found, so its schema was used
        check_pod(work, config)
        taken += 1
    assert taken + refused > 0


@pytest.mark.parametrize("profile", profiles())
def test_what_fills_a_profiles_nodes_is_taken(profile):
    config = config_of(profile)
    processes = config.devices_per_node * config.processes_per_device or 1
    section = training(parallel={"nodes": 2, "processes_per_node": processes}, global_batch_size=4 * processes)
    TrainJobLauncher(config).check(section)
    work = rendered(section, config)
    schemas.assert_valid(work)
    pod = check_pod(work, config)
    trainer = work["spec"]["trainer"]
    assert (trainer["numNodes"], trainer["numProcPerNode"]) == (2, processes)
    env = {entry["name"]: entry.get("value") for entry in trainer["env"]}
    assert env["GLOO_SOCKET_IFNAME"] == "eth0"
    limits = pod["containers"][0]["resources"]["limits"]
    if config.accelerator:
        assert limits[config.accelerator] == config.devices_per_node
    if config.efa_per_node:
        assert limits["vpc.amazonaws.com/efa"] == config.efa_per_node
        assert env["FI_PROVIDER"] == "efa"
    if "neuron" in (config.accelerator or ""):
        assert env["CCOM_SOCKET_IFNAME"] == "eth0"


def test_the_job_in_full():
    schemas.require_crds()
    config = place(
        "/mnt/modelmill",
        accelerator="nvidia.com/gpu", devices_per_node=8, efa_per_node=4, cpu="90", memory="1000Gi",
        priority_class="urgent", required_topology="topology.k8s.aws/network-node-layer-3", deadline_seconds=3600,
        node_selector={"node.kubernetes.io/instance-type": "p4d.24xlarge"},
        tolerations=[{"key": "nvidia.com/gpu"}],
        environment={"NCCL_DEBUG": "INFO"},
        secrets={"MLFLOW_TRACKING_PASSWORD": "mlflow-credentials/MLFLOW_TRACKING_PASSWORD"},
    )  # fmt: skip
    work = rendered(training(parallel={"nodes": 2, "processes_per_node": 8}, global_batch_size=32), config)
    schemas.assert_valid(work)
    labels, trainer = work["metadata"]["labels"], work["spec"]["trainer"]
    assert labels["modelmill.dev/run"] == ENVIRONMENT["MODELMILL_RUN_ID"]
    assert labels["kueue.x-k8s.io/queue-name"] == "training"
    assert labels["kueue.x-k8s.io/priority-class"] == "urgent"
    assert "suspend" not in work["spec"]  # Kueue's alone
    assert work["spec"]["activeDeadlineSeconds"] == 3600
    assert trainer["command"] == [
        "python", "-m", "modelmill.components.training.torchrun", f"{SCRATCH}/exits-$(PET_NODE_RANK).json", "30",
        "--max-restarts=0", f"--log-dir={SCRATCH}/ranks/node-$(PET_NODE_RANK)", "--redirects=3", "--tee=0:3",
        "-m", "modelmill.components.llama.pretrain", f"{SCRATCH}/job.json",
    ]  # fmt: skip
    env = {entry["name"]: entry.get("value", entry.get("valueFrom")) for entry in trainer["env"]}
    assert env["OMP_NUM_THREADS"] == "11"  # 90 CPUs for 8 processes
    assert env["NCCL_DEBUG"] == "INFO"  # the profile's word is the last
    assert env["NCCL_SOCKET_IFNAME"] == "^docker,lo,veth"
    assert (
        env["MODELMILL_RUN_DIR"] == f"{SCRATCH}/run"
    )  # leads to the run that owns the job, whichever that is by then
    password = {"secretKeyRef": {"name": "mlflow-credentials", "key": "MLFLOW_TRACKING_PASSWORD"}}
    assert env["MLFLOW_TRACKING_PASSWORD"] == password
    assert not {"MODELMILL_LAUNCHER", "MODELMILL_PARENT_PID", "MODELMILL_SEARCH_STORAGE", "PATH"} & set(env)
    assert "hidden" not in yaml.safe_dump(work)
    patch = work["spec"]["runtimePatches"][0]["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"][0]
    template = patch["template"]["spec"]["template"]
    topology = {"kueue.x-k8s.io/podset-required-topology": "topology.k8s.aws/network-node-layer-3"}
    assert template["metadata"]["annotations"] == topology
    pod = check_pod(work, config)
    assert pod["serviceAccountName"] == "modelmill-trainer"
    assert pod["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    assert pod["terminationGracePeriodSeconds"] == 300


def test_equal_jobs_give_equal_objects_and_the_schema_refuses_what_it_does_not_know():
    schemas.require_crds()
    config = place("/mnt/modelmill")
    work = rendered(training(), config)
    assert work == rendered(training(), config)
    work["spec"]["podTemplateOverrides"] = []  # what Trainer 2.1 had; a server would drop it silently
    assert schemas.problems(work)
    del work["spec"]["podTemplateOverrides"]
    work["spec"]["trainer"]["env"].append(work["spec"]["trainer"]["env"][0])
    assert "stands there twice" in schemas.problems(work)[0]


@pytest.mark.parametrize(
    ("step", "key"),
    [("pretrain", KEY), ("a_very_long_step_name_that_goes_on_and_on", KEY), ("1st", KEY), ("train", "trial-3")],
)
def test_a_launch_id_fits_whatever_jobset_appends(tmp_path, step, key):
    name = launch_id(job(tmp_path, step, key), place(tmp_path))
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name)
    assert len(f"{name}-node-0-9999-abcde") <= 63
    assert name == launch_id(job(tmp_path, step, key), place(tmp_path))


def test_other_work_has_another_launch_id(tmp_path):
    work, config = job(tmp_path), place(tmp_path)
    nested = TrainingJob(work.module, work.spec, work.training, work.scratch / "trials/1")
    others = [
        launch_id(job(tmp_path / "other"), config),
        launch_id(job(tmp_path, key="f" * 24), config),
        launch_id(job(tmp_path, step="finetune"), config),
        launch_id(work, place(tmp_path, claim="other-home")),
        launch_id(nested, config),
    ]
    assert len({launch_id(work, config), *others}) == 6
    assert launch_id(nested, config).startswith("pretrain-")


GPU = {"accelerator": "nvidia.com/gpu", "devices_per_node": 8}
TRN = {"accelerator": "aws.amazon.com/neuron", "devices_per_node": 16, "processes_per_device": 2}


@pytest.mark.parametrize(
    ("config", "changes", "words"),
    [
        (GPU, {}, "processes_per_node: 1 is not the 8 devices of a node x 1"),
        (TRN, {"parallel": {"nodes": 1, "processes_per_node": 16}, "global_batch_size": 32}, "use 32"),
        (GPU, {"accelerator": "neuron"}, "training.accelerator: 'neuron' is not what the nodes have (cuda)"),
        ({}, {"accelerator": "cuda"}, "training.accelerator: 'cuda' is not what the nodes have (cpu)"),
        ({"cpu": "1500m"}, {"parallel": {"processes_per_node": 2}}, "more than the 1500m CPUs"),
        ({}, {"attention": "flex"}, "training.attention: 'flex' needs an NVIDIA GPU"),
        ({}, {"parallel": {"pipeline": 2, "processes_per_node": 2}}, "training.parallel.pipeline: 2"),
        (
            TRN,
            {"parallel": {"processes_per_node": 32}, "global_batch_size": 64, "precision": "fp8-mixed"},
            "training.precision: 'fp8-mixed'",
        ),
    ],
)
def test_what_the_nodes_cannot_do_is_refused_by_name(config, changes, words):
    with pytest.raises(UserError) as caught:
        TrainJobLauncher(place("/mnt/modelmill", **config)).check(training(**changes))
    assert words in str(caught.value)


def test_slow_networks_are_a_warning(caplog):
    section = training(parallel={"nodes": 2, "processes_per_node": 8}, global_batch_size=32)
    TrainJobLauncher(place("/mnt/modelmill", **GPU)).check(section)
    assert "talk over TCP" in caplog.text


def test_cpu_quantities():
    assert [cores(text) for text in ("90", "31850m", "0.5")] == [90, 31.85, 0.5]
