"""Whatever an object or a profile names exists, or is listed here as made by somebody else."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from modelmill.components.launchers import reaper
from modelmill.components.launchers.trainjob_config import Toleration
from modelmill.pipelines.doctor import inside as doctor
from modelmill.pipelines.platform import Profile, load_profile, profile_names
from tests.manifests.conftest import Objects, named, pods
from tests.manifests.restricted import containers

# Made by a person, since they hold secrets; docs/operations.md has the commands.
SECRETS = {
    "mlflow": {"mlflow-database", "mlflow-auth"},
    "modelmill": {"mlflow-credentials", "kfp-mlflow-credentials", "modelmill-hub"},
}
# Made by KFP, Argo, JobSet and Trainer: labels of their pods, and namespaces of others.
FOREIGN_LABELS = {"workflows.argoproj.io/workflow", "jobset.sigs.k8s.io/jobset-name"}
DOCTOR = doctor.job(load_profile("kind"), "doctor")  # what `modelmill doctor --in-cluster` starts
FOREIGN_NAMESPACES = {"kube-system", "kubeflow", "istio-system"}
PROFILES = [name for name in profile_names() if load_profile(name).where == "cluster"]
ROOT = Path(__file__).resolve().parents[2]


def namespaced(objects: Objects, kind: str) -> set[tuple[str, str]]:
    return {(each["metadata"]["namespace"], each["metadata"]["name"]) for each in objects if each["kind"] == kind}


def mentioned(value: Any, key: str) -> list[Any]:
    """Everything that stands under a key, at any depth."""
    found = []
    if isinstance(value, dict):
        found += [value[key]] if key in value else []
        found += [each for child in value.values() for each in mentioned(child, key)]
    elif isinstance(value, list):
        found += [each for child in value for each in mentioned(child, key)]
    return found


def test_pods_name_what_exists(objects: Objects) -> None:
    accounts, claims = namespaced(objects, "ServiceAccount"), namespaced(objects, "PersistentVolumeClaim")
    maps, classes = namespaced(objects, "ConfigMap"), named(objects, "PriorityClass")
    for owner, template in pods(objects).items():
        pod, namespace = template["spec"], template["owner"]["metadata"].get("namespace")
        assert pod.get("priorityClassName") in {*classes, None}, owner
        if namespace is None:
            continue  # a runtime: its jobs bring the rest
        if "serviceAccountName" in pod:
            assert (namespace, pod["serviceAccountName"]) in accounts, owner
        for reference in mentioned(pod, "persistentVolumeClaim"):
            assert (namespace, reference["claimName"]) in claims, owner
        for reference in [*mentioned(pod, "configMapKeyRef"), *mentioned(pod, "configMap")]:
            assert (namespace, reference["name"]) in maps, owner
        secrets = {each["name"] for each in mentioned(pod, "secretKeyRef")}
        secrets |= {each["secretName"] for each in mentioned(pod, "secret")}
        assert secrets <= SECRETS[namespace], owner


def test_keys_of_config_maps_exist(objects: Objects) -> None:
    maps = {name: each["data"] for name, each in named(objects, "ConfigMap").items()}
    references = [r for template in pods(objects).values() for r in mentioned(template["spec"], "configMapKeyRef")]
    assert references
    for reference in references:
        assert reference["key"] in maps[reference["name"]]


def test_operations_guide_makes_every_secret() -> None:
    guide = (ROOT / "docs/operations.md").read_text()
    for namespace, names in SECRETS.items():
        for name in names:
            assert re.search(rf"kubectl -n {namespace} create secret generic {name}\b", guide), name


def test_role_bindings_bind_roles_to_accounts_that_exist(objects: Objects) -> None:
    accounts, roles = namespaced(objects, "ServiceAccount"), namespaced(objects, "Role")
    for each in (each for each in objects if each["kind"] == "RoleBinding"):
        assert (each["metadata"]["namespace"], each["roleRef"]["name"]) in roles
        for subject in each["subjects"]:
            assert (subject["namespace"], subject["name"]) in accounts


def test_queues_lead_to_flavors_and_topologies(objects: Objects) -> None:
    queues, flavors = named(objects, "ClusterQueue"), named(objects, "ResourceFlavor")
    for each in named(objects, "LocalQueue").values():
        assert each["spec"]["clusterQueue"] in queues
    used = set()
    for queue in queues.values():
        for group in queue["spec"]["resourceGroups"]:
            for flavor in group["flavors"]:
                assert flavor["name"] in flavors
                assert [each["name"] for each in flavor["resources"]] == group["coveredResources"]
                used.add(flavor["name"])
        selector = queue["spec"]["namespaceSelector"]["matchLabels"]
        assert any(
            selector.items() <= each["metadata"]["labels"].items() for each in named(objects, "Namespace").values()
        )
    assert used == set(flavors), "a flavor without a queue holds nothing"
    topologies = named(objects, "Topology")
    assert {each["spec"]["topologyName"] for each in flavors.values() if "topologyName" in each["spec"]} == set(
        topologies
    )


def test_node_pools_name_their_classes(overlays: dict[str, Objects]) -> None:
    classes = named(overlays["eks"], "EC2NodeClass")
    for each in named(overlays["eks"], "NodePool").values():
        assert each["spec"]["template"]["spec"]["nodeClassRef"]["name"] in classes


def test_claims_and_volumes_belong_together(overlays: dict[str, Objects]) -> None:
    volume = named(overlays["eks"], "PersistentVolume")["modelmill-home"]
    claim = named(overlays["eks"], "PersistentVolumeClaim")["modelmill-home"]
    assert claim["spec"]["volumeName"] == "modelmill-home"
    assert (volume["spec"]["claimRef"]["namespace"], volume["spec"]["claimRef"]["name"]) == (
        "modelmill",
        "modelmill-home",
    )
    assert claim["spec"]["storageClassName"] == volume["spec"]["storageClassName"] == ""
    assert claim["spec"]["accessModes"] == volume["spec"]["accessModes"] == ["ReadWriteMany"]
    assert volume["spec"]["persistentVolumeReclaimPolicy"] == "Retain"


def labels_match(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    wanted = selector.get("matchLabels", {}).items() <= labels.items()
    for rule in selector.get("matchExpressions", []):
        held = labels.get(rule["key"])
        wanted &= held is not None and (rule["operator"] == "Exists" or held in rule["values"])
    return wanted


def test_services_budgets_and_policies_select_pods(objects: Objects) -> None:
    made = [
        (t["owner"]["metadata"].get("namespace"), t["metadata"].get("labels", {}))
        for t in pods(objects).values()
        if "metadata" in t
    ]
    made.append(("modelmill", DOCTOR["spec"]["template"]["metadata"]["labels"]))
    for each in objects:
        spec, namespace = each.get("spec", {}), each["metadata"].get("namespace")
        selector = {
            "Service": lambda spec=spec: {"matchLabels": spec["selector"]},
            "PodDisruptionBudget": lambda spec=spec: spec["selector"],
            "NetworkPolicy": lambda spec=spec: spec["podSelector"],
        }.get(each["kind"])
        if selector is None or not selector():
            continue
        chosen = selector()
        foreign = {rule["key"] for rule in chosen.get("matchExpressions", [])} & FOREIGN_LABELS
        assert foreign or any(labels_match(chosen, labels) for where, labels in made if where == namespace), each[
            "metadata"
        ]


def test_policies_name_namespaces_that_exist(objects: Objects) -> None:
    own = {
        name: each["metadata"]["labels"] | {"kubernetes.io/metadata.name": name}
        for name, each in named(objects, "Namespace").items()
    }
    for selector in [
        s for each in objects if each["kind"] == "NetworkPolicy" for s in mentioned(each, "namespaceSelector")
    ]:
        wanted = selector["matchLabels"]
        foreign = wanted.get("kubernetes.io/metadata.name") in FOREIGN_NAMESPACES
        assert foreign or any(labels_match(selector, labels) for labels in own.values()), wanted


def test_every_namespace_denies_by_default_and_resolves_names(objects: Objects) -> None:
    for namespace in named(objects, "Namespace"):
        rules = {
            e["metadata"]["name"]: e["spec"]
            for e in objects
            if e["kind"] == "NetworkPolicy" and e["metadata"]["namespace"] == namespace
        }
        assert rules["default-deny"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
        assert rules["allow-dns"]["podSelector"] == {}


def test_mlflow_lets_in_the_hosts_that_profiles_and_people_use(overlays: dict[str, Objects]) -> None:
    for name in PROFILES:
        profile, overlay = load_profile(name), "kind" if name == "kind" else "eks"
        server = named(overlays[overlay], "ConfigMap")["mlflow-server"]["data"]
        host = profile.tracking.uri.removeprefix("http://")
        assert host in server["allowed_hosts"].split(",")
        service, namespace, _ = host.split(".", 2)
        assert (namespace, service) in namespaced(overlays[overlay], "Service")


@pytest.mark.parametrize("name", PROFILES)
def test_profiles_name_what_the_manifests_make(name: str, overlays: dict[str, Objects]) -> None:
    profile, objects = load_profile(name), overlays["kind" if name == "kind" else "eks"]
    job = profile.trainjob
    assert job is not None
    assert profile.home is not None
    accounts = namespaced(objects, "ServiceAccount")
    assert (profile.namespace, profile.service_account) in accounts
    assert (job.namespace, job.service_account) in accounts
    assert (profile.namespace, profile.home.claim) in namespaced(objects, "PersistentVolumeClaim")
    assert (job.namespace, job.claim) in namespaced(objects, "PersistentVolumeClaim")
    assert (job.namespace, job.queue) in namespaced(objects, "LocalQueue")
    assert job.runtime in named(objects, "ClusterTrainingRuntime")
    assert job.priority_class in named(objects, "WorkloadPriorityClass")
    assert profile.tracking.secret in SECRETS[profile.namespace]


@pytest.mark.parametrize("name", [name for name in PROFILES if name != "kind"])
def test_profiles_find_nodes(name: str, overlays: dict[str, Objects]) -> None:
    """Some pool makes nodes that every pod of the profile selects and tolerates, large enough for it."""
    profile, pools = load_profile(name), named(overlays["eks"], "NodePool")
    job = profile.trainjob
    assert job is not None
    for selector, tolerations in [
        (job.node_selector, job.tolerations),
        *((place.node_selector, place.tolerations) for place in (profile.step, profile.device_step) if place),
    ]:
        assert any(accepts(pool, selector, tolerations) for pool in pools.values()), selector
    instance = job.node_selector["node.kubernetes.io/instance-type"]
    flavors = named(overlays["eks"], "ResourceFlavor")
    matching = [
        f for f in flavors.values() if f["spec"]["nodeLabels"].get("node.kubernetes.io/instance-type") == instance
    ]
    assert matching, "no quota covers these nodes"


def accepts(pool: dict[str, Any], selector: dict[str, str], tolerations: list[Toleration]) -> bool:
    template = pool["spec"]["template"]["spec"]
    offered = {each["key"]: set(each["values"]) for each in template["requirements"]}
    offered["karpenter.sh/nodepool"] = {pool["metadata"]["name"]}
    tolerated = {each.key for each in tolerations}
    return all(value in offered.get(key, ()) for key, value in selector.items()) and all(
        taint["key"] in tolerated for taint in template.get("taints", [])
    )


def test_a_draining_node_waits_for_the_last_checkpoint(overlays: dict[str, Objects]) -> None:
    """Karpenter ends a node after its grace period, whatever grace its pods still have."""
    pools = named(overlays["eks"], "NodePool").values()
    for name in PROFILES:
        job = load_profile(name).trainjob
        assert job is not None
        for pool in pools:
            if job.node_selector and accepts(pool, job.node_selector, job.tolerations):
                minutes = int(pool["spec"]["template"]["spec"]["terminationGracePeriod"].removesuffix("m"))
                assert minutes * 60 > job.grace_seconds, name


def test_plugins_run_on_every_accelerator_node(filled: Path, overlays: dict[str, Objects]) -> None:
    """A device plugin that does not tolerate a node's taint leaves the node without devices."""
    helm = {path.stem: yaml.safe_load(path.read_text()) for path in (filled / "cluster/helm").glob("*.yaml")}
    efa = {each["key"] for each in helm["aws-efa-k8s-device-plugin"]["tolerations"]}
    nvidia = helm["nvidia-device-plugin"]
    (term,) = nvidia["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    for name, pool in named(overlays["eks"], "NodePool").items():
        template = pool["spec"]["template"]["spec"]
        types = set(next(r["values"] for r in template["requirements"] if r["key"].endswith("instance-type")))
        for taint in template.get("taints", []):
            assert taint["key"] in efa, name
            if taint["key"] == "nvidia.com/gpu":
                assert types <= set(term["matchExpressions"][0]["values"]), name
                assert taint["key"] in {each["key"] for each in nvidia["tolerations"]}, name


def test_charts_are_pinned_and_have_values(filled: Path) -> None:
    script = (filled / "cluster/install.sh").read_text()
    charts = re.findall(r"^chart (\S+) (\S+) (\S+) (\S+)", script, re.MULTILINE)
    assert {name for name, *_ in charts} == {path.stem for path in (filled / "cluster/helm").glob("*.yaml")}
    assert all(re.fullmatch(r"v?\d+\.\d+\.\d+", version) for *_, version in charts)


def test_kinds_images_are_those_of_its_profile(overlays: dict[str, Objects]) -> None:
    container = pods(overlays["kind"])["CronJob modelmill-reaper"]["spec"]["containers"][0]
    assert container["image"] == load_profile("kind").image("cpu")


def test_reaper_runs_the_module_with_its_arguments(objects: Objects) -> None:
    (container,) = containers(pods(objects)["CronJob modelmill-reaper"]["spec"])
    assert container["command"] == ["python", "-m", "modelmill.components.launchers.reaper"]
    assert container["args"][0] == "--namespace"
    variables = {each["name"]: each.get("value") for each in container["env"]}
    assert variables.keys() >= {reaper.ENDPOINT_VARIABLE, reaper.TOKEN_PATH_VARIABLE}
    token = variables[reaper.TOKEN_PATH_VARIABLE]
    assert any(token.startswith(f"{mount['mountPath']}/") for mount in container["volumeMounts"])


def test_jobs_may_wait_as_long_as_the_launching_step_lives() -> None:
    for name in PROFILES:
        profile: Profile = load_profile(name)
        assert profile.trainjob is not None
        assert profile.trainjob.deadline_seconds
        assert profile.step_timeout_seconds
        assert profile.step_timeout_seconds > profile.trainjob.deadline_seconds
