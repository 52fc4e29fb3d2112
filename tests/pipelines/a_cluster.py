"""A cluster on which a run of a profile finds all it needs, for tests that then take something away."""

from __future__ import annotations

from typing import Any

from modelmill.pipelines.doctor.cluster import Target, ask
from modelmill.pipelines.doctor.finding import Finding
from modelmill.pipelines.doctor.kube import Kube
from modelmill.pipelines.platform import Profile, load_profile
from tests.fakes.kubernetes_api import KubernetesApi

SPACE = "modelmill"
REGISTRY = "images.registry=registry.example.com/modelmill"


def profile(name: str = "eks-p5", *overrides: str) -> Profile:
    return load_profile(name, (REGISTRY, "home.claim=modelmill-home", *overrides))


def findings(api: KubernetesApi, place: Profile, checks: Any, nodes: int = 1) -> list[Finding]:
    return ask(checks, Target(Kube(api.client()), place, nodes))


def the(found: list[Finding], subject: str) -> Finding:
    """The one finding about a subject."""
    (only,) = [each for each in found if each.subject == subject]
    return only


def account(api: KubernetesApi, name: str, role: str = "") -> None:
    annotations = {"eks.amazonaws.com/role-arn": role} if role else {}
    metadata = {"name": name, "namespace": SPACE, "annotations": annotations}
    api.store.create({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": metadata})


def secret(api: KubernetesApi, name: str) -> None:
    metadata = {"name": name, "namespace": SPACE}
    api.store.create({"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "stringData": {"KEY": "hidden"}})


def claim(api: KubernetesApi, name: str, mode: str = "ReadWriteMany", phase: str = "Bound") -> None:
    spec = {"accessModes": [mode], "resources": {"requests": {"storage": "1200Gi"}}}
    metadata = {"name": name, "namespace": SPACE}
    api.store.create({"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": metadata, "spec": spec})
    status = {"phase": phase, "accessModes": [mode], "capacity": {"storage": "1200Gi"}}
    api.store.set_status("persistentvolumeclaims", name, status if phase == "Bound" else {"phase": phase})


def runtime(api: KubernetesApi, name: str, label: str = "trainer") -> None:
    pod = {"containers": [{"name": "node", "image": "registry.example.com/x:1"}], "restartPolicy": "Never"}
    replicated = {
        "name": "node",
        "template": {
            "metadata": {"labels": {"trainer.kubeflow.org/trainjob-ancestor-step": label}},
            "spec": {"template": {"spec": pod}},
        },
    }
    spec = {"mlPolicy": {"numNodes": 1, "torch": {}}, "template": {"spec": {"replicatedJobs": [replicated]}}}
    kind = {"apiVersion": "trainer.kubeflow.org/v1alpha1", "kind": "ClusterTrainingRuntime"}
    api.store.create({**kind, "metadata": {"name": name}, "spec": spec})


def queue(api: KubernetesApi, name: str, quota: dict[str, str], labels: dict[str, str] | None = None) -> None:
    """A LocalQueue, its ClusterQueue with one flavor, both active."""
    version = {"apiVersion": "kueue.x-k8s.io/v1beta2"}
    flavor = {"name": "nodes", "resources": [{"name": key, "nominalQuota": value} for key, value in quota.items()]}
    groups = [{"coveredResources": list(quota), "flavors": [flavor]}]
    items = [
        {"kind": "ResourceFlavor", "metadata": {"name": "nodes"}, "spec": {"nodeLabels": labels or {}}},
        {
            "kind": "ClusterQueue",
            "metadata": {"name": "all"},
            "spec": {"namespaceSelector": {}, "resourceGroups": groups},
        },
        {"kind": "LocalQueue", "metadata": {"name": name, "namespace": SPACE}, "spec": {"clusterQueue": "all"}},
    ]
    for item in items:
        api.store.create({**version, **item})
    active = {"type": "Active", "status": "True", "reason": "Ready", "message": "", "lastTransitionTime": TIME}
    api.store.set_status("clusterqueues", "all", {"conditions": [active], "flavorsUsage": []})
    api.store.set_status("localqueues", name, {"conditions": [active]})


TIME = "2026-01-01T00:00:00Z"
P5 = {"cpu": "191450m", "memory": "1938410Mi", "nvidia.com/gpu": "8", "vpc.amazonaws.com/efa": "32"}


def node(api: KubernetesApi, name: str, labels: dict[str, str], allocatable: dict[str, str], **metadata: Any) -> None:
    spec: dict[str, Any] = {"taints": metadata.pop("taints", [])}
    api.store.create(
        {"apiVersion": "v1", "kind": "Node", "metadata": {"name": name, "labels": labels, **metadata}, "spec": spec}
    )
    ready = {"type": "Ready", "status": "True"}
    api.store.set_status("nodes", name, {"allocatable": allocatable, "conditions": [ready]})


def pool(api: KubernetesApi, name: str, requirements: list[dict[str, Any]], **more: Any) -> None:
    spec = {
        "nodeClassRef": {"group": "karpenter.k8s.aws", "kind": "EC2NodeClass", "name": name},
        "requirements": requirements,
        "taints": more.pop("taints", []),
    }
    template = {"metadata": {"labels": more.pop("labels", {})}, "spec": spec}
    kind = {"apiVersion": "karpenter.sh/v1", "kind": "NodePool", "metadata": {"name": name}}
    api.store.create({**kind, "spec": {"template": template, **more}})


def furnish(api: KubernetesApi, place: Profile) -> None:
    """Make everything that a run with this profile of EKS needs, once."""
    api.store.edit(("", "namespaces", "", SPACE), _label)
    account(api, place.service_account, "arn:aws:iam::123456789012:role/modelmill")
    if place.tracking.secret:
        secret(api, place.tracking.secret)
    if place.home:
        claim(api, place.home.claim)
    job = place.trainjob
    if job:
        account(api, job.service_account)
        runtime(api, job.runtime)
        queue(api, job.queue or "", {key: str(4 * int(value)) for key, value in ROUND.items()})
        tolerated = [{"key": each.key, "value": "true", "effect": "NoSchedule"} for each in job.tolerations]
        node(api, "p5-a", job.node_selector, P5, taints=tolerated)
    amd = [{"key": "kubernetes.io/arch", "operator": "In", "values": ["amd64"]}]
    for step in filter(None, [place.step, place.device_step]):
        name = step.node_selector.get("karpenter.sh/nodepool", "any")
        tainted = [{"key": each.key, "value": "true", "effect": "NoSchedule"} for each in step.tolerations]
        if not api.store.get("nodepools", name):
            pool(api, name, amd, taints=tainted)


ROUND = {"cpu": "192", "memory": str(2 * 2**40), "nvidia.com/gpu": "8", "vpc.amazonaws.com/efa": "32"}


def _label(item: dict[str, Any]) -> None:
    item["metadata"].setdefault("labels", {})["pod-security.kubernetes.io/enforce"] = "restricted"
