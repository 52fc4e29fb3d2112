"""The manifests against the doctor: a cluster on which a team applied them holds what every profile of EKS needs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from manifests import render
from modelmill.pipelines.doctor import cluster, nodes, queues
from modelmill.pipelines.platform import load_profile, profile_names
from tests.fakes.kubernetes_api import KubernetesApi
from tests.fakes.kubernetes_objects import BY_KIND
from tests.manifests.conftest import KUBECTL, VALUES, kustomize
from tests.pipelines import a_cluster
from tests.pipelines.a_cluster import findings, profile

PROFILES = [name for name in profile_names() if name.startswith("eks-")]
CHECKS = (
    *(cluster.access, cluster.served, cluster.namespace, cluster.accounts, cluster.volumes, cluster.runtime),
    *(cluster.permissions, queues.queue, queues.namespace_quota, nodes.nodes),
)
ACTIVE = {"type": "Active", "status": "True", "reason": "Ready", "message": "", "lastTransitionTime": a_cluster.TIME}


@pytest.fixture(scope="module")
def applied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KubernetesApi]:
    """A cluster with the rendered objects, and what its controllers would say of them."""
    if not KUBECTL.is_file():
        pytest.skip("kubectl is not in this environment; the dev extra brings it")
    folder: Path = tmp_path_factory.mktemp("manifests")
    render.render(render.Values.model_validate(VALUES), folder)
    with KubernetesApi(namespaces=("default",)) as api:
        made = [
            each for each in kustomize(folder / "overlays" / "eks") if (each["apiVersion"], each["kind"]) in BY_KIND
        ]
        for item in sorted(made, key=lambda each: each["kind"] != "Namespace"):
            api.store.create(item)
        _control(api)
        yield api


def _control(api: KubernetesApi) -> None:
    for item in api.store.all("persistentvolumeclaims"):
        status = {"phase": "Bound", "accessModes": item["spec"]["accessModes"], "capacity": {"storage": "1200Gi"}}
        api.store.set_status("persistentvolumeclaims", item["metadata"]["name"], status, item["metadata"]["namespace"])
    for plural in ("clusterqueues", "localqueues"):
        for item in api.store.all(plural):
            space = item["metadata"].get("namespace", "")
            api.store.set_status(plural, item["metadata"]["name"], {"conditions": [ACTIVE]}, space)


@pytest.mark.parametrize("name", PROFILES)
def test_applied_manifests_are_all_a_profile_needs(name: str, applied: KubernetesApi) -> None:
    found = findings(applied, profile(name), CHECKS)
    assert [each for each in found if each.level != "ok"] == []
    jobs = {"runtime"} if profile(name).launcher == "trainjob" else set()
    assert {each.subject for each in found} >= {*jobs, "quota", "nodes", "permissions"}


def test_nodes_beyond_the_quota_of_the_values_are_refused(applied: KubernetesApi) -> None:
    found = [each for each in findings(applied, profile("eks-p5"), CHECKS, nodes=9) if each.level == "fail"]
    assert {each.subject for each in found} >= {"quota"}


def test_roles_of_the_manifests_are_those_the_doctor_names(applied: KubernetesApi, tmp_path: Path) -> None:
    """What the doctor asks for is what the role it names grants."""
    render.render(render.Values.model_validate(VALUES), tmp_path)
    roles = {
        each["metadata"]["name"]: each for each in kustomize(tmp_path / "overlays" / "eks") if each["kind"] == "Role"
    }
    granted: set[tuple[str, str]] = set()
    for rule in roles["trainjob-launcher"]["rules"]:
        groups: list[Any] = rule["apiGroups"]
        granted |= {
            (verb, f"{name}.{group}" if group else name)
            for verb in rule["verbs"]
            for name in rule["resources"]
            for group in groups
        }
    asked = {(verb, cluster._full(name)) for verb, name in cluster._OF_LAUNCHER}
    assert asked <= granted
    assert load_profile("eks-p5").service_account == "modelmill-runner"
