"""What a run left in Kubernetes: the logs of its pods, and the training jobs that must end with it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from modelmill.components.core.errors import UserError
from modelmill.pipelines.launch.platform_tasks import RUN_LABEL, STEP_LABEL

JOB_LABEL = "modelmill.dev/run"  # set by the launcher on every training job
_TRAINER = {"group": "trainer.kubeflow.org", "version": "v1alpha1", "plural": "trainjobs"}
_CONTAINER = "main"
_TIMEOUT = (5, 60)


class Cluster:
    """The Kubernetes API of a namespace, as this process may use it."""

    def __init__(self, namespace: str) -> None:
        """
        Raises:
            UserError: there is neither a kubeconfig nor a pod's service account, or the client is not installed.
        """
        try:
            import kubernetes
        except ModuleNotFoundError:
            raise UserError("kubernetes is not installed; pip install 'modelmill[kfp]'") from None
        configuration = kubernetes.client.Configuration()
        try:
            kubernetes.config.load_incluster_config(configuration)
        except kubernetes.config.ConfigException:
            try:
                kubernetes.config.load_kube_config(client_configuration=configuration)
            except (kubernetes.config.ConfigException, OSError) as error:
                raise UserError(
                    f"KUBECONFIG: no access to Kubernetes ({error}); set it to a file for the cluster"
                ) from None
        self.namespace = namespace
        client = kubernetes.client.ApiClient(configuration)
        self._core, self._objects = kubernetes.client.CoreV1Api(client), kubernetes.client.CustomObjectsApi(client)

    def pods(self, run_id: str, step: str = "") -> list[Any]:
        """Pods of a run's steps, oldest first: one for each attempt.

        Args:
            run_id: KFP's id of the run.
            step: one step; empty: all of them, without KFP's own pods.
        """
        selector = f"{RUN_LABEL}={run_id},{STEP_LABEL}" + (f"={step}" if step else "")
        found = self._call(self._core.list_namespaced_pod, self.namespace, label_selector=selector).items
        return sorted(found, key=lambda pod: (pod.metadata.creation_timestamp, pod.metadata.name))

    def log(self, pod: str, *, follow: bool = False) -> Iterator[str]:
        """What a step's container wrote, in pieces; with `follow`, until it ends."""
        stream = self._call(
            self._core.read_namespaced_pod_log,
            pod,
            self.namespace,
            container=_CONTAINER,
            follow=follow,
            _preload_content=False,
            _request_timeout=(5, None) if follow else _TIMEOUT,
        )
        try:
            for piece in stream.stream(65536):
                yield piece.decode(errors="replace")
        finally:
            stream.release_conn()

    def delete_training_jobs(self, run_id: str) -> list[str]:
        """Delete the training jobs of a run; returns the names of those that were there."""
        where = {**_TRAINER, "namespace": self.namespace}
        try:
            listed = self._call(
                self._objects.list_namespaced_custom_object, **where, label_selector=f"{JOB_LABEL}={run_id}"
            )
        except NotThere:
            return []  # a cluster without Trainer runs no training jobs
        names = [item["metadata"]["name"] for item in listed["items"]]
        for name in names:
            try:
                self._call(self._objects.delete_namespaced_custom_object, **where, name=name)
            except NotThere:
                continue
        return names

    def _call(self, action: Any, *arguments: Any, **named: Any) -> Any:
        from kubernetes.client import ApiException
        from urllib3.exceptions import HTTPError

        named.setdefault("_request_timeout", _TIMEOUT)
        for pause in (0.5, 2.0, None):
            try:
                return action(*arguments, **named)
            except ApiException as error:
                if error.status == 404:
                    raise NotThere(f"kubernetes: {error.reason}") from None
                if pause is None or error.status not in (429, 500, 502, 503, 504):
                    raise UserError(
                        f"kubernetes: namespace {self.namespace} answered {error.status} {error.reason}; check your"
                        " rights with `kubectl auth can-i`"
                    ) from None
            except HTTPError as error:
                if pause is None:
                    raise UserError(f"kubernetes: the API server does not answer ({error})") from None
            time.sleep(pause)
        raise AssertionError("unreachable")


class NotThere(UserError):
    """Kubernetes has no such object."""
