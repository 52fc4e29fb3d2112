"""The fake Kubernetes API keeps its promises; the same tests hold for a real server that KUBECONFIG names."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from kubernetes import client, config, watch
from kubernetes.client.exceptions import ApiException

from tests.fakes.kubernetes_api import KubernetesApi

NAMESPACE = "modelmill"


@pytest.fixture
def api() -> Iterator[KubernetesApi]:
    with KubernetesApi() as server:
        yield server


@pytest.fixture(params=["fake", "real"])
def core(request: pytest.FixtureRequest) -> Iterator[tuple[client.CoreV1Api, str]]:
    """A client and a namespace to work in, of the fake and of the server in KUBECONFIG."""
    if request.param == "fake":
        with KubernetesApi() as server:
            yield client.CoreV1Api(server.client()), NAMESPACE
        return
    if not os.environ.get("KUBECONFIG"):
        pytest.skip("KUBECONFIG names no cluster to compare with")
    found = client.CoreV1Api(config.new_client_from_config())
    name = f"modelmill-contract-{uuid.uuid4().hex[:8]}"
    found.create_namespace({"metadata": {"name": name}})
    try:
        yield found, name
    finally:
        found.delete_namespace(name)


def _config_map(name: str = "", **meta: Any) -> dict[str, Any]:
    named = {"name": name} if name else {}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {**named, **meta}, "data": {"a": "1"}}


def _status(call: Any, *args: Any, **options: Any) -> int:
    with pytest.raises(ApiException) as caught:
        call(*args, **options)
    return caught.value.status


def test_objects_get_identity_and_a_second_one_of_the_name_is_refused(core):
    api, namespace = core
    made = api.create_namespaced_config_map(namespace, _config_map("one"))
    assert made.metadata.uid
    assert made.metadata.resource_version
    assert made.metadata.creation_timestamp
    assert _status(api.create_namespaced_config_map, namespace, _config_map("one")) == 409
    assert _status(api.read_namespaced_config_map, "two", namespace) == 404
    assert _status(api.create_namespaced_config_map, "no-such-namespace", _config_map("one")) == 404
    names = {
        api.create_namespaced_config_map(namespace, _config_map(generateName="made-")).metadata.name for _ in range(2)
    }
    assert len(names) == 2
    assert all(name.startswith("made-") for name in names)


def test_a_stale_writer_meets_a_conflict(core):
    api, namespace = core
    stale = api.create_namespaced_config_map(namespace, _config_map("one"))
    api.patch_namespaced_config_map("one", namespace, {"data": {"b": "2", "a": None}})
    assert api.read_namespaced_config_map("one", namespace).data == {"b": "2"}
    assert _status(api.replace_namespaced_config_map, "one", namespace, stale) == 409
    steps = [{"op": "add", "path": "/data/c~1d", "value": "3"}]
    with pytest.raises(ApiException):  # a key of a config map has no slash
        api.patch_namespaced_config_map("one", namespace, [{"op": "test", "path": "/data/b", "value": "9"}, *steps])


def test_selectors(core):
    api, namespace = core
    for name, labels in {"one": {"a": "1"}, "two": {"a": "2", "b": ""}, "three": {}}.items():
        api.create_namespaced_config_map(namespace, _config_map(name, labels={**labels, "ours": "yes"}))

    def names(**options: str) -> set[str]:
        options["label_selector"] = f"ours=yes,{options.get('label_selector', 'ours')}"
        return {item.metadata.name for item in api.list_namespaced_config_map(namespace, **options).items}

    assert names(label_selector="a") == {"one", "two"}
    assert names(label_selector="a=1") == {"one"}
    assert names(label_selector="a in (1, 3),!b") == {"one"}
    assert names(label_selector="a!=1") == {"two", "three"}
    assert names(field_selector="metadata.name=two") == {"two"}


def test_deletion_waits_for_finalizers_and_takes_dependents_along(core):
    api, namespace = core
    owner = api.create_namespaced_config_map(namespace, _config_map("owner", finalizers=["modelmill.dev/test"]))
    reference = {"apiVersion": "v1", "kind": "ConfigMap", "name": "owner", "uid": owner.metadata.uid}
    api.create_namespaced_config_map(namespace, _config_map("child", ownerReferences=[reference]))
    stale = client.V1DeleteOptions(preconditions=client.V1Preconditions(uid=str(uuid.uuid4())))
    assert _status(api.delete_namespaced_config_map, "owner", namespace, body=stale) == 409
    api.delete_namespaced_config_map("owner", namespace)
    assert api.read_namespaced_config_map("owner", namespace).metadata.deletion_timestamp
    api.patch_namespaced_config_map("owner", namespace, {"metadata": {"finalizers": None}})
    assert _status(api.read_namespaced_config_map, "owner", namespace) == 404
    events = watch.Watch().stream(
        api.list_namespaced_config_map, namespace, field_selector="metadata.name=child", timeout_seconds=5
    )
    if any(item.metadata.name == "child" for item in api.list_namespaced_config_map(namespace).items):
        assert "DELETED" in {event["type"] for event in events}


def test_a_watch_goes_on_from_the_version_of_a_list(core):
    api, namespace = core
    version = api.list_namespaced_config_map(namespace).metadata.resource_version
    api.create_namespaced_config_map(namespace, _config_map("one", labels={"a": "1"}))
    api.patch_namespaced_config_map("one", namespace, {"metadata": {"labels": {"a": "2"}}})
    api.delete_namespaced_config_map("one", namespace)
    found = watch.Watch().stream(
        api.list_namespaced_config_map,
        namespace,
        resource_version=version,
        label_selector="a=1",
        timeout_seconds=1,
    )
    assert [event["type"] for event in found] == ["ADDED", "DELETED"]  # it left the selection, then the world


def test_an_unknown_field_and_a_bad_name_are_refused(core):
    api, namespace = core
    bad = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "Upper"}, "spec": {"containers": [{"name": "a"}]}}
    assert _status(api.create_namespaced_pod, namespace, bad) == 422


def test_a_version_too_old_is_gone(api):
    core = client.CoreV1Api(api.client())
    core.create_namespaced_config_map(NAMESPACE, _config_map("one"))
    api.store.expire()
    with pytest.raises(ApiException) as caught:
        list(watch.Watch().stream(core.list_namespaced_config_map, NAMESPACE, resource_version=1, timeout_seconds=1))
    assert caught.value.status == 410


def test_scripted_faults(api):
    core = client.CoreV1Api(api.client())
    api.fail(429, seconds=7, method="POST")
    with pytest.raises(ApiException) as caught:
        core.create_namespaced_config_map(NAMESPACE, _config_map("one"))
    assert (caught.value.status, caught.value.headers["Retry-After"]) == (429, "7")
    api.fail("drop", method="POST")
    with pytest.raises(Exception, match=r"[Cc]onnection|RemoteDisconnected|Protocol"):
        core.create_namespaced_config_map(NAMESPACE, _config_map("one"))
    assert api.store.all("configmaps") == []
    api.fail("lost", method="POST")
    with pytest.raises(Exception, match=r"[Cc]onnection|RemoteDisconnected|Protocol"):
        core.create_namespaced_config_map(NAMESPACE, _config_map("one"))
    assert len(api.store.all("configmaps")) == 1  # it was done, only the answer was lost


def test_a_dropped_watch_ends(api):
    core = client.CoreV1Api(api.client())
    stream = watch.Watch().stream(core.list_namespaced_config_map, NAMESPACE, timeout_seconds=30)
    core.create_namespaced_config_map(NAMESPACE, _config_map("one"))
    assert next(stream)["type"] == "ADDED"
    api.drop_watches()
    assert list(stream) == []


def test_status_is_written_apart_and_does_not_grow_the_generation(api):
    custom = client.CustomObjectsApi(api.client())
    where = ("trainer.kubeflow.org", "v1alpha1", NAMESPACE, "trainjobs")
    kind = {"apiVersion": "trainer.kubeflow.org/v1alpha1", "kind": "TrainJob"}
    job = {**kind, "metadata": {"name": "one"}, "spec": {"runtimeRef": {"name": "torch"}}, "status": {"x": 1}}
    made = custom.create_namespaced_custom_object(*where, job)
    assert "status" not in made
    assert made["spec"]["runtimeRef"]["kind"] == "ClusterTrainingRuntime" or not api.store.rejected
    condition = {
        "type": "Suspended", "status": "True", "reason": "Queued", "message": "waits",
        "lastTransitionTime": "2026-01-01T00:00:00Z",
    }  # fmt: skip
    custom.patch_namespaced_custom_object_status(*where, "one", {"status": {"conditions": [condition]}})
    found = custom.get_namespaced_custom_object(*where, "one")
    assert found["status"]["conditions"][0]["type"] == "Suspended"
    assert found["metadata"]["generation"] == 1
    custom.patch_namespaced_custom_object(*where, "one", {"spec": {"suspend": True}})
    assert custom.get_namespaced_custom_object(*where, "one")["metadata"]["generation"] == 2


def test_logs_are_followed_until_the_pod_ends(api):
    core = client.CoreV1Api(api.client())
    spec = {"containers": [{"name": "node", "image": "a@sha256:b"}]}
    core.create_namespaced_pod(NAMESPACE, {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}, "spec": spec})
    assert _status(core.read_namespaced_pod_log, "p", NAMESPACE) == 400  # it has not started
    api.store.set_status("pods", "p", {"phase": "Running"})
    api.log("p", "first")
    stream = core.read_namespaced_pod_log("p", NAMESPACE, follow=True, timestamps=True, _preload_content=False)
    api.log("p", "second")
    api.store.set_status("pods", "p", {"phase": "Succeeded"})
    lines = stream.read().decode().splitlines()
    assert [line.partition(" ")[2] for line in lines] == ["first", "second"]
    assert lines == sorted(lines)


def test_permissions_are_asked_and_enforced(api):
    api.allowed = lambda verb, resource, _namespace: (verb, resource) != ("create", "trainjobs.trainer.kubeflow.org")
    asked = {"verb": "create", "resource": "trainjobs", "group": "trainer.kubeflow.org", "namespace": NAMESPACE}
    review = {"spec": {"resourceAttributes": asked}}
    reviews = client.AuthorizationV1Api(api.client())
    assert reviews.create_self_subject_access_review(review).status.allowed is False
    asked["verb"] = "get"
    assert reviews.create_self_subject_access_review(review).status.allowed is True
    custom = client.CustomObjectsApi(api.client())
    where = ("trainer.kubeflow.org", "v1alpha1", NAMESPACE, "trainjobs")
    assert _status(custom.create_namespaced_custom_object, *where, {}) == 403


def test_it_says_what_it_serves(api):
    assert client.VersionApi(api.client()).get_code().git_version == api.version
    api.missing.add("kueue.x-k8s.io")
    groups = {group.name for group in client.ApisApi(api.client()).get_api_versions().groups}
    assert "trainer.kubeflow.org" in groups
    assert "kueue.x-k8s.io" not in groups
