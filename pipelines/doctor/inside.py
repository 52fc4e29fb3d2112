"""Look from inside the cluster: a short-lived Job with the service account, image and volume of a run's steps.

Only there can be seen whether nodes pull the image, pods may use the volume, and the account may write to the bucket.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from modelmill.components.core.errors import UserError
from modelmill.components.core.home import HOME_VARIABLE
from modelmill.components.core.pod_security import container_context, pod_context
from modelmill.pipelines.doctor.finding import Finding, collect
from modelmill.pipelines.doctor.kube import Json, Kube, Refused, Unreachable
from modelmill.pipelines.platform import Profile

_MARK = "modelmill-doctor:"  # before the findings in the pod's log
_VARIABLE = "MODELMILL_DOCTOR_PROFILE"
_PAUSE = 2.0  # seconds between looks at the pod
_HOPELESS = ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "CreateContainerConfigError")


def job(profile: Profile, name: str) -> Json:
    """The Job: restricted by every rule of Pod Security, gone an hour after its end even if nobody deletes it."""
    step = profile.step
    volumes = [volume for volume in [profile.home, *profile.volumes] if volume]
    credentials = []
    if profile.tracking.secret:
        for key in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
            credentials.append(
                {"name": key, "valueFrom": {"secretKeyRef": {"name": profile.tracking.secret, "key": key}}}
            )
    variables = {**profile.environment, _VARIABLE: profile.model_dump_json()}
    if profile.home:
        variables[HOME_VARIABLE] = profile.home.mount
    container = {
        "name": "doctor",
        "image": profile.image("cpu"),
        "command": ["python3", "-m", "modelmill.pipelines.doctor.inside"],
        "env": [*({"name": key, "value": value} for key, value in sorted(variables.items())), *credentials],
        "resources": {"requests": {"cpu": "500m", "memory": "1Gi"}, "limits": {"cpu": "500m", "memory": "1Gi"}},
        "securityContext": {**container_context(), "readOnlyRootFilesystem": True},
        "volumeMounts": [
            {"name": "tmp", "mountPath": "/tmp"},
            *({"name": volume.claim, "mountPath": volume.mount} for volume in volumes),
        ],
    }
    claims = dict.fromkeys(volume.claim for volume in volumes)
    spec: Json = {
        "restartPolicy": "Never",
        "serviceAccountName": profile.service_account,
        "automountServiceAccountToken": False,
        "securityContext": pod_context(),
        "containers": [container],
        "volumes": [
            {"name": "tmp", "emptyDir": {"sizeLimit": "256Mi"}},
            *({"name": claim, "persistentVolumeClaim": {"claimName": claim}} for claim in claims),
        ],
    }
    if step.node_selector:
        spec["nodeSelector"] = step.node_selector
    if step.tolerations:
        spec["tolerations"] = [each.model_dump(exclude_none=True) for each in step.tolerations]
    labels = {"app.kubernetes.io/managed-by": "modelmill", "app.kubernetes.io/component": "doctor"}
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": name, "namespace": profile.namespace, "labels": labels},
        "spec": {
            "backoffLimit": 0,
            "activeDeadlineSeconds": 900,
            "ttlSecondsAfterFinished": 3600,
            "template": {"metadata": {"labels": labels}, "spec": spec},
        },
    }


def examine(profile: Profile, kube: Kube, timeout: float = 300.0, pause: float = _PAUSE) -> list[Finding]:
    """Start the Job, wait for it, read what it found, and delete it whatever happens.

    Args:
        profile: of the run.
        kube: the cluster.
        timeout: seconds to wait for the pod's end; a node may have to come first.
        pause: seconds between looks.
    """
    name, space = f"modelmill-doctor-{secrets.token_hex(4)}", profile.namespace
    try:
        kube.create(f"/apis/batch/v1/namespaces/{space}/jobs", job(profile, name))
    except (UserError, Refused, Unreachable) as error:
        return [Finding("fail", "in-cluster", f"the Job was not started: {error}", _may(space))]
    try:
        return _result(kube, space, name, time.monotonic() + timeout, pause)
    except (Refused, Unreachable) as error:
        return [Finding("fail", "in-cluster", f"the Job could not be followed: {error}", _may(space))]
    finally:
        try:
            kube.delete(f"/apis/batch/v1/namespaces/{space}/jobs/{name}")
        except (Refused, Unreachable):
            sys.stderr.write(f"warning: Job {name} is left; kubectl -n {space} delete job {name}\n")


def _may(space: str) -> str:
    return f"kubectl auth can-i create jobs -n {space}"


def _result(kube: Kube, space: str, name: str, deadline: float, pause: float) -> list[Finding]:
    pods, show = f"/api/v1/namespaces/{space}/pods", f"kubectl -n {space} describe pods -l job-name={name}"
    why = "no pod was made"
    while time.monotonic() < deadline:
        for pod in kube.get(pods, labelSelector=f"job-name={name}")["items"]:
            status = pod.get("status", {})
            if status.get("phase") in ("Succeeded", "Failed"):
                return _read(kube.text(f"{pods}/{pod['metadata']['name']}/log"), pod)
            reason, why = _waits(status)
            if reason in _HOPELESS:
                return [Finding("fail", "in-cluster", f"the pod does not start: {why}", show)]
        time.sleep(pause)
    return [Finding("fail", "in-cluster", f"the pod did not end in time: {why}", show)]


def _waits(status: Json) -> tuple[str, str]:
    """Why a pod is not there yet: reason, and reason with its message."""
    for each in status.get("containerStatuses", []):
        if waiting := each.get("state", {}).get("waiting"):
            reason = waiting.get("reason", "")
            return reason, f"{reason}: {waiting.get('message', 'no message')}"
    for each in status.get("conditions", []):
        if each["status"] == "False" and each.get("message"):
            return each.get("reason", ""), f"{each.get('reason', '')}: {each['message']}"
    return "", f"it is {status.get('phase', 'Pending')}"


def _read(log: str, pod: Json) -> list[Finding]:
    for line in log.splitlines():
        if line.startswith(_MARK):
            return [Finding(**each) for each in json.loads(line.removeprefix(_MARK))]
    ended: dict[str, Any] = {}
    for each in pod["status"].get("containerStatuses", []):
        ended = each.get("state", {}).get("terminated", {})
    last = (log.strip().splitlines() or [ended.get("reason", "no output")])[-1]
    text = f"the pod ended with exit code {ended.get('exitCode', '?')}: {last}"
    return [Finding("fail", "in-cluster", text, "the cpu image must hold this version of modelmill")]


# What runs in the pod.


def _volume(profile: Profile) -> Iterator[Finding]:
    """Write, lock and free space of the home: every step does that."""
    root = Path(os.environ[HOME_VARIABLE])
    try:
        with tempfile.NamedTemporaryFile(dir=root, prefix=".modelmill-doctor-") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        fix = "mount the file system with flock, and let uid 1000 write to it"
        yield Finding("fail", "volume", f"{root} cannot be written and locked in a pod: {error.strerror}", fix)
        return
    free = shutil.disk_usage(root).free / 2**30
    yield Finding("ok", "volume", f"{root} can be written and locked in a pod, {free:.0f} GiB free")


def _bucket(profile: Profile) -> Iterator[Finding]:
    from modelmill.pipelines.doctor import services

    yield from services.bucket(profile, who=f"service account {profile.service_account}")


def _tracking(profile: Profile) -> Iterator[Finding]:
    from modelmill.pipelines.doctor import services

    yield from services.tracking(profile, inside=True)


def main() -> None:
    """Look, and print the findings as one line of the pod's log."""
    profile = Profile.model_validate_json(os.environ[_VARIABLE])
    findings = [
        Finding(each.level, each.subject, f"in the cluster: {each.text}", each.fix)
        for each in collect((_volume, _bucket, _tracking), profile)
    ]
    print(_MARK + json.dumps([vars(each) for each in findings]))


if __name__ == "__main__":
    main()
