"""What a TrainJob's state, pods and events mean, as a sentence for a data scientist. Nothing here asks the cluster."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from modelmill.components.launchers.trainjob_render import TRAINER
from modelmill.components.training.launch import RankFiles, read_json
from modelmill.components.training.layout import ParallelConfig
from modelmill.components.training.processes import describe_exit

Json = dict[str, Any]
_LAST_LINES = 15
_PULL = {"ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull"}
_NODE = "batch.kubernetes.io/job-completion-index"


def condition(item: Mapping[str, Any], kind: str) -> Json | None:
    """A condition of an object that is true, or None."""
    found = item.get("status", {}).get("conditions", [])
    return next((entry for entry in found if entry["type"] == kind and entry["status"] == "True"), None)


def node_of(pod: Mapping[str, Any]) -> str:
    """Number of the training node that a pod is."""
    meta = pod["metadata"]
    return meta.get("labels", {}).get(_NODE) or meta.get("annotations", {}).get(_NODE) or "0"


def queued(workload: Json | None, queue: str | None, position: int | None) -> str:
    """Why a suspended job waits."""
    where = f"the queue {queue}" if queue else "its queue"
    place = f", place {position}" if position else ""
    told = next(
        (
            entry
            for entry in (workload or {}).get("status", {}).get("conditions", [])
            if entry["type"] == "QuotaReserved" and entry["status"] == "False" and entry.get("message")
        ),
        None,
    )
    preempted = condition(workload or {}, "Evicted")
    if preempted:
        return f"waiting in {where}{place}: its place was taken ({preempted.get('message', preempted['reason'])})"
    if told is None:
        return f"waiting in {where}{place}"
    found = re.search(r"insufficient (?:unused )?quota for (\S+)", told["message"])
    short = f"no free {found[1].rstrip(',.')} in the quota" if found else told["message"]
    return f"waiting in {where}{place}: {short}"


def waiting(pods: Sequence[Json], events: Sequence[Json]) -> str:
    """Why an admitted job does not run yet; empty when nothing is known to hold it up."""
    for pod in pods:
        if sentence := pod_trouble(pod) or _unscheduled(pod):
            return sentence
    for event in reversed(events):
        if event.get("type") == "Warning" and (sentence := _event(event)):
            return sentence
    return ""


def pod_trouble(pod: Json) -> str:
    """What went wrong with a pod, or with its node; empty when nothing did."""
    status, node = pod.get("status", {}), node_of(pod)
    place = pod.get("spec", {}).get("nodeName", "")
    on = f" on {place}" if place else ""
    if status.get("reason") in ("Evicted", "Preempting", "NodeLost", "NodeShutdown", "Terminated"):
        return f"node {node}{on} was lost: {status['reason']}, {status.get('message', 'no reason given')}"
    if target := condition(pod, "DisruptionTarget"):
        return f"node {node}{on} was lost: {target.get('message') or target.get('reason')}"
    for container in status.get("containerStatuses", []):
        for state in (container.get("state", {}), container.get("lastState", {})):
            if ended := state.get("terminated"):
                if ended.get("reason") == "OOMKilled":
                    return (
                        f"node {node}{on} ran out of memory and was killed; raise trainjob.memory in the profile"
                        " (shared memory counts against it), or lower training.micro_batch_size"
                    )
                if ended.get("reason") in ("ContainerCannotRun", "StartError"):
                    return f"node {node}{on} could not start: {ended.get('message', ended['reason'])}"
            wait = state.get("waiting", {})
            if wait.get("reason") in _PULL:
                return (
                    f"the image {container.get('image')} cannot be pulled ({wait.get('message') or wait['reason']});"
                    " check images in the profile, and that the nodes may read the registry"
                )
            if wait.get("reason") in ("CreateContainerConfigError", "CreateContainerError", "RunContainerError"):
                return f"node {node} cannot start: {wait.get('message') or wait['reason']}"
    return ""


def _unscheduled(pod: Json) -> str:
    for entry in pod.get("status", {}).get("conditions", []):
        if entry["type"] == "PodScheduled" and entry["status"] == "False" and entry.get("reason") == "Unschedulable":
            return _unschedulable(entry.get("message", ""))
    return ""


def _unschedulable(message: str) -> str:
    if "persistentvolumeclaim" in message.lower():
        return f"the shared volume is not bound ({message}); check trainjob.claim in the profile"
    if short := sorted(set(re.findall(r"[Ii]nsufficient ([\w./-]+?)[.,]?(?=\s|$|,)", message))):
        return f"no node has enough free {' and '.join(short)}: {message}"
    if "taint" in message:
        return f"no node lets the job in, check tolerations and node_selector in the profile: {message}"
    return f"no node fits: {message}"


def _event(event: Json) -> str:
    reason, message = event.get("reason", ""), event.get("message", "")
    if reason == "FailedScheduling":
        return _unschedulable(message)
    if reason in ("FailedMount", "FailedAttachVolume"):
        return f"a volume cannot be mounted: {message}"
    if reason in ("FailedCreate", "TrainJobResourcesCreationFailed", "JobCreationFailed", "PodCreationFailed"):
        if "exceeded quota" in message:
            return f"the namespace's quota is used up: {message}"
        if "PodSecurity" in message:
            return f"the namespace's security policy refuses the pods: {message}"
        return f"the cluster does not make the pods: {message}"
    return f"the network of a node failed: {message}" if reason == "FailedCreatePodSandBox" else ""


def mistake(files: RankFiles, world_size: int) -> str:
    """The user's mistake, as a rank found it, or nothing: no further attempt would end otherwise."""
    return next((record["message"] for record in files.records(world_size) if record["kind"] == "user"), "")


def failure(job: Json, files: RankFiles, parallel: ParallelConfig, seen: Sequence[str]) -> str:
    """Why a job failed: what the cluster did to it, else what its ranks said, else how they ended.

    Args:
        job: the failed TrainJob.
        files: of its ranks.
        parallel: the layout of the ranks.
        seen: what was noticed about its pods while it ran, the newest last.
    """
    told = condition(job, "Failed") or {}
    if told.get("reason") == "DeadlineExceeded":
        return "it lived longer than trainjob.deadline_seconds, waiting included; raise it, and a retry goes on"
    if seen:
        return seen[-1]
    began = _last_start(files)
    crashes = [record for record in files.records(parallel.world_size) if record["kind"] == "crash"]
    records = [record for record in crashes if files.failure(record["rank"]).stat().st_mtime >= began]
    written = [path for path in sorted(files.scratch.glob("exits-*.json")) if path.stat().st_mtime >= began]
    exits = [entry for path in written for entry in read_json(path, [])]
    killed = [entry for entry in exits if entry["exit_code"] < 0 and entry["exit_code"] != -15]
    if killed:
        rank = killed[0]["rank"]
        how = describe_exit(killed[0]["exit_code"])
    elif records:
        rank, how = records[0]["rank"], records[0]["message"]
    elif exits:
        rank, how = exits[0]["rank"], describe_exit(exits[0]["exit_code"])
    else:
        return told.get("message") or "the cluster gives no reason"
    node, local_rank = divmod(rank, parallel.processes_per_node)
    log = _last_lines(files.logs / f"node-{node}", local_rank)
    return f"rank {rank} of {parallel.world_size} failed: {how}; the end of its log:\n{log}"


def _last_start(files: RankFiles) -> float:
    """When the last of the job's restarts began, by its folders of logs; what is older was said by ranks before it."""
    nodes = [[attempt.stat().st_mtime for attempt in node.iterdir()] for node in files.logs.glob("node-*")]
    return min((max(times) for times in nodes if times), default=0.0)


def _last_lines(folder: Path, local_rank: int) -> str:
    """The end of what a rank wrote in its newest attempt."""
    lines: list[str] = []
    for name in ("stdout", "stderr"):
        logs = sorted(folder.glob(f"*/attempt_0/{local_rank}/{name}.log"), key=lambda path: path.stat().st_mtime)
        for log in logs[-1:]:
            lines += log.read_text(errors="replace").splitlines()[-_LAST_LINES:]
    return "\n".join(f"  {line}" for line in lines) or "  (empty)"


def running(job: Json) -> bool:
    """Whether the job's pods are there."""
    jobs = job.get("status", {}).get("jobsStatus", [])
    return any(entry["name"] == TRAINER and (entry.get("ready") or entry.get("active")) for entry in jobs)
