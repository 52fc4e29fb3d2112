"""A training job as a TrainJob of Kubeflow Trainer (trainer.kubeflow.org/v1alpha1), a plain dict.

What the CRD allows where (Trainer 2.3): variables of the training container only in `trainer.env`, its resources only
in `trainer.resourcesPerNode`, all else of the pod in `runtimePatches`. Nothing here talks to a cluster.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modelmill.components.core.events import RUN_ID_VARIABLE, RUN_VARIABLE, STEP_VARIABLE
from modelmill.components.core.pod import ANNOUNCEMENT_VARIABLE
from modelmill.components.core.pod_security import USER, container_context, pod_context
from modelmill.components.core.step import RECIPE_VARIABLE
from modelmill.components.launchers.trainjob_config import TrainJobConfig
from modelmill.components.training.launch import (
    LAUNCHER_VARIABLE,
    RANK_DEFAULTS,
    RankFiles,
    TrainingJob,
    rank_variables,
)
from modelmill.components.training.processes import PARENT_VARIABLE

GROUP, VERSION, PLURAL = "trainer.kubeflow.org", "v1alpha1", "trainjobs"
MANAGER = "modelmill.dev/launcher"
MANAGED_BY_LABEL, MANAGED_BY = "app.kubernetes.io/managed-by", "modelmill"
RUN_LABEL = "modelmill.dev/run"  # KFP's id of the run that owns the job; the reaper and `modelmill cancel` go by it
STEP_LABEL = "modelmill.dev/step"
RECIPE_LABEL = "modelmill.dev/recipe"
ATTEMPT_ANNOTATION = "modelmill.dev/attempt"  # which attempt at the scratch folder's work the job is
ADOPTED_ANNOTATION = "modelmill.dev/adopted-at"  # when the run in the label took the job over
SCRATCH_ANNOTATION = "modelmill.dev/scratch"
TRAINER = "node"  # the replicated job, and its container, of Trainer's torch runtimes

_BOOTSTRAP = "modelmill.components.training.torchrun"
_RANK_GRACE = 30  # seconds between the end of one rank and SIGKILL for those of its node that have not followed it
_NAME_LENGTH = 45  # JobSet makes pods `<name>-node-<job>-<node>-<5 characters>` of it, 63 at most
_QUEUE, _PRIORITY = "kueue.x-k8s.io/queue-name", "kueue.x-k8s.io/priority-class"
_TOPOLOGY = "kueue.x-k8s.io/podset-required-topology"
_EFA = "vpc.amazonaws.com/efa"
_SECRET_NAME = re.compile(r"PASSWORD|TOKEN|SECRET|CREDENTIAL|AUTH|_KEY$|SEARCH_STORAGE")
_OWN = {LAUNCHER_VARIABLE, PARENT_VARIABLE, ANNOUNCEMENT_VARIABLE}  # of the step's process, not of its ranks


def launch_id(job: TrainingJob, config: TrainJobConfig) -> str:
    """Name of a job's TrainJob, the same for every attempt at the same work: a DNS-1035 label, at most 45 characters.

    The work is known by its scratch folder, `<home>/store/<step>/<key>.partial`, so a retried, evicted or resumed step
    finds the job of its predecessor, and equal work of two homes stays apart.
    """
    scratch = job.scratch
    found = next((part for part in (scratch, *scratch.parents) if part.suffix == ".partial"), None)
    step, key = (found.parent.name, found.stem) if found else (scratch.name, "")
    digest = hashlib.sha256(f"{config.claim}:{scratch}".encode()).hexdigest()
    tail = "-".join(part for part in (re.sub(r"[^a-z0-9]", "", key.lower())[:12], digest[:8]) if part)
    head = re.sub(r"[^a-z0-9]+", "-", step.lower()).strip("-")
    head = head if head[:1].isalpha() else f"job-{head}"
    return f"{head[: _NAME_LENGTH - len(tail) - 1].strip('-')}-{tail}"


def render(
    job: TrainingJob, config: TrainJobConfig, *, attempt: str, launched: float, environment: Mapping[str, str]
) -> dict[str, Any]:
    """The TrainJob of a training job.

    Args:
        job: what to run.
        config: the cluster's part.
        attempt: which attempt it is, any text.
        launched: when the launcher began, seconds since the epoch.
        environment: variables of the launcher's process; its labels and what the ranks report to are taken from it.
    """
    parallel = job.training.parallel
    labels = _labels(environment)
    trainer = {
        "image": config.image,
        "command": _command(job),
        "env": _variables(job, config, launched, environment),
        "numNodes": parallel.nodes,
        "numProcPerNode": parallel.processes_per_node,  # left out, Trainer starts one process a CPU on Neuron nodes
        "resourcesPerNode": _resources(config),
    }
    queue = {name: value for name, value in ((_QUEUE, config.queue), (_PRIORITY, config.priority_class)) if value}
    spec: dict[str, Any] = {
        "runtimeRef": {"name": config.runtime},
        "trainer": trainer,
        "runtimePatches": [{"manager": MANAGER, "trainingRuntimeSpec": _patch(config, labels)}],
    }
    if config.deadline_seconds:
        spec["activeDeadlineSeconds"] = config.deadline_seconds
    return {
        "apiVersion": f"{GROUP}/{VERSION}",
        "kind": "TrainJob",
        "metadata": {
            "name": launch_id(job, config),
            "namespace": config.namespace,
            "labels": {**labels, **queue},
            "annotations": {ATTEMPT_ANNOTATION: attempt, SCRATCH_ANNOTATION: str(job.scratch)},
        },
        "spec": spec,
    }


def run_link(scratch: Path) -> Path:
    """Link to the folder of the run that owns a job: ranks report there, also once another run has taken over."""
    return scratch / "run"


def run_label(environment: Mapping[str, str]) -> str:
    """Value of `RUN_LABEL`; empty outside a run of Kubeflow Pipelines."""
    return _label(environment.get(RUN_ID_VARIABLE, ""))


def _labels(environment: Mapping[str, str]) -> dict[str, str]:
    """Who owns the job, on the job and its pods."""
    found = {
        MANAGED_BY_LABEL: MANAGED_BY,
        RUN_LABEL: run_label(environment),
        STEP_LABEL: _label(environment.get(STEP_VARIABLE, "")),
        RECIPE_LABEL: _label(environment.get(RECIPE_VARIABLE, "")),
    }
    return {name: value for name, value in found.items() if value}


def _label(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]", "-", text)[:63].strip("-_.")


def _command(job: TrainingJob) -> list[str]:
    """torchrun on each node; Trainer's PET variables say how many nodes and processes, which node, and where to meet.

    The nodes share the scratch folder, so each has files of its own in it: Kubernetes fills in the node's number.
    """
    files, node = RankFiles(job.scratch), "$(PET_NODE_RANK)"
    exits = files.exits.with_name(f"exits-{node}.json")
    logs = [f"--log-dir={files.logs}/node-{node}", "--redirects=3", "--tee=0:3"]
    torchrun = ["python", "-m", _BOOTSTRAP, str(exits), str(_RANK_GRACE), "--max-restarts=0", *logs]
    return [*torchrun, "-m", job.module, str(files.job)]


def _variables(
    job: TrainingJob, config: TrainJobConfig, launched: float, environment: Mapping[str, str]
) -> list[dict[str, Any]]:
    """Variables of the ranks; the profile's win over ours, secrets come by reference only."""
    reported = {
        name: value
        for name, value in environment.items()
        if name.startswith(("MODELMILL_", "MLFLOW_"))
        and name not in _OWN
        and not _SECRET_NAME.search(name)
        and not re.search(r"://[^/@]*:[^/@]*@", value)  # an address with a password
    }
    if RUN_VARIABLE in reported:
        reported[RUN_VARIABLE] = str(run_link(job.scratch))
    values = {"HOME": "/tmp", **RANK_DEFAULTS, **_network(job, config), **config.environment, **reported}
    values |= rank_variables(job.training, max(1, int(cores(config.cpu))), launched)
    plain: list[dict[str, Any]] = [
        {"name": name, "value": value} for name, value in sorted(values.items()) if name not in config.secrets
    ]
    for name, reference in sorted(config.secrets.items()):
        secret, _, key = reference.partition("/")
        plain.append({"name": name, "valueFrom": {"secretKeyRef": {"name": secret, "key": key}}})
    return plain


def _network(job: TrainingJob, config: TrainJobConfig) -> dict[str, str]:
    """How nodes talk. A pod's interface under the VPC CNI is eth0, EFA is beside it (AWS's EFA and Neuron guides)."""
    kind = accelerator_kind(config)
    found = {"GLOO_SOCKET_IFNAME": "eth0"}
    if job.training.parallel.nodes == 1:
        return found
    if kind == "neuron":
        found |= {"CCOM_SOCKET_IFNAME": "eth0", "NEURON_RT_EXEC_TIMEOUT": "600"}
    if kind == "cuda":
        found |= {"NCCL_SOCKET_IFNAME": "^docker,lo,veth", "NCCL_DEBUG": "WARN"}
    if config.efa_per_node:
        found |= {"FI_PROVIDER": "efa"} | ({"FI_EFA_USE_DEVICE_RDMA": "1"} if kind == "neuron" else {})
    return found


def accelerator_kind(config: TrainJobConfig) -> str:
    """`cpu`, `cuda` or `neuron`, as recipes call it."""
    name = config.accelerator or ""
    return "cpu" if not name or not config.devices_per_node else "neuron" if "neuron" in name else "cuda"


def cores(quantity: str) -> float:
    """CPUs of a Kubernetes quantity such as `90` or `31850m`."""
    return int(quantity[:-1]) / 1000 if quantity.endswith("m") else float(quantity)


def _resources(config: TrainJobConfig) -> dict[str, Any]:
    """Requests equal limits, so that nothing is evicted for what it never asked."""
    asked: dict[str, Any] = {"cpu": config.cpu, "memory": config.memory}
    if config.accelerator and config.devices_per_node:
        asked[config.accelerator] = config.devices_per_node
    if config.efa_per_node:
        asked[_EFA] = config.efa_per_node
    return {"limits": asked, "requests": dict(asked)}


def _patch(config: TrainJobConfig, labels: Mapping[str, str]) -> dict[str, Any]:
    """What the job adds to the pods of its runtime; with it they pass Pod Security `restricted`."""
    volumes = [
        {"name": "home", "persistentVolumeClaim": {"claimName": config.claim}},
        {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": config.shared_memory}},
        {"name": "tmp", "emptyDir": {}},  # the root file system is read-only; our runtimes give it a size
    ]
    places = {"home": config.mount, "shared-memory": "/dev/shm", "tmp": "/tmp"}
    mounts = [{"name": name, "mountPath": path} for name, path in places.items()]
    container = {
        "name": TRAINER,
        "volumeMounts": mounts,
        "securityContext": container_context(),
    }
    pod: dict[str, Any] = {
        "serviceAccountName": config.service_account,
        "terminationGracePeriodSeconds": config.grace_seconds,
        "securityContext": {
            **pod_context(),
            "fsGroup": USER,
            "fsGroupChangePolicy": "OnRootMismatch",  # a volume of millions of files is not walked for every pod
        },
        "volumes": volumes,
        "containers": [container],
    }
    if config.node_selector:
        pod["nodeSelector"] = dict(config.node_selector)
    if config.tolerations:
        pod["tolerations"] = [entry.model_dump(exclude_none=True) for entry in config.tolerations]
    meta: dict[str, Any] = {"labels": dict(labels)}
    if config.required_topology:
        meta["annotations"] = {_TOPOLOGY: config.required_topology}
    template = {"metadata": meta, "spec": pod}
    jobs = [{"name": TRAINER, "template": {"spec": {"template": template}}}]
    return {"template": {"spec": {"replicatedJobs": jobs}}}


def inside(folder: Path, mount: str) -> bool:
    """Whether a folder lies on the shared volume, where the nodes of a job find it."""
    return Path(os.path.normpath(folder)).is_relative_to(mount)
