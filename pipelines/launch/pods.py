"""What a run left in Kubernetes: the logs of its pods, and the training jobs that must end with it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from modelmill.components.core.errors import UserError
from modelmill.components.launchers import kubernetes_client
from modelmill.components.launchers.kubernetes_access import api_client
from modelmill.components.launchers.reaper import delete_jobs_of
from modelmill.pipelines.launch.platform_tasks import RUN_LABEL, STEP_LABEL

_CONTAINER = "main"
_TIMEOUT = (5, 60)
_PATIENCE = 30.0  # seconds a request about training jobs is repeated for


class Cluster:
    """The Kubernetes API of a namespace, as this process may use it."""

    def __init__(self, namespace: str) -> None:
        """
        Raises:
            UserError: there is neither a kubeconfig nor a pod's service account, or the client is not installed.
        """
        self._client = api_client()
        from kubernetes.client import CoreV1Api  # installed, or the line above has said so

        self.namespace = namespace
        self._core = CoreV1Api(self._client)

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
        jobs = kubernetes_client.Cluster(self.namespace, self._client, patience=_PATIENCE)
        try:
            return delete_jobs_of(jobs, run_id)
        except KeyError:
            return []  # a cluster without Trainer runs no training jobs
        except kubernetes_client.ClusterUnreachableError as error:
            raise UserError(f"kubernetes: {error}") from None

    def _call(self, action: Any, *arguments: Any, **named: Any) -> Any:
        from kubernetes.client import ApiException
        from urllib3.exceptions import HTTPError

        named.setdefault("_request_timeout", _TIMEOUT)
        for pause in (0.5, 2.0, None):
            try:
                return action(*arguments, **named)
            except ApiException as error:
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
