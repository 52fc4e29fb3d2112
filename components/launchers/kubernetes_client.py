"""TrainJobs and what belongs to them on a cluster, through the Kubernetes client and a real API server's troubles.

A request that meets 429, 5xx, a dropped connection or no answer at all is tried again, longer and longer apart, for as
long as `patience`: training goes on without the API server, and so does who waits for it.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

from modelmill.components.core.errors import UserError
from modelmill.components.launchers.kubernetes_access import api_client
from modelmill.components.launchers.trainjob_render import GROUP, PLURAL, VERSION

Json = dict[str, Any]
_KUEUE_VERSIONS = ("v1beta2", "v1beta1")
_TRANSIENT = {408, 429, 500, 502, 503, 504}
_LONGEST_PAUSE = 30.0  # seconds
_TIMEOUT = (10, 60)  # seconds to connect and to answer
_PERMISSION = "grant it with the role of the service account, or ask who runs the cluster"
logger = logging.getLogger("modelmill")


class AlreadyExistsError(Exception):
    """There is an object of this name."""


class ConflictError(Exception):
    """The object is not what the request assumed: another one of its name, or changed since it was read."""


class ExpiredError(Exception):
    """The version to watch from is forgotten; read the object anew."""


class ClusterUnreachableError(RuntimeError):
    """The API server did not answer for longer than the launcher waits."""


class Cluster:
    """One namespace of a cluster."""

    def __init__(
        self,
        namespace: str,
        api: Any,
        *,
        patience: float = 3600.0,
        pause: float = 1.0,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """
        Args:
            namespace: of the jobs.
            api: an `ApiClient` of the kubernetes package.
            patience: seconds a request is tried again for.
            pause: seconds before the second try; doubled before every further one.
            sleep: how pauses are made.
        """
        from kubernetes import client

        self.namespace, self.patience, self.pause, self.sleep = namespace, patience, pause, sleep
        self._core, self._custom = client.CoreV1Api(api), client.CustomObjectsApi(api)
        self._where = (GROUP, VERSION, namespace, PLURAL)

    @classmethod
    def connect(cls, namespace: str) -> Cluster:
        """The cluster this pod runs in, else that of the kubeconfig.

        Raises:
            UserError: there is neither, or the client's package is missing.
        """
        return cls(namespace, api_client())

    def job(self, name: str) -> Json | None:
        """A TrainJob, or None."""
        with suppress(KeyError):
            return self._call(self._custom.get_namespaced_custom_object, *self._where, name)
        return None

    def jobs(self, selector: str) -> list[Json]:
        """TrainJobs with these labels."""
        return self._call(self._custom.list_namespaced_custom_object, *self._where, label_selector=selector)["items"]

    def create_job(self, job: Json) -> Json:
        """Create a TrainJob.

        Raises:
            AlreadyExistsError: there is one of its name; an earlier try of this very call may have made it.
            UserError: the cluster has no TrainJobs, or does not take this one.
        """
        try:
            return self._call(self._custom.create_namespaced_custom_object, *self._where, job)
        except KeyError as error:
            raise UserError(
                f"launcher: the cluster has no TrainJobs or no namespace {self.namespace} ({error.args[0]});"
                " install Kubeflow Trainer and the manifests, or choose another profile"
            ) from None

    def patch_job(self, name: str, patch: Json) -> Json | None:
        """Merge into a TrainJob; with `metadata.resourceVersion` in the patch only while it is the current one.

        Raises:
            ConflictError: it is not.
        """
        with suppress(KeyError):
            return self._call(self._custom.patch_namespaced_custom_object, *self._where, name, patch)
        return None

    def delete_job(self, job: Json, *, unchanged: bool = False) -> None:
        """Delete this very TrainJob (by uid, not by name) and with it its pods; it is gone when they are.

        Args:
            job: as it was read.
            unchanged: only if nothing about it has changed since.

        Raises:
            ConflictError: another one has its name, or it has changed.
        """
        meta = job["metadata"]
        conditions = {"uid": meta["uid"]} | ({"resourceVersion": meta["resourceVersion"]} if unchanged else {})
        options = {"propagationPolicy": "Foreground", "preconditions": conditions}
        with suppress(KeyError):
            self._call(self._custom.delete_namespaced_custom_object, *self._where, meta["name"], body=options)

    def watch_job(self, name: str, version: str, seconds: float) -> Iterator[Json]:
        """A TrainJob each time it changes after a version, for at most some seconds; `_deleted` says that it is gone.

        A watch that breaks off just ends: the caller watches again.

        Raises:
            ExpiredError: the version is too old.
        """
        from kubernetes import watch
        from kubernetes.client.exceptions import ApiException

        options = {"field_selector": f"metadata.name={name}", "resource_version": version}
        limits = {"timeout_seconds": max(1, round(seconds)), "_request_timeout": (10, seconds + 15)}
        try:
            for event in watch.Watch().stream(
                self._custom.list_namespaced_custom_object, *self._where, **options, **limits
            ):
                yield {**event["object"], "_deleted": event["type"] == "DELETED"}
        except ApiException as error:
            if error.status == 410:
                raise ExpiredError from None
            if error.status not in _TRANSIENT:
                raise self._refused(error) from None
            self._rest(error, 0)
        except Exception as error:
            if not _connection(error):
                raise
            self.sleep(self.pause)

    def pods(self, name: str) -> list[Json]:
        """Pods of a TrainJob, the oldest first."""
        selector = f"jobset.sigs.k8s.io/jobset-name={name}"
        found = self._plain(self._core.list_namespaced_pod, label_selector=selector)["items"]
        return sorted(found, key=lambda pod: pod["metadata"]["creationTimestamp"])

    def events(self, name: str) -> list[Json]:
        """Events about an object of this name, the oldest first."""
        found = self._plain(self._core.list_namespaced_event, field_selector=f"involvedObject.name={name}")["items"]
        return sorted(found, key=lambda event: event.get("lastTimestamp") or event.get("eventTime") or "")

    def workload(self, uid: str) -> Json | None:
        """Kueue's workload of a TrainJob; None where Kueue is not installed or may not be read."""
        from kubernetes.client.exceptions import ApiException

        selector = f"kueue.x-k8s.io/job-uid={uid}"
        for version in _KUEUE_VERSIONS:
            where = ("kueue.x-k8s.io", version, self.namespace, "workloads")
            with suppress(ApiException, KeyError, UserError):
                found = self._call(self._custom.list_namespaced_custom_object, *where, label_selector=selector)[
                    "items"
                ]
                return found[0] if found else None
        return None

    def queue_position(self, queue: str, workload: str) -> int | None:
        """Place of a workload in its queue, 1 is next; None when Kueue does not tell."""
        for version in _KUEUE_VERSIONS:
            group = f"/apis/visibility.kueue.x-k8s.io/{version}"
            path = f"{group}/namespaces/{self.namespace}/localqueues/{queue}/pendingworkloads"
            with suppress(Exception):  # an optional service of Kueue, and never worth more than one try
                items = self._custom.api_client.call_api(
                    path, "GET", response_type="object", auth_settings=["BearerToken"], _request_timeout=_TIMEOUT
                )[0]["items"]
                return next(i["positionInLocalQueue"] + 1 for i in items if i["metadata"]["name"] == workload)
        return None

    def follow_log(self, pod: str, container: str, since_seconds: int | None) -> Iterator[str]:
        """Lines of a container's log with their timestamps, until it ends or the connection does."""
        options: Json = {"since_seconds": since_seconds} if since_seconds is not None else {}
        response = self._core.read_namespaced_pod_log(
            pod,
            self.namespace,
            container=container,
            follow=True,
            timestamps=True,
            _preload_content=False,
            _request_timeout=(10, 300),
            **options,
        )
        rest = b""
        try:
            for part in response.stream(8192):
                *lines, rest = (rest + part).split(b"\n")
                yield from (line.decode(errors="replace") for line in lines)
            if rest:
                yield rest.decode(errors="replace")
        finally:
            response.close()
            response.release_conn()

    def _plain(self, call: Callable[..., Any], **options: Any) -> Json:
        """A list of built-in objects as the API wrote it."""
        import json

        return json.loads(self._call(call, self.namespace, _preload_content=False, **options).data)

    def _call(self, call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """A request, tried again while it may still succeed; KeyError stands for 404."""
        from kubernetes.client.exceptions import ApiException

        began, tries = time.monotonic(), 0
        while True:
            try:
                return call(*arguments, **options, _request_timeout=_TIMEOUT)
            except ApiException as error:
                if error.status not in _TRANSIENT:
                    raise self._refused(error) from None
                trouble: Exception = error
            except Exception as error:
                if not _connection(error):
                    raise
                trouble = error
            if time.monotonic() - began > self.patience:
                raise ClusterUnreachableError(
                    f"the Kubernetes API has not answered for {self.patience / 60:.0f} minutes ({_brief(trouble)});"
                    " training goes on, and a retry finds it again"
                ) from None
            if tries == 3:
                logger.warning("the Kubernetes API does not answer (%s); trying again", _brief(trouble))
            self._rest(trouble, tries)
            tries += 1

    def _rest(self, error: Exception, tries: int) -> None:
        """Pause as long as the server asks, else twice as long as before, and not all clients at once."""
        asked = (getattr(error, "headers", None) or {}).get("Retry-After", "")
        pause = float(asked) if asked.isdigit() else self.pause * 2 ** min(tries, 10)
        self.sleep(min(pause, _LONGEST_PAUSE) * random.uniform(0.75, 1.25))

    def _refused(self, error: Any) -> Exception:
        """What a final answer of the server means."""
        message = _message(error)
        if error.status == 404:
            return KeyError(message)
        if error.status == 409:
            return AlreadyExistsError(message) if "already exists" in message else ConflictError(message)
        if error.status in (401, 403):
            return UserError(f"launcher: the cluster refuses ({message}) in namespace {self.namespace}; {_PERMISSION}")
        if error.status in (400, 422):
            return UserError(f"launcher: the cluster does not take the job ({message}); check trainjob in the profile")
        return RuntimeError(f"the Kubernetes API answered {error.status}: {message}")


def _connection(error: Exception) -> bool:
    """Whether a request failed on its way, so that nobody knows whether it was carried out."""
    from urllib3.exceptions import HTTPError

    return isinstance(error, HTTPError | OSError)


def _brief(error: Exception) -> str:
    return _message(error) if hasattr(error, "status") else f"{type(error).__name__}: {str(error)[:120]}"


def _message(error: Any) -> str:
    """The sentence in a server's answer."""
    import json

    with suppress(TypeError, ValueError):
        return str(json.loads(error.body)["message"])[:500]
    return f"{error.status} {error.reason}"
