"""`modelmill doctor --profile` against an API server that keeps state: a furnished cluster, then one thing amiss."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from modelmill.pipelines.doctor import cluster, nodes, queues
from modelmill.pipelines.doctor.kube import Kube, Unreachable
from tests.fakes.kubernetes_api import KubernetesApi
from tests.pipelines import a_cluster
from tests.pipelines.a_cluster import SPACE, findings, furnish, profile, the

ACCESS = (cluster.access, cluster.served, cluster.namespace, cluster.accounts, cluster.secrets)
ALL = (
    *ACCESS,
    *(cluster.volumes, cluster.runtime, cluster.permissions),
    *(queues.queue, queues.namespace_quota, nodes.nodes, nodes.neuron_driver),
)


@pytest.fixture
def api() -> Iterator[KubernetesApi]:
    with KubernetesApi() as server:
        yield server


def bare(api: KubernetesApi, name: str = "eks-p5", *overrides: str) -> Any:
    """A profile and a furnished cluster for it."""
    place = profile(name, *overrides)
    furnish(api, place)
    return place


def change(api: KubernetesApi, plural: str, name: str, edit: Any, space: str = SPACE) -> None:
    key = next(k for k in api.store.objects if k[1] == plural and k[3] == name and k[2] in ("", space))
    api.store.edit(key, edit)


def drop(api: KubernetesApi, plural: str, name: str) -> None:
    key = next(k for k in api.store.objects if k[1] == plural and k[3] == name)
    api.store.remove(key)


def test_furnished_cluster_is_in_order(api: KubernetesApi) -> None:
    found = findings(api, bare(api), ALL)
    assert [each for each in found if each.level != "ok"] == []
    subjects = ["kubernetes", "apis", "namespace", "account", "secret", "volume", "runtime", "permissions", "quota"]
    assert list(dict.fromkeys(each.subject for each in found)) == [*subjects, "nodes"]
    assert {method for method, path in api.requests if "reviews" not in path} == {"GET"}


def test_secrets_are_asked_for_by_name_only(api: KubernetesApi, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    real = Kube._call

    def noted(self: Kube, method: str, path: str, **options: Any) -> Any:
        if "/secrets/" in path:
            asked.append(options["accept"])
        return real(self, method, path, **options)

    monkeypatch.setattr(Kube, "_call", noted)
    assert the(findings(api, bare(api), (cluster.secrets,)), "secret").level == "ok"
    assert all("as=PartialObjectMetadata" in accept for accept in asked)
    assert asked


@pytest.mark.parametrize(
    ("check", "plural", "name", "text", "fix"),
    [
        (cluster.accounts, "serviceaccounts", "modelmill-runner", "does not exist", "create serviceaccount"),
        (cluster.secrets, "secrets", "mlflow-credentials", "does not exist", "create secret generic"),
        (cluster.volumes, "persistentvolumeclaims", "modelmill-home", "does not exist", "kubectl apply"),
        (cluster.runtime, "clustertrainingruntimes", "torch-gpu", "no ClusterTrainingRuntime torch-gpu", "kubectl"),
        (queues.queue, "localqueues", "training", "no LocalQueue training in modelmill; there are none", "kubectl"),
        (queues.queue, "clusterqueues", "all", "belongs to all, which does not exist", "describe localqueue"),
        (queues.queue, "resourceflavors", "nodes", "the ResourceFlavor does not exist", "edit clusterqueue all"),
        (cluster.namespace, "namespaces", SPACE, "does not exist", "kubectl apply"),
    ],
    ids=["account", "secret", "claim", "runtime", "local-queue", "cluster-queue", "flavor", "namespace"],
)
def test_what_is_missing_is_named(
    api: KubernetesApi, check: cluster.Check, plural: str, name: str, text: str, fix: str
) -> None:
    place = bare(api)
    drop(api, plural, name)
    (found,) = [each for each in findings(api, place, (check,)) if each.level == "fail"]
    assert text in found.text
    assert fix in found.fix


@pytest.mark.parametrize("group", ["trainer.kubeflow.org", "jobset.x-k8s.io", "kueue.x-k8s.io", "karpenter.sh"])
def test_missing_apis_are_named(api: KubernetesApi, group: str) -> None:
    place = bare(api)
    api.missing = {group}
    (found,) = [each for each in findings(api, place, (cluster.served,)) if each.level == "fail"]
    assert found.text == f"{group} is not installed"
    assert found.fix == "bash build/manifests/cluster/install.sh"
    assert not [each for each in findings(api, place, (cluster.runtime, queues.queue)) if "check itself" in each.text]


def test_other_version_of_an_api(api: KubernetesApi, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "TRAINER", ("trainer.kubeflow.org", "v2"))
    (found,) = [each for each in findings(api, profile(), (cluster.served,)) if each.level == "fail"]
    assert found.text == "trainer.kubeflow.org serves v1alpha1, not v2"


def test_silent_or_refusing_api_ends_with_one_finding(api: KubernetesApi) -> None:
    place = bare(api)
    api.fail(401, path="/apis$")
    found = findings(api, place, ALL)
    assert [each.level for each in found] == ["fail"]
    assert "your credentials are refused" in found[0].text
    api.fail("drop", path="/serviceaccounts", times=9)
    found = findings(api, place, ALL)
    assert [each.subject for each in found if each.level == "fail"] == ["kubernetes"]
    assert "does not answer" in found[-1].text


def test_forbidden_and_broken_questions_do_not_end_the_others(api: KubernetesApi) -> None:
    place = bare(api)
    api.allowed = lambda verb, resource, space: resource not in ("nodes", "secrets")
    api.fail(500, path="/resourcequotas")
    found = findings(api, place, ALL)
    assert the(found, "secrets").level == "warn"
    assert "you may not look" in the(found, "secrets").text
    assert "nodes is forbidden" in the(found, "nodes").text
    assert "answers 500" in the(found, "namespace quota").text
    assert [each for each in found if each.subject == "quota"]


def test_no_kubeconfig_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    with pytest.raises(Unreachable, match="no access to Kubernetes"):
        Kube.connect()
    monkeypatch.setattr("modelmill.pipelines.doctor.services.examine", lambda place: [])
    found = cluster.examine(profile())
    assert [(each.level, each.subject) for each in found] == [("ok", "profile"), ("fail", "kubernetes")]
    assert "update-kubeconfig" in found[1].fix


def test_profile_without_a_registry_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    monkeypatch.setattr("modelmill.pipelines.doctor.services.examine", lambda place: [])
    found = the(cluster.examine(profile("eks-p5", 'images.registry=""')), "profile")
    assert found.level == "fail"
    assert "images.registry: empty" in found.text


@pytest.mark.parametrize(
    ("mode", "phase", "text"),
    [("ReadWriteOnce", "Bound", "which needs ReadWriteMany"), ("ReadWriteMany", "Pending", "is Pending, not Bound")],
)
def test_volume_must_be_shared_and_bound(api: KubernetesApi, mode: str, phase: str, text: str) -> None:
    a_cluster.claim(api, "modelmill-home", mode, phase)
    found = the(findings(api, profile(), (cluster.volumes,)), "volume")
    assert found.level == "fail"
    assert text in found.text


def test_namespace_without_pod_security_is_a_warning(api: KubernetesApi) -> None:
    found = the(findings(api, profile(), (cluster.namespace,)), "namespace")
    assert found.level == "warn"
    assert found.fix == "kubectl label --overwrite namespace modelmill pod-security.kubernetes.io/enforce=restricted"


@pytest.mark.parametrize(
    ("edit", "text"),
    [
        (
            lambda spec: spec["template"]["spec"]["replicatedJobs"][0]["template"]["metadata"].update(labels={}),
            "no replicated job labelled",
        ),
        (lambda spec: spec.update(mlPolicy={"numNodes": 1}), "no mlPolicy.torch"),
    ],
    ids=["label", "policy"],
)
def test_runtime_that_starts_nothing_is_refused(api: KubernetesApi, edit: Any, text: str) -> None:
    place = bare(api)
    change(api, "clustertrainingruntimes", "torch-gpu", lambda item: edit(item["spec"]))
    found = the(findings(api, place, (cluster.runtime,)), "runtime")
    assert found.level == "fail"
    assert text in found.text


def test_lacking_permissions_are_named_with_their_role(api: KubernetesApi) -> None:
    place = bare(api)
    api.allowed = lambda verb, resource, space: (
        (verb, resource)
        not in (
            ("get", "pods/log"),
            ("patch", "trainjobs.trainer.kubeflow.org"),
            ("create", "runs.pipelines.kubeflow.org"),
        )
    )
    found = findings(api, place, (cluster.permissions,))
    assert [each.level for each in found] == ["fail", "warn", "fail"]
    assert "you may not get pods/log in modelmill, which logs and cancel needs" in found[0].text
    assert "you may not create runs of KFP" in found[1].text
    assert "service account modelmill-runner may not patch trainjobs, get pods/log" in found[2].text
    assert "--role trainjob-launcher --serviceaccount modelmill:modelmill-runner" in found[2].fix


def test_who_may_not_ask_for_an_account_is_told_how(api: KubernetesApi) -> None:
    place = bare(api)
    api.fail(403, path="/subjectaccessreviews", times=9)
    found = findings(api, place, (cluster.permissions,))[-1]
    assert found.level == "warn"
    assert "--as system:serviceaccount:modelmill:modelmill-runner" in found.fix


def test_broken_check_is_a_finding(api: KubernetesApi) -> None:
    def broken(target: cluster.Target) -> Iterator[Any]:
        yield from ()
        raise ZeroDivisionError("by zero")

    (found,) = findings(api, profile(), (broken,))
    assert found.text == "the check itself failed: ZeroDivisionError: by zero"
