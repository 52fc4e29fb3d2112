"""A small Kubernetes API server on loopback that keeps state: what the real client talks to in tests.

    with KubernetesApi() as api:
        core = kubernetes.client.CoreV1Api(api.client())
        api.fail(503, method="POST", path="/trainjobs")        # the next matching request is answered with 503
        api.store.create({...})                                # objects without a request

Objects are checked by `tests/schemas.py` as they come; `api.store.rejected` holds what was refused. `api.requests` is
what was asked. Storage and deletion are in `kubernetes_objects`, controllers in `kubernetes_trainer`.
"""

from __future__ import annotations

import itertools
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from tests.fakes.kubernetes_http import handler
from tests.fakes.kubernetes_objects import (
    RESOURCES,
    ApiError,
    Json,
    Key,
    KubernetesStore,
    ResourceType,
)
from tests.fakes.kubernetes_queries import patched, seen, selected

if TYPE_CHECKING:
    from kubernetes.client import ApiClient

_VERBS = {"GET": "get", "POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}


@dataclass
class Fault:
    """What goes wrong with the next requests that fit.

    Attributes:
        action: a status code; `drop` closes the connection unanswered; `lost` does what was asked and closes it
            unanswered; `slow` answers after `seconds`.
    """

    action: int | str
    method: str | None
    path: str
    times: int
    skip: int
    seconds: float

    def fits(self, method: str, path: str) -> bool:
        if self.times <= 0 or self.method not in (None, method) or not re.search(self.path, path):
            return False
        if self.skip > 0:
            self.skip -= 1
            return False
        self.times -= 1
        return True


class KubernetesApi:
    """The server; use it as a context manager.

    Attributes:
        store: the objects.
        requests: (method, path with query) of everything asked.
        allowed: whether (verb, resource, namespace) is permitted; asked for every request and access review.
        logs: lines of a pod's log by its name: (time with nanoseconds, text).
        pending: what Kueue's visibility API answers, by local queue.
    """

    def __init__(self, namespaces: tuple[str, ...] = ("default", "modelmill"), version: str = "v1.37.0") -> None:
        self.store = KubernetesStore(namespaces)
        self.requests: list[tuple[str, str]] = []
        self.allowed: Callable[[str, str, str], bool] = lambda _verb, _resource, _namespace: True
        self.logs: dict[str, list[tuple[str, str]]] = {}
        self.pending: dict[str, list[Json]] = {}
        self.before_request: Callable[[str, str], None] | None = None
        self.version = version
        self.missing: set[str] = set()  # API groups that are not installed
        self.longest_watch = 1800.0  # seconds
        self._faults: list[Fault] = []
        self._clock = itertools.count(time.time_ns())
        self._watches = 0  # grows when open watches are to be dropped
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler(self))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self.stopping = False

    def __enter__(self) -> KubernetesApi:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping = True
        self.drop_watches()
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def client(self) -> ApiClient:
        """The real client, pointed here and without retries of its own."""
        from kubernetes import client

        configuration = client.Configuration(host=self.url)
        configuration.retries = False
        return client.ApiClient(configuration)

    def kubeconfig(self, path: Path, namespace: str = "modelmill") -> Path:
        """Write a kubeconfig that leads here, for code that looks for one in `KUBECONFIG`."""
        context = {"cluster": "fake", "user": "fake", "namespace": namespace}
        text = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "fake", "cluster": {"server": self.url}}],
            "users": [{"name": "fake", "user": {}}],
            "contexts": [{"name": "fake", "context": context}],
            "current-context": "fake",
        }
        path.write_text(yaml.safe_dump(text))
        return path

    def fail(
        self,
        action: int | str,
        *,
        method: str | None = None,
        path: str = "",
        times: int = 1,
        skip: int = 0,
        seconds: float = 0.0,
    ) -> None:
        """Script a fault, see `Fault`; for 429, `seconds` is the Retry-After (whole seconds)."""
        self._faults.append(Fault(action, method, path, times, skip, seconds))

    def heal(self) -> None:
        """Forget all scripted faults."""
        self._faults.clear()

    def fault(self, method: str, path: str) -> Fault | None:
        return next((fault for fault in self._faults if fault.fits(method, path)), None)

    def drop_watches(self) -> None:
        """Close every open watch and followed log."""
        with self.store.lock:
            self._watches += 1
            self.store.lock.notify_all()

    def log(self, pod: str, *lines: str) -> None:
        """Append to a pod's log."""
        with self.store.lock:
            for line in lines:
                now = next(self._clock)
                text = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now // 10**9)) + f".{now % 10**9:09d}Z"
                self.logs.setdefault(pod, []).append((text, line))
            self.store.lock.notify_all()

    # What requests come to.

    def answer(self, method: str, path: str, query: dict[str, str], body: Any, patch: str) -> tuple[int, Json]:
        """(status, object) of a request that is answered in one piece."""
        path = path.rstrip("/")
        if path == "/version":
            major, minor = self.version.lstrip("v").split(".")[:2]
            names = ("buildDate", "compiler", "gitCommit", "gitTreeState", "goVersion", "platform")
            build = dict.fromkeys(names, "fake")
            return 200, {**build, "major": major, "minor": minor, "gitVersion": self.version}
        if found := re.match(r"^/apis/authorization.k8s.io/v1/(self)?subjectaccessreviews$", path):
            return 201, self._review(body, "SelfSubjectAccessReview" if found[1] else "SubjectAccessReview")
        if (found := re.match(r"^/apis/visibility.kueue.x-k8s.io/.*/localqueues/([^/]+)/", path)) and self.pending:
            return 200, {"kind": "PendingWorkloadsSummary", "metadata": {}, "items": self.pending.get(found[1], [])}
        if listing := self._discovery(path):
            return 200, listing
        kind, namespace, name, part = self._parse(path)
        verb = ("list" if not name else "get") if method == "GET" else _VERBS[method]
        resource = f"{kind.plural}.{kind.group}" if kind.group else kind.plural
        if not self.allowed(verb, f"{resource}/{part}" if part else resource, namespace):
            raise ApiError(403, "Forbidden", f'{resource} is forbidden: cannot {verb} in the namespace "{namespace}"')
        if method == "GET":
            return 200, self._read(kind, namespace, name, query)
        if method == "POST":
            return 201, self.store.create_as(kind, body, namespace)
        if method == "DELETE":
            return 200, self._delete(kind, namespace, name, query, body or {})
        key = self.store.key(kind, namespace, name)
        with self.store.lock:
            if method == "PATCH":
                body = patched(self.store.find(key), body, patch)
            return 200, self.store.replace(key, body, status_only=part == "status")

    def watch(self, path: str, query: dict[str, str]) -> Iterator[Json]:
        """Events of a watch until its time is over or it is dropped."""
        kind, namespace, name, _ = self._parse(path)
        if not self.allowed("watch", f"{kind.plural}.{kind.group}".rstrip("."), namespace):
            raise ApiError(403, "Forbidden", f"cannot watch {kind.plural}")
        if name:
            query = {**query, "fieldSelector": f"metadata.name={name}"}
        return self._events(kind, namespace, query)

    def _events(self, kind: ResourceType, namespace: str, query: dict[str, str]) -> Iterator[Json]:
        began = self._watches
        end = time.monotonic() + min(float(query.get("timeoutSeconds", 30)), self.longest_watch)
        since = query.get("resourceVersion", "")
        if since in ("", "0"):
            with self.store.lock:
                at = self.store.version
                yield from ({"type": "ADDED", "object": e} for e in self._select(kind, namespace, query))
        else:
            at = int(since)
        while self._watches == began:
            with self.store.lock:
                try:
                    changes = self.store.changes(at)
                except ApiError as error:
                    yield {"type": "ERROR", "object": error.status()}
                    return
                if not changes:
                    if (
                        not self.store.lock.wait(max(0.0, min(0.5, end - time.monotonic())))
                        and time.monotonic() >= end
                    ):
                        break
                    continue
            for change in changes:
                at = change.version
                if event := seen(change, kind, namespace, query):
                    yield event
        if query.get("allowWatchBookmarks", "").lower() == "true" and self._watches == began:
            meta = {"resourceVersion": str(at)}
            yield {"type": "BOOKMARK", "object": {"apiVersion": kind.api_version, "kind": kind.kind, "metadata": meta}}

    def follow(self, path: str, query: dict[str, str]) -> Iterator[str]:
        """Lines of a pod's log; with `follow` until the pod has ended or the connection is dropped."""
        kind, namespace, name, _ = self._parse(path)
        pod = self.store.find(self.store.key(kind, namespace, name))
        if pod.get("status", {}).get("phase", "Pending") == "Pending":
            raise ApiError(400, "BadRequest", f'container in pod "{name}" is waiting to start: ContainerCreating')
        return self._lines(self.store.key(kind, namespace, name), pod["metadata"]["uid"], query)

    def _lines(self, key: Key, uid: str, query: dict[str, str]) -> Iterator[str]:
        began, at, name = self._watches, 0, key[3]
        since = time.time() - float(query["sinceSeconds"]) if "sinceSeconds" in query else 0.0
        earliest = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(since))
        follow = query.get("follow", "").lower() == "true"
        stamps = query.get("timestamps", "").lower() == "true"
        while True:
            with self.store.lock:
                lines = self.logs.get(name, [])[at:]
                found = self.store.objects.get(key)
                gone = found is None or found["metadata"]["uid"] != uid
                ended = gone or found["status"].get("phase") in ("Succeeded", "Failed")  # type: ignore[index]
                if not lines and (ended or not follow or self._watches != began):
                    return
                if not lines:
                    self.store.lock.wait(0.5)
            at += len(lines)
            yield from (f"{stamp} {text}" if stamps else text for stamp, text in lines if stamp >= earliest)

    def _parse(self, path: str) -> tuple[ResourceType, str, str, str]:
        parts = path.strip("/").split("/")
        group, version, rest = ("", parts[1], parts[2:]) if parts[0] == "api" else (parts[1], parts[2], parts[3:])
        namespace = ""
        if rest[0] == "namespaces" and len(rest) > 2 and rest[2] not in ("status", "finalize"):
            namespace, rest = rest[1], rest[2:]
        kind = RESOURCES.get((group, version, rest[0]))
        if kind is None or group in self.missing:
            raise ApiError(404, "NotFound", "the server could not find the requested resource")
        return kind, namespace, rest[1] if len(rest) > 1 else "", rest[2] if len(rest) > 2 else ""

    def _discovery(self, path: str) -> Json | None:
        groups = {kind.group for kind in RESOURCES.values()} - self.missing
        if path in ("/api", "/apis"):
            found = {group: [k.version for k in RESOURCES.values() if k.group == group] for group in groups if group}
            entries = [
                {
                    "name": group,
                    "serverAddressByClientCIDRs": [],
                    "versions": [{"groupVersion": f"{group}/{v}", "version": v} for v in dict.fromkeys(versions)],
                    "preferredVersion": {"groupVersion": f"{group}/{versions[-1]}", "version": versions[-1]},
                }
                for group, versions in sorted(found.items())
            ]
            core = {"kind": "APIVersions", "versions": ["v1"]}
            return core if path == "/api" else {"kind": "APIGroupList", "apiVersion": "v1", "groups": entries}
        known = [k for k in RESOURCES.values() if path in (f"/apis/{k.group}/{k.version}", f"/api/{k.version}")]
        known = [k for k in known if path.startswith("/apis/") == bool(k.group) and k.group in groups]
        if not known:
            return None
        resources = [
            {"name": k.plural, "singularName": "", "namespaced": k.namespaced, "kind": k.kind, "verbs": []}
            for k in known
        ]
        return {"kind": "APIResourceList", "groupVersion": known[0].api_version, "resources": resources}

    def _review(self, body: Json, kind: str) -> Json:
        asked = body["spec"].get("resourceAttributes", {})
        resource = asked.get("resource", "") + (f".{asked['group']}" if asked.get("group") else "")
        resource += f"/{asked['subresource']}" if asked.get("subresource") else ""
        allowed = self.allowed(asked.get("verb", ""), resource, asked.get("namespace", ""))
        version = {"apiVersion": "authorization.k8s.io/v1", "kind": kind}
        return {**version, "metadata": {}, "spec": body["spec"], "status": {"allowed": allowed}}

    def _read(self, kind: ResourceType, namespace: str, name: str, query: dict[str, str]) -> Json:
        with self.store.lock:
            if name:
                return {**self.store.find(self.store.key(kind, namespace, name)), "apiVersion": kind.api_version}
            items = self._select(kind, namespace, query)
            begin, limit = int(query.get("continue") or 0), int(query.get("limit") or 0)
            meta = {"resourceVersion": str(self.store.version)}
            if limit and begin + limit < len(items):
                meta["continue"] = str(begin + limit)
            shown = items[begin : begin + limit] if limit else items[begin:]
            return {"apiVersion": kind.api_version, "kind": f"{kind.kind}List", "metadata": meta, "items": shown}

    def _select(self, kind: ResourceType, namespace: str, query: dict[str, str]) -> list[Json]:
        return [
            {**item, "apiVersion": kind.api_version}
            for key, item in sorted(self.store.objects.items())
            if key[:2] == (kind.group, kind.plural) and namespace in ("", key[2]) and selected(item, query)
        ]

    def _delete(self, kind: ResourceType, namespace: str, name: str, query: dict[str, str], body: Json) -> Json:
        options = {**query, **body}
        propagation = options.get("propagationPolicy") or "Background"
        grace = options.get("gracePeriodSeconds")
        with self.store.lock:
            if not name:
                for item in self._select(kind, namespace, query):
                    key = self.store.key(kind, item["metadata"].get("namespace", ""), item["metadata"]["name"])
                    self.store.delete(key, propagation=propagation)
                return {"kind": "Status", "apiVersion": "v1", "status": "Success"}
            key = self.store.key(kind, namespace, name)
            meta = self.store.find(key)["metadata"]
            for field, value in (body.get("preconditions") or {}).items():
                if value is not None and meta[field] != value:
                    message = f'the {field} in the precondition ({value}) does not match that of "{name}"'
                    raise ApiError(409, "Conflict", message)
            return self.store.delete(key, propagation=propagation, grace=None if grace is None else int(grace))
