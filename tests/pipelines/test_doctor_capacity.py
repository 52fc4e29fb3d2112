"""Room for a run: quotas, nodes that are there or that Karpenter makes, and the Neuron driver."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from modelmill.pipelines.doctor import nodes, queues, registry
from tests.fakes.kubernetes_api import KubernetesApi
from tests.pipelines import a_cluster
from tests.pipelines.a_cluster import P5, SPACE, findings, profile, the

LABELS = {"node.kubernetes.io/instance-type": "p5.48xlarge"}
QUOTA = {"cpu": "400", "memory": "4Ti", "nvidia.com/gpu": "16", "vpc.amazonaws.com/efa": "64"}
JOB_ONLY = ("step.node_selector={}", "device_step=null")  # steps run anywhere


@pytest.fixture
def api() -> Iterator[KubernetesApi]:
    with KubernetesApi() as server:
        yield server


def inactive(kind: str) -> dict[str, Any]:
    return {
        "type": "Active",
        "status": "False",
        "reason": "FlavorNotFound",
        "message": f"{kind} waits for a flavor",
        "lastTransitionTime": a_cluster.TIME,
    }


def edit(api: KubernetesApi, plural: str, name: str, change: Any) -> None:
    key = next(k for k in api.store.objects if k[1] == plural and k[3] == name)
    api.store.edit(key, change)


@pytest.mark.parametrize(
    ("quota", "count", "level", "text"),
    [
        (QUOTA, 2, "ok", "has cpu 368, memory 3600 GiB, nvidia.com/gpu 16, vpc.amazonaws.com/efa 64 free"),
        (QUOTA, 3, "fail", "nvidia.com/gpu 16 of 24"),
        ({**QUOTA, "vpc.amazonaws.com/efa": "32"}, 2, "fail", "vpc.amazonaws.com/efa 32 of 64"),
        (
            {key: QUOTA[key] for key in ("cpu", "memory", "nvidia.com/gpu")},
            1,
            "fail",
            "covers no vpc.amazonaws.com/efa",
        ),
    ],
    ids=["fits", "too-many-nodes", "too-little-efa", "uncovered"],
)
def test_quota_is_compared_with_the_whole_job(
    api: KubernetesApi, quota: dict[str, str], count: int, level: str, text: str
) -> None:
    a_cluster.queue(api, "training", quota)
    found = the(findings(api, profile(), (queues.queue,), count), "quota")
    assert found.level == level
    assert text in found.text


def test_used_quota_means_waiting(api: KubernetesApi) -> None:
    a_cluster.queue(api, "training", QUOTA)
    used = [{"name": key, "total": "12" if key == "nvidia.com/gpu" else "0", "borrowed": "0"} for key in QUOTA]
    status = {"flavorsUsage": [{"name": "nodes", "resources": used}], "conditions": []}
    api.store.set_status("clusterqueues", "all", status)
    found = the(findings(api, profile(), (queues.queue,)), "quota")
    assert found.level == "warn"
    assert "nvidia.com/gpu 4 of 8 free" in found.text


def test_borrowing_counts_in_a_cohort(api: KubernetesApi) -> None:
    a_cluster.queue(api, "training", {**QUOTA, "nvidia.com/gpu": "4"})
    assert the(findings(api, profile(), (queues.queue,)), "quota").level == "fail"

    def join(item: dict[str, Any]) -> None:
        item["spec"]["cohortName"] = "all"
        item["spec"]["resourceGroups"][0]["flavors"][0]["resources"][2]["borrowingLimit"] = "4"

    edit(api, "clusterqueues", "all", join)
    assert the(findings(api, profile(), (queues.queue,)), "quota").level == "warn"
    assert the(findings(api, profile(), (queues.queue,), 2), "quota").level == "fail"


def test_flavor_of_other_nodes_does_not_fit(api: KubernetesApi) -> None:
    a_cluster.queue(api, "training", QUOTA, {"node.kubernetes.io/instance-type": "g6e.48xlarge"})
    found = the(findings(api, profile(), (queues.queue,)), "quota")
    assert found.level == "fail"
    assert "its nodes have node.kubernetes.io/instance-type=g6e.48xlarge" in found.text


@pytest.mark.parametrize(("plural", "name"), [("clusterqueues", "all"), ("localqueues", "training")])
def test_inactive_queue_says_why(api: KubernetesApi, plural: str, name: str) -> None:
    a_cluster.queue(api, "training", QUOTA)
    api.store.set_status(plural, name, {"conditions": [inactive(plural)]})
    found = the(findings(api, profile(), (queues.queue,)), "queue")
    assert found.level == "fail"
    assert f"{plural} waits for a flavor" in found.text


def test_queue_that_is_stopped_or_of_another_team(api: KubernetesApi) -> None:
    a_cluster.queue(api, "training", QUOTA)
    selector = {"matchLabels": {"modelmill.dev/team": "true"}}
    edit(api, "clusterqueues", "all", lambda item: item["spec"].update(namespaceSelector=selector))
    found = the(findings(api, profile(), (queues.queue,)), "queue")
    assert found.fix == "kubectl label namespace modelmill modelmill.dev/team=true"
    edit(api, "clusterqueues", "all", lambda item: item["spec"].update(stopPolicy="Hold", namespaceSelector={}))
    assert "stopPolicy Hold" in the(findings(api, profile(), (queues.queue,)), "queue").text


@pytest.mark.parametrize(
    ("hard", "used", "level", "text"),
    [
        ({"requests.nvidia.com/gpu": "4"}, {}, "fail", "requests.nvidia.com/gpu 4 of 8"),
        ({"requests.nvidia.com/gpu": "8"}, {"requests.nvidia.com/gpu": "8"}, "warn", "0 of 8 free"),
        ({"limits.memory": "4Ti", "pods": "10"}, {}, "ok", "leaves room"),
    ],
    ids=["too-small", "used-up", "fits"],
)
def test_quota_of_the_namespace(
    api: KubernetesApi, hard: dict[str, str], used: dict[str, str], level: str, text: str
) -> None:
    metadata = {"name": "team", "namespace": SPACE}
    api.store.create({"apiVersion": "v1", "kind": "ResourceQuota", "metadata": metadata, "spec": {"hard": hard}})
    api.store.set_status("resourcequotas", "team", {"hard": hard, "used": used})
    found = the(findings(api, profile(), (queues.namespace_quota,)), "quota")
    assert found.level == level
    assert text in found.text


def of_job(api: KubernetesApi, count: int = 1) -> Any:
    (found,) = [
        each
        for each in findings(api, profile("eks-p5", *JOB_ONLY), (nodes.nodes,), count)
        if each.text.startswith("training job")
    ]
    return found


TAINT = {"key": "nvidia.com/gpu", "value": "true", "effect": "NoSchedule"}


@pytest.mark.parametrize(
    ("allocatable", "taints", "level", "text"),
    [
        (P5, [TAINT], "ok", "1 node(s) hold cpu 184"),
        ({**P5, "vpc.amazonaws.com/efa": "0"}, [], "fail", "vpc.amazonaws.com/efa 0"),
        ({**P5, "memory": "1500Gi"}, [], "fail", "memory"),
        (P5, [{"key": "team", "value": "other", "effect": "NoSchedule"}], "fail", "0 of 1 node(s)"),
        (P5, [{"key": "team", "value": "other", "effect": "PreferNoSchedule"}], "ok", "1 node(s)"),
    ],
    ids=["fits", "no-efa-plugin", "too-small", "tainted", "preferred-taint"],
)
def test_nodes_that_are_there(
    api: KubernetesApi, allocatable: dict[str, str], taints: list[Any], level: str, text: str
) -> None:
    a_cluster.node(api, "p5-a", LABELS, allocatable, taints=taints)
    found = of_job(api)
    assert found.level == level
    assert text in found.text
    if "efa" in text:
        assert "aws-efa-k8s-device-plugin" in found.fix


def test_nodes_that_are_not_ready_do_not_count(api: KubernetesApi) -> None:
    a_cluster.node(api, "p5-a", LABELS, P5)
    api.store.set_status("nodes", "p5-a", {"allocatable": P5, "conditions": [{"type": "Ready", "status": "False"}]})
    assert of_job(api).level == "fail"


def rule(operator: str, *values: str, key: str = "node.kubernetes.io/instance-type") -> dict[str, Any]:
    return {"key": key, "operator": operator, "values": list(values)} if values else {"key": key, "operator": operator}


@pytest.mark.parametrize(
    ("rules", "more", "level", "text"),
    [
        ([rule("In", "p5.48xlarge", "p5en.48xlarge")], {}, "ok", "Karpenter makes them from p5"),
        ([rule("Exists")], {"taints": [TAINT]}, "ok", "Karpenter makes them"),
        ([rule("In", "p4d.24xlarge")], {}, "fail", "p5: node.kubernetes.io/instance-type In p4d.24xlarge"),
        ([rule("NotIn", "p5.48xlarge")], {}, "fail", "NotIn p5.48xlarge"),
        ([rule("Exists")], {"taints": [{**TAINT, "key": "team"}]}, "fail", "taint team is not tolerated"),
        ([rule("Exists")], {"limits": {"cpu": "100"}}, "fail", "limit of cpu 100"),
        ([rule("Exists")], {"labels": LABELS | {"node.kubernetes.io/instance-type": "x"}}, "fail", "is x"),
    ],
    ids=["in", "exists", "other-type", "not-in", "taint", "limit", "label"],
)
def test_nodes_that_karpenter_makes(
    api: KubernetesApi, rules: list[Any], more: dict[str, Any], level: str, text: str
) -> None:
    a_cluster.pool(api, "p5", rules, **more)
    found = of_job(api)
    assert found.level == level
    assert text in found.text


def test_pool_that_is_not_ready_makes_nothing(api: KubernetesApi) -> None:
    a_cluster.pool(api, "p5", [rule("Exists")])
    condition = {"type": "Ready", "status": "False", "reason": "NodeClassNotReady", "message": "no subnets"}
    api.store.set_status("nodepools", "p5", {"conditions": [{**condition, "lastTransitionTime": a_cluster.TIME}]})
    assert "p5: not ready, no subnets" in of_job(api).text


def test_own_labels_come_from_the_pool(api: KubernetesApi) -> None:
    a_cluster.pool(api, "p5", [rule("Exists")])
    place = profile("eks-p5", *JOB_ONLY, "trainjob.node_selector={modelmill.dev/rack: a}")
    found = [each for each in findings(api, place, (nodes.nodes,)) if each.text.startswith("training job")]
    assert "p5: no label modelmill.dev/rack" in found[0].text


SDK = "public.ecr.aws/neuron/pytorch-training-neuronx:2.9.0-neuronx-py312-sdk2.30.0-ubuntu24.04"


def neuron(api: KubernetesApi, driver: str | None, image: str = SDK) -> Any:
    place = profile("eks-trn2", f"trainjob.image={image}")
    assert place.trainjob
    annotations = {"modelmill.dev/neuron-driver": driver} if driver else {}
    a_cluster.node(api, "trn2-a", place.trainjob.node_selector, {"cpu": "191"}, annotations=annotations)
    return the(findings(api, place, (nodes.neuron_driver,)), "neuron driver")


@pytest.mark.parametrize(
    ("driver", "level", "text"),
    [
        ("2.28.0.0", "ok", "has driver 2.28.0.0: that of SDK 2.30"),
        ("2.26.5.0", "fail", "needs one newer than 2.26"),
        ("2.30.2.0", "warn", "AWS does not say whether later ones take it again"),
        ("2.19.64.0", "fail", "on Trainium2 the image's SDK 2.30 needs driver 2.20.28 or newer"),
        (None, "warn", "names no driver version"),
    ],
)
def test_driver_must_suit_the_image(api: KubernetesApi, driver: str | None, level: str, text: str) -> None:
    found = neuron(api, driver)
    assert found.level == level
    assert text in found.text
    assert bool(found.fix) == (level != "ok")


def test_image_by_digest_says_its_sdk_in_a_label(api: KubernetesApi, monkeypatch: pytest.MonkeyPatch) -> None:
    image = "registry.example.com/modelmill-neuron-python@sha256:" + "a" * 64
    base = {"org.opencontainers.image.base.name": SDK}
    monkeypatch.setattr(registry, "labels", lambda reference: base if reference == image else {})
    assert neuron(api, "2.26.5.0", image).level == "fail"


def test_unknown_sdk_is_not_judged(api: KubernetesApi, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "labels", lambda reference: {})
    found = neuron(api, "2.27.4.0", "registry.example.com/own:1")
    assert found.level == "warn"
    assert "SDK of the image" in found.text


def test_driver_of_nodes_that_do_not_exist_is_not_seen(api: KubernetesApi) -> None:
    found = the(findings(api, profile("eks-trn2"), (nodes.neuron_driver,)), "neuron driver")
    assert found.level == "warn"
    assert "no node is up" in found.text
