"""What the fake Kubernetes API keeps: objects, their history for watches, deletion with finalizers and owners.

Free of HTTP: `KubernetesStore` is what controllers of a test work on, `kubernetes_api` puts it on a socket.
"""

from __future__ import annotations

import copy
import itertools
import re
import threading
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from tests import schemas

Json = dict[str, Any]
_NAME = re.compile(r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$")
_LABEL = re.compile(r"^(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?$")
_FOREGROUND = "foregroundDeletion"
_WITHOUT_CRD = {"Workload", "PendingWorkloadsSummary"}  # kinds that nothing of ours writes


@dataclass(frozen=True)
class ResourceType:
    """One kind as the API serves it."""

    group: str
    version: str
    plural: str
    kind: str
    namespaced: bool = True

    @property
    def api_version(self) -> str:
        return f"{self.group}/{self.version}" if self.group else self.version


def _types() -> Iterator[ResourceType]:
    for plural, kind in {
        "pods": "Pod", "events": "Event", "secrets": "Secret", "configmaps": "ConfigMap", "services": "Service",
        "persistentvolumeclaims": "PersistentVolumeClaim", "serviceaccounts": "ServiceAccount",
        "resourcequotas": "ResourceQuota", "limitranges": "LimitRange",
    }.items():  # fmt: skip
        yield ResourceType("", "v1", plural, kind)
    for plural, kind in {"nodes": "Node", "namespaces": "Namespace", "persistentvolumes": "PersistentVolume"}.items():
        yield ResourceType("", "v1", plural, kind, False)
    yield ResourceType("apps", "v1", "deployments", "Deployment")
    yield ResourceType("apps", "v1", "daemonsets", "DaemonSet")
    yield ResourceType("batch", "v1", "jobs", "Job")
    yield ResourceType("batch", "v1", "cronjobs", "CronJob")
    yield ResourceType("storage.k8s.io", "v1", "storageclasses", "StorageClass", False)
    yield ResourceType("trainer.kubeflow.org", "v1alpha1", "trainjobs", "TrainJob")
    yield ResourceType("trainer.kubeflow.org", "v1alpha1", "trainingruntimes", "TrainingRuntime")
    yield ResourceType("trainer.kubeflow.org", "v1alpha1", "clustertrainingruntimes", "ClusterTrainingRuntime", False)
    yield ResourceType("jobset.x-k8s.io", "v1alpha2", "jobsets", "JobSet")
    for version in ("v1beta1", "v1beta2"):
        yield ResourceType("kueue.x-k8s.io", version, "localqueues", "LocalQueue")
        yield ResourceType("kueue.x-k8s.io", version, "workloads", "Workload")
        yield ResourceType("kueue.x-k8s.io", version, "clusterqueues", "ClusterQueue", False)
        yield ResourceType("kueue.x-k8s.io", version, "cohorts", "Cohort", False)
        yield ResourceType("kueue.x-k8s.io", version, "resourceflavors", "ResourceFlavor", False)
        yield ResourceType("kueue.x-k8s.io", version, "topologies", "Topology", False)
        yield ResourceType("kueue.x-k8s.io", version, "workloadpriorityclasses", "WorkloadPriorityClass", False)
    yield ResourceType("karpenter.sh", "v1", "nodepools", "NodePool", False)
    yield ResourceType("karpenter.k8s.aws", "v1", "ec2nodeclasses", "EC2NodeClass", False)
    crds = "customresourcedefinitions"
    yield ResourceType("apiextensions.k8s.io", "v1", crds, "CustomResourceDefinition", False)


RESOURCES = {(entry.group, entry.version, entry.plural): entry for entry in _types()}
BY_KIND = {(entry.api_version, entry.kind): entry for entry in RESOURCES.values()}
Key = tuple[str, str, str, str]  # group, plural, namespace, name


class ApiError(Exception):
    """What an API server answers instead of an object."""

    def __init__(self, code: int, reason: str, message: str) -> None:
        super().__init__(f"{code} {reason}: {message}")
        self.code, self.reason, self.message = code, reason, message

    def status(self) -> Json:
        return {
            "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
            "message": self.message, "reason": self.reason, "code": self.code,
        }  # fmt: skip


@dataclass(frozen=True)
class Change:
    """One entry of the history: what an object became (or was, when deleted) and what it was before."""

    version: int
    type: str
    key: Key
    item: Json
    before: Json | None


class KubernetesStore:
    """Objects with the behaviour of an API server; safe for many threads.

    Attributes:
        rejected: problems of objects that were refused, for tests to look at.
        checks: whether objects are checked against their schemas.
        kubelet: whether somebody ends pods: then a deleted pod that has a node stays until `remove` is called.
    """

    def __init__(self, namespaces: tuple[str, ...] = ("default", "modelmill")) -> None:
        self.lock = threading.Condition(threading.RLock())
        self.objects: dict[Key, Json] = {}
        self.history: list[Change] = []
        self.oldest = 0
        self.rejected: list[str] = []
        self.checks = True
        self.kubelet = False
        self.on_change: list[Callable[[Change], None]] = []
        self._versions, self._suffixes = itertools.count(1), itertools.count(1)
        self.version = 0
        for name in namespaces:
            self.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})

    # What controllers and tests of the store itself use.

    def create(self, item: Json, namespace: str = "") -> Json:
        """Store a new object; raises `ApiError` 404, 409 or 422 as an API server answers."""
        found = BY_KIND.get((item.get("apiVersion", ""), item.get("kind", "")))
        if found is None:
            raise ApiError(404, "NotFound", f"no kind {item.get('kind')} in {item.get('apiVersion')}")
        return self.create_as(found, item, namespace)

    def create_as(self, kind: ResourceType, item: Json, namespace: str = "") -> Json:
        with self.lock:
            made = copy.deepcopy(item)
            made = {"apiVersion": kind.api_version, "kind": kind.kind, **made}
            meta = made.setdefault("metadata", {})
            if kind.namespaced:
                namespace = namespace or meta.get("namespace") or "default"
                if meta.setdefault("namespace", namespace) != namespace:
                    raise ApiError(400, "BadRequest", "the namespace of the object does not match that of the request")
                if ("", "namespaces", "", namespace) not in self.objects:
                    raise ApiError(404, "NotFound", f'namespaces "{namespace}" not found')
            if not meta.get("name") and meta.get("generateName"):
                meta["name"] = f"{meta['generateName']}{next(self._suffixes):05x}"
            key = self.key(kind, namespace, meta.get("name", ""))
            if key in self.objects:
                raise ApiError(409, "AlreadyExists", f'{kind.plural} "{key[3]}" already exists')
            if kind.kind != "Event" and _has_status(kind):
                made.pop("status", None)
            made = schemas.with_defaults(made)
            self._check(made, None)
            now = timestamp()
            meta = made["metadata"]
            meta.update(uid=str(uuid.uuid4()), creationTimestamp=now, generation=1)
            self._record("ADDED", key, made, None)
            return copy.deepcopy(made)

    def get(self, plural: str, name: str, namespace: str = "modelmill") -> Json | None:
        """An object by its plural (and cluster-wide ones whatever the namespace), or None."""
        with self.lock:
            found = [item for key, item in self.objects.items() if key[1] == plural and key[3] == name]
            fitting = [item for item in found if item["metadata"].get("namespace", namespace) == namespace]
            return copy.deepcopy(fitting[0]) if fitting else None

    def all(self, plural: str, namespace: str | None = None) -> list[Json]:
        """Objects of a plural in the order of their names."""
        with self.lock:
            return [
                copy.deepcopy(item)
                for key, item in sorted(self.objects.items())
                if key[1] == plural and namespace in (None, key[2])
            ]

    def edit(self, key: Key, change: Callable[[Json], None], *, status_only: bool = False) -> Json:
        """Change an object in place; generation grows when more than metadata and status changed."""
        with self.lock:
            old = self.find(key)
            new = copy.deepcopy(old)
            change(new)
            return self.replace(key, new, status_only=status_only)

    def set_status(self, plural: str, name: str, status: Json, namespace: str = "modelmill") -> None:
        """Write an object's status, as its controller does."""
        key = next(k for k in self.objects if k[1:] == (plural, namespace, name) or k[1:] == (plural, "", name))
        self.edit(key, lambda item: item.update(status=copy.deepcopy(status)), status_only=True)

    # What requests do.

    def key(self, kind: ResourceType, namespace: str, name: str) -> Key:
        return kind.group, kind.plural, namespace if kind.namespaced else "", name

    def find(self, key: Key) -> Json:
        with self.lock:
            if key not in self.objects:
                group = f".{key[0]}" if key[0] else ""
                raise ApiError(404, "NotFound", f'{key[1]}{group} "{key[3]}" not found')
            return self.objects[key]

    def replace(self, key: Key, item: Json, *, status_only: bool = False) -> Json:
        with self.lock:
            old = self.find(key)
            sent = item.get("metadata", {})
            if sent.get("resourceVersion") not in (None, "", old["metadata"]["resourceVersion"]):
                raise ApiError(409, "Conflict", f'cannot update "{key[3]}": the object has been modified')
            if sent.get("uid") not in (None, old["metadata"]["uid"]):
                raise ApiError(409, "Conflict", f'cannot update "{key[3]}": the uid is another')
            if status_only:
                new = {**copy.deepcopy(old), "status": copy.deepcopy(item.get("status", {}))}
            else:
                new = copy.deepcopy(item)
                fixed = ("uid", "creationTimestamp", "generation", "deletionTimestamp", "name", "namespace")
                kept = {name: old["metadata"][name] for name in fixed if name in old["metadata"]}
                new["metadata"] = {**new.get("metadata", {}), **kept}
                if _has_status(BY_KIND[old["apiVersion"], old["kind"]]):
                    new.pop("status", None)
                    new |= {"status": old["status"]} if "status" in old else {}
                new = schemas.with_defaults(new)
            self._check(new, old, status_only)
            ignored = ("metadata", "status")
            if {k: v for k, v in new.items() if k not in ignored} != {
                k: v for k, v in old.items() if k not in ignored
            }:
                new["metadata"]["generation"] = old["metadata"].get("generation", 1) + 1
            if {**new, "metadata": {**new["metadata"], "resourceVersion": ""}} == {
                **old,
                "metadata": {**old["metadata"], "resourceVersion": ""},
            }:
                return copy.deepcopy(old)  # nothing changed: no new version, no event
            self._record("MODIFIED", key, new, old)
            self._collect()
            return copy.deepcopy(new)

    def delete(self, key: Key, *, propagation: str = "Background", grace: int | None = None) -> Json:
        """Delete as asked: at once, or once finalizers, dependents and the kubelet are through."""
        with self.lock:
            old = self.find(key)
            new = copy.deepcopy(old)
            meta = new["metadata"]
            finalizers = list(meta.get("finalizers", []))
            if propagation == "Foreground" and _FOREGROUND not in finalizers:
                finalizers.append(_FOREGROUND)
            if propagation == "Orphan":
                self._disown(meta["uid"])
            if self._has_kubelet(new) and grace != 0:
                meta.setdefault("deletionGracePeriodSeconds", new["spec"].get("terminationGracePeriodSeconds", 30))
                waiting = True
            else:
                waiting = bool(finalizers)
            if waiting:
                if "deletionTimestamp" not in meta:
                    meta.update(deletionTimestamp=timestamp())
                    if finalizers:
                        meta["finalizers"] = finalizers
                    self._record("MODIFIED", key, new, old)
            else:
                self._record("DELETED", key, new, old)
            self._collect()
            return copy.deepcopy(new)

    def remove(self, key: Key) -> None:
        """What a kubelet does once a deleted pod's processes are gone."""
        with self.lock:
            if key in self.objects and not self.objects[key]["metadata"].get("finalizers"):
                self._record("DELETED", key, self.objects[key], self.objects[key])
            self._collect()

    def expire(self) -> None:
        """Forget the history, as a compaction of etcd does: watches from before get 410."""
        with self.lock:
            self.history.clear()
            self.oldest = self.version

    def changes(self, since: int) -> list[Change]:
        """History after a version; raises `ApiError` 410 when it reaches back too far."""
        with self.lock:
            if since < self.oldest:
                raise ApiError(410, "Expired", f"too old resource version: {since} ({self.oldest})")
            return [change for change in self.history if change.version > since]

    def _record(self, what: str, key: Key, item: Json, before: Json | None) -> None:
        self.version = next(self._versions)
        item["metadata"]["resourceVersion"] = str(self.version)
        if what == "DELETED":
            self.objects.pop(key, None)
        else:
            self.objects[key] = item
        change = Change(self.version, what, key, copy.deepcopy(item), copy.deepcopy(before))
        self.history.append(change)
        self.lock.notify_all()
        for listener in self.on_change:
            listener(change)

    def _check(self, item: Json, old: Json | None, status_only: bool = False) -> None:
        if not self.checks:
            return
        meta = item["metadata"]
        found = [] if _NAME.match(meta.get("name", "")) else [f"metadata.name: {meta.get('name')!r} is no DNS name"]
        found += [
            f"metadata.labels: {name}={value!r} is no label"
            for name, value in meta.get("labels", {}).items()
            if not _LABEL.match(value) or len(value) > 63
        ]
        if not schemas.is_custom(item):
            found += schemas.builtin_problems(item, schemas.VERSIONS[-1:])
        elif schemas.crd_folder() is not None and item["kind"] not in _WITHOUT_CRD:
            found += schemas.custom_problems(item, old, rules=not status_only)
        if found:
            self.rejected += found
            raise ApiError(422, "Invalid", f"{item['kind']} {meta.get('name')!r} is invalid: {'; '.join(found)}")

    def _has_kubelet(self, item: Json) -> bool:
        if not (self.kubelet and item["kind"] == "Pod" and item["spec"].get("nodeName")):
            return False
        return item.get("status", {}).get("phase") not in ("Succeeded", "Failed")

    def _disown(self, uid: str) -> None:
        for key, item in list(self.objects.items()):
            owners = item["metadata"].get("ownerReferences", [])
            if any(owner["uid"] == uid for owner in owners):
                self.edit(
                    key,
                    lambda item: item["metadata"].update(
                        ownerReferences=[o for o in item["metadata"]["ownerReferences"] if o["uid"] != uid]
                    ),
                )

    def _collect(self) -> None:
        """The garbage collector, run to its end: foreground deletions, finished finalizers, objects without owner."""
        while True:
            uids = {item["metadata"]["uid"] for item in self.objects.values()}
            moved = [self._collect_one(key, item, uids) for key, item in list(self.objects.items())]
            if True not in moved:
                return

    def _collect_one(self, key: Key, item: Json, uids: set[str]) -> bool:
        meta = item["metadata"]
        if key not in self.objects or self.objects[key] is not item:
            return False
        owners = meta.get("ownerReferences", [])
        if owners and not any(owner["uid"] in uids for owner in owners) and "deletionTimestamp" not in meta:
            self.delete(key)
            return True
        if "deletionTimestamp" not in meta:
            return False
        if _FOREGROUND in meta.get("finalizers", []):
            dependents = [
                (other, entry)
                for other, entry in self.objects.items()
                if any(owner["uid"] == meta["uid"] for owner in entry["metadata"].get("ownerReferences", []))
            ]
            waiting = [other for other, entry in dependents if "deletionTimestamp" not in entry["metadata"]]
            for other in waiting:
                if other in self.objects:  # the deletion of another may have taken it along
                    self.delete(other, propagation="Foreground")
            if not dependents:
                rest = [name for name in meta["finalizers"] if name != _FOREGROUND]
                self.edit(key, lambda entry: entry["metadata"].update(finalizers=rest))
            return bool(waiting) or not dependents
        if not meta.get("finalizers") and not self._has_kubelet(item):
            self._record("DELETED", key, item, item)
            return True
        return False


def _has_status(kind: ResourceType) -> bool:
    return kind.kind not in (
        "Event",
        "Secret",
        "ConfigMap",
        "ServiceAccount",
        "StorageClass",
        "ClusterTrainingRuntime",
    )


def timestamp(when: datetime | None = None) -> str:
    """A time as the API writes it."""
    return (when or datetime.now(UTC)).strftime("%Y-%m-%dT%H:%M:%SZ")
