"""Kubeflow Trainer on the fake Kubernetes API: TrainJobs become pods, by a script or with real processes.

`Trainer` does one thing at a time, as a test says: admit, run, fail, restart, lose a node, complete. `Kubelet` does
all of it by itself and really runs what the pods hold, one process a node, with the variables of Trainer's torch
plugin.
"""

from __future__ import annotations

import copy
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.fakes.kubernetes_api import KubernetesApi
from tests.fakes.kubernetes_objects import ApiError, Json, Key, timestamp

NAMESPACE = "modelmill"
RUNTIME: Json = {
    "apiVersion": "trainer.kubeflow.org/v1alpha1",
    "kind": "ClusterTrainingRuntime",
    "metadata": {"name": "torch", "labels": {"trainer.kubeflow.org/framework": "torch"}},
    "spec": {
        "mlPolicy": {"numNodes": 1, "torch": {}},
        "template": {
            "spec": {
                "failurePolicy": {"maxRestarts": 3},
                "replicatedJobs": [
                    {
                        "name": "node",
                        "template": {
                            "metadata": {"labels": {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}},
                            "spec": {
                                "backoffLimit": 0,
                                "template": {"spec": {"restartPolicy": "Never", "containers": [{"name": "node"}]}},
                            },
                        },
                    }
                ],
            }
        },
    },
}


def pod_template(job: Json, runtime: Json = RUNTIME) -> Json:
    """Template of the training pods: runtime, then patches, then the `trainer` section, as Trainer merges them."""
    template = copy.deepcopy(_node(runtime["spec"]["template"]["spec"])["template"]["spec"]["template"])
    for patch in job["spec"].get("runtimePatches", []):
        for entry in patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]:
            if entry["name"] == "node":
                template = _merge(template, entry["template"]["spec"]["template"])
    trainer, nodes = job["spec"]["trainer"], job["spec"]["trainer"]["numNodes"]
    container = next(entry for entry in template["spec"]["containers"] if entry["name"] == "node")
    name = job["metadata"]["name"]
    rank = {"fieldRef": {"fieldPath": "metadata.annotations['batch.kubernetes.io/job-completion-index']"}}
    plugin = [
        {"name": "PET_NNODES", "value": str(nodes)},
        {"name": "PET_NPROC_PER_NODE", "value": str(trainer["numProcPerNode"])},
        {"name": "PET_NODE_RANK", "valueFrom": rank},
        {"name": "PET_MASTER_ADDR", "value": f"{name}-node-0-0.{name}"},
        {"name": "PET_MASTER_PORT", "value": "29500"},
    ]
    container.update(image=trainer["image"], command=trainer["command"], resources=trainer["resourcesPerNode"])
    container["env"] = [*container.get("env", []), *trainer["env"], *plugin]
    return template


def _node(jobset: Json) -> Json:
    return next(entry for entry in jobset["replicatedJobs"] if entry["name"] == "node")


def _merge(base: Any, patch: Any) -> Any:
    """A strategic merge: objects by field, lists of named objects by name."""
    if isinstance(base, dict) and isinstance(patch, dict):
        return {key: _merge(base.get(key), patch[key]) if key in patch else base[key] for key in {**base, **patch}}
    named = isinstance(patch, list) and all(isinstance(entry, dict) and "name" in entry for entry in patch)
    if isinstance(base, list) and named:
        names = [entry["name"] for entry in base]
        changed = [_merge(entry, next((p for p in patch if p["name"] == entry["name"]), {})) for entry in base]
        return changed + [entry for entry in patch if entry["name"] not in names]
    return copy.deepcopy(patch)


class Trainer:
    """The controllers of Trainer, JobSet and Job, one deed at a time; every method takes the TrainJob's name."""

    def __init__(self, api: KubernetesApi) -> None:
        self.api, self.store = api, api.store
        self.log_lines = ("step 1", "step 2")

    def names(self) -> list[str]:
        """TrainJobs that are neither finished nor being deleted."""
        return [job["metadata"]["name"] for job in self.store.all("trainjobs") if not _finished(job)]

    def suspend(self, name: str) -> None:
        """As Kueue does on creation."""
        self._condition(name, "Suspended", "True", "Suspended", "TrainJob is suspended")

    def admit(self, name: str, place: bool = True) -> None:
        """Make JobSet, Job and pods; with `place` on nodes."""
        self._condition(name, "Suspended", "False", "Resumed", "TrainJob is resumed")
        job = self._job(name)
        owner = self._child("JobSet", "jobset.x-k8s.io/v1alpha2", name, job, {"replicatedJobs": []})
        template = pod_template(job, self.store.get("clustertrainingruntimes", "torch") or RUNTIME)
        pod = {**copy.deepcopy(template), "spec": {**template["spec"], "restartPolicy": "Never"}}
        spec = {"template": {**pod, "metadata": {}}, "backoffLimit": 0, "completionMode": "Indexed"}
        spec |= {"parallelism": job["spec"]["trainer"]["numNodes"], "completions": job["spec"]["trainer"]["numNodes"]}
        owner = self._child("Job", "batch/v1", f"{name}-node-0", owner, spec)
        for node in range(job["spec"]["trainer"]["numNodes"]):
            self._pod(name, node, owner, template, place)
        self._jobs_status(name, active=1)

    def run(self, name: str) -> None:
        """Containers start; node 0 writes its first lines."""
        for pod in self.pods(name):
            self.pod_status(pod, "Running", {"running": {"startedAt": timestamp()}})
        self._jobs_status(name, ready=1)
        for pod in self.pods(name)[:1]:
            self.api.log(pod["metadata"]["name"], *self.log_lines)

    def complete(self, name: str) -> None:
        """All processes ended well."""
        for pod in self.pods(name):
            self.pod_status(pod, "Succeeded", {"terminated": {"exitCode": 0, "reason": "Completed"}})
        self._condition(name, "Complete", "True", "TrainJobCompleted", "jobset completed successfully")

    def fail(
        self, name: str, reason: str = "AllJobsFailed", message: str = "jobset failed due to reaching max restarts"
    ) -> None:
        """The job ends badly for good."""
        for pod in self.pods(name):
            self.pod_status(pod, "Failed", {"terminated": {"exitCode": 1, "reason": "Error"}})
        self._condition(name, "Failed", "True", reason, message)

    def restart(self, name: str) -> None:
        """A failure within the limit: the JobSet's jobs and pods are made anew."""
        self.store.delete(("batch", "jobs", NAMESPACE, f"{name}-node-0"), propagation="Foreground")
        self.admit(name)

    def out_of_memory(self, name: str, node: int = 0) -> None:
        ended = {"terminated": {"exitCode": 137, "reason": "OOMKilled"}}
        self.pod_status(self.pods(name)[node], "Failed", ended)

    def pull_error(self, name: str) -> None:
        told = {"waiting": {"reason": "ImagePullBackOff", "message": "Back-off pulling image: not found"}}
        self.pod_status(self.pods(name)[0], "Pending", told)

    def unschedulable(self, name: str, message: str) -> None:
        """No node for the pods: their condition and the scheduler's event."""
        for pod in self.pods(name):
            told = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}
            status = {"phase": "Pending", "conditions": [told]}
            self.store.set_status("pods", pod["metadata"]["name"], status)
            self.event(pod["metadata"]["name"], "FailedScheduling", message)

    def lose_node(self, name: str, node: int = 0) -> None:
        """The node controller gives up a node and marks its pods."""
        pod = self.pods(name)[node]
        told = {
            "type": "DisruptionTarget", "status": "True", "reason": "DeletionByTaintManager",
            "message": "Taint manager: deleting due to NoExecute taint",
        }  # fmt: skip
        self.store.set_status("pods", pod["metadata"]["name"], {"phase": "Failed", "conditions": [told]})

    def event(self, name: str, reason: str, message: str, kind: str = "Pod") -> None:
        about = {"kind": kind, "name": name, "namespace": NAMESPACE}
        meta = {"generateName": f"{name}.", "namespace": NAMESPACE}
        body = {"apiVersion": "v1", "kind": "Event", "metadata": meta, "involvedObject": about, "type": "Warning"}
        self.store.create({**body, "reason": reason, "message": message, "lastTimestamp": timestamp()})

    def workload(self, name: str, message: str) -> None:
        """Kueue's record of a job that waits."""
        labels = {"kueue.x-k8s.io/job-uid": self._job(name)["metadata"]["uid"]}
        body = {"apiVersion": "kueue.x-k8s.io/v1beta1", "kind": "Workload", "metadata": {"labels": labels}, "spec": {}}
        body["metadata"] |= {"name": f"trainjob-{name}", "namespace": NAMESPACE}
        told = {"type": "QuotaReserved", "status": "False", "reason": "Pending", "message": message}
        self.store.create(body)
        self.store.set_status("workloads", f"trainjob-{name}", {"conditions": [told]})

    def pods(self, name: str) -> list[Json]:
        """Pods of the current attempt, by node."""
        found = [
            pod
            for pod in self.store.all("pods")
            if pod["metadata"]["labels"].get("jobset.sigs.k8s.io/jobset-name") == name
            and "deletionTimestamp" not in pod["metadata"]
        ]
        return sorted(
            found, key=lambda pod: int(pod["metadata"]["labels"]["batch.kubernetes.io/job-completion-index"])
        )

    def pod_status(self, pod: Json, phase: str, state: Json) -> None:
        container = {
            "name": "node", "state": state, "ready": phase == "Running", "restartCount": 0,
            "image": pod["spec"]["containers"][0]["image"], "imageID": "",
        }  # fmt: skip
        with suppress(StopIteration):  # it was deleted meanwhile
            status = {"phase": phase, "containerStatuses": [container]}
            self.store.set_status("pods", pod["metadata"]["name"], status)

    def _job(self, name: str) -> Json:
        return self.store.find(("trainer.kubeflow.org", "trainjobs", NAMESPACE, name))

    def _child(self, kind: str, version: str, name: str, owner: Json, spec: Json) -> Json:
        plural = f"{kind.lower()}s"
        existing = self.store.get(plural, name)
        if existing is not None:
            return existing
        meta = {"name": name, "namespace": NAMESPACE, "ownerReferences": [_reference(owner)]}
        return self.store.create({"apiVersion": version, "kind": kind, "metadata": meta, "spec": spec})

    def _pod(self, name: str, node: int, owner: Json, template: Json, place: bool) -> None:
        index = {"batch.kubernetes.io/job-completion-index": str(node)}
        labels = {"jobset.sigs.k8s.io/jobset-name": name, "jobset.sigs.k8s.io/replicatedjob-name": "node", **index}
        meta = copy.deepcopy(template.get("metadata", {}))
        meta["labels"] = {**meta.get("labels", {}), **labels}
        meta["annotations"] = {**meta.get("annotations", {}), **index}
        meta |= {"generateName": f"{name}-node-0-{node}-", "namespace": NAMESPACE}
        meta["ownerReferences"] = [_reference(owner)]
        spec = {"restartPolicy": "Never", **copy.deepcopy(template["spec"])}
        if place:
            spec["nodeName"] = f"worker-{node}"
        made = self.store.create({"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": spec})
        self.store.set_status("pods", made["metadata"]["name"], {"phase": "Pending"})

    def _condition(self, name: str, kind: str, status: str, reason: str, message: str) -> None:
        old = [entry for entry in self._job(name).get("status", {}).get("conditions", []) if entry["type"] != kind]
        new = {"type": kind, "status": status, "reason": reason, "message": message, "lastTransitionTime": timestamp()}
        self.store.set_status("trainjobs", name, {**self._job(name).get("status", {}), "conditions": [*old, new]})

    def _jobs_status(self, name: str, active: int = 0, ready: int = 0) -> None:
        entry = {"name": "node", "active": active, "ready": ready, "succeeded": 0, "failed": 0, "suspended": 0}
        self.store.set_status("trainjobs", name, {**self._job(name).get("status", {}), "jobsStatus": [entry]})


def _reference(owner: Json) -> Json:
    meta = owner["metadata"]
    names = {"apiVersion": owner["apiVersion"], "kind": owner["kind"], "name": meta["name"], "uid": meta["uid"]}
    return {**names, "controller": True, "blockOwnerDeletion": True}


def _finished(job: Json) -> bool:
    conditions = job.get("status", {}).get("conditions", [])
    over = any(entry["type"] in ("Complete", "Failed") and entry["status"] == "True" for entry in conditions)
    return over or "deletionTimestamp" in job["metadata"]


class Kubelet:
    """Runs TrainJobs for real: a thread that admits them and keeps one process a node; use as a context manager.

    Attributes:
        restarts: how often a job that failed was started again, by name.
    """

    def __init__(
        self, api: KubernetesApi, folder: Path, *, max_restarts: int = 3, environment: dict[str, str]
    ) -> None:
        """
        Args:
            api: the server.
            folder: working directory of the processes.
            max_restarts: failures of a job that are followed by another attempt.
            environment: variables of every container beside its own, as an image has them.
        """
        self.api, self.trainer, self.folder = api, Trainer(api), folder
        self.max_restarts, self.environment = max_restarts, environment
        self.restarts: dict[str, int] = {}
        self._running: dict[str, tuple[Key, subprocess.Popen[str]]] = {}  # by pod name
        self._ports: dict[str, int] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)
        api.store.kubelet = True

    def __enter__(self) -> Kubelet:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(10)
        for _, process in self._running.values():
            process.kill()
            process.wait()

    def kill_node(self, name: str, node: int) -> None:
        """SIGKILL to all processes of a node, as when its machine goes."""
        pod = self.trainer.pods(name)[node]["metadata"]["name"]
        os.killpg(self._running[pod][1].pid, signal.SIGKILL)

    def _work(self) -> None:
        while not self._stop.wait(0.05):
            for job in self.api.store.all("trainjobs"):
                with suppress(ApiError, StopIteration):  # it was deleted in this moment
                    self._tend(job)
            for name, (key, process) in list(self._running.items()):
                self._end_deleted(name, key, process)

    def _tend(self, job: Json) -> None:
        name = job["metadata"]["name"]
        if _finished(job):
            return
        pods = self.trainer.pods(name)
        if not pods:
            others = [p for p in self.api.store.all("pods") if p["metadata"]["name"].startswith(f"{name}-node")]
            if not others:  # a JobSet waits until the pods of the attempt before are gone
                self._ports[name] = _free_port()
                self.trainer.admit(name)
            return
        for pod in pods:
            if pod["metadata"]["name"] not in self._running and pod["status"]["phase"] == "Pending":
                self._start(name, pod)
        codes = [
            self._running[pod["metadata"]["name"]][1].poll()
            for pod in pods
            if pod["metadata"]["name"] in self._running
        ]
        if codes and all(code == 0 for code in codes) and len(codes) == len(pods):
            self.trainer.complete(name)
        elif any(code for code in codes):
            self._failed(name, pods)

    def _failed(self, name: str, pods: list[Json]) -> None:
        for pod in pods:
            process = self._running[pod["metadata"]["name"]][1]
            if process.poll():
                self.trainer.pod_status(pod, "Failed", {"terminated": {"exitCode": 1, "reason": "Error"}})
        done = self.restarts.get(name, 0)
        if done >= self.max_restarts:
            return self.trainer.fail(name)
        self.restarts[name] = done + 1
        self.api.store.delete(("batch", "jobs", NAMESPACE, f"{name}-node-0"), propagation="Foreground")

    def _start(self, name: str, pod: Json) -> None:
        container = pod["spec"]["containers"][0]
        node = pod["metadata"]["annotations"]["batch.kubernetes.io/job-completion-index"]
        own = {entry["name"]: entry.get("value", node) for entry in container["env"]}
        own |= {"PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": str(self._ports[name])}
        command = [re.sub(r"\$\((\w+)\)", lambda found: own[found[1]], part) for part in container["command"]]
        command[0] = sys.executable if command[0] == "python" else command[0]
        process = subprocess.Popen(
            command,
            env={**self.environment, **own},
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        pod_name = pod["metadata"]["name"]
        self._running[pod_name] = ("", "pods", NAMESPACE, pod_name), process
        threading.Thread(target=self._read, args=(pod_name, process), daemon=True).start()
        self.trainer.pod_status(pod, "Running", {"running": {"startedAt": timestamp()}})

    def _read(self, pod: str, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            self.api.log(pod, line.rstrip("\n"))

    def _end_deleted(self, name: str, key: Key, process: subprocess.Popen[str]) -> None:
        pod = self.api.store.objects.get(key)
        if pod is not None and "deletionTimestamp" not in pod["metadata"]:
            return
        if process.poll() is None:
            if pod is not None and "told" not in pod["metadata"].get("annotations", {}):
                pod["metadata"].setdefault("annotations", {})["told"] = str(time.monotonic())
                process.terminate()
                return
            grace = pod["spec"].get("terminationGracePeriodSeconds", 30) if pod else 0
            if pod and time.monotonic() - float(pod["metadata"]["annotations"]["told"]) < grace:
                return
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        self._running.pop(name, None)
        self.api.store.remove(key)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
