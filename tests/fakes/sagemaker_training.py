"""Training jobs of the small SageMaker: each takes its next state when it is described."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from tests.fakes.sagemaker_tagged import ServiceError, Tagged, arn_of, tags_of

PLAN = ("Starting", "DownloadingTrainingImage", "Downloading", "Training", "Uploading", "Completed")
_ENDED = ("Completed", "Failed", "Stopped", "MaxRuntimeExceeded", "MaxWaitTimeExceeded")
_MESSAGES = {"Interrupted": "The job was interrupted and goes on when there is spare capacity"}


class Container(Protocol):
    """What runs in a training job, where a test wants something to run."""

    def poll(self) -> tuple[int, str] | None:
        """Exit code and the text of /opt/ml/output/failure, or None while it runs."""

    def stop(self) -> None:
        """SIGTERM."""


@dataclass
class Job:
    """A training job.

    Attributes:
        plan: secondary statuses still to come.
        reason: its FailureReason, should the plan end with Failed.
    """

    request: dict[str, Any]
    plan: list[str]
    reason: str
    created: float
    history: list[str] = field(default_factory=list)
    container: Container | None = None
    stopping: bool = False

    @property
    def secondary(self) -> str:
        return self.history[-1]

    @property
    def status(self) -> str:
        if self.secondary in ("MaxRuntimeExceeded", "MaxWaitTimeExceeded"):
            return "Stopped"
        if self.secondary in (*_ENDED, "Stopping"):
            return self.secondary
        return "InProgress"


class TrainingJobs(Tagged):
    """The operations on training jobs.

    Attributes:
        plans: secondary statuses of the jobs to come, first in first out; then `PLAN`.
        runner: starts what runs in a job, where a test wants something to run.
    """

    def __init__(self) -> None:
        super().__init__()
        self.jobs: dict[str, Job] = {}
        self.plans: list[tuple[tuple[str, ...], str]] = []
        self.runner: Callable[[dict[str, Any]], Container] | None = None

    def plan(self, *states: str, reason: str = "") -> None:
        """The states of the next job to be created."""
        self.plans.append((states, reason))

    def running(self) -> list[str]:
        """Jobs that cost money."""
        return [name for name, job in self.jobs.items() if job.status in ("InProgress", "Stopping")]

    def _CreateTrainingJob(self, request: dict[str, Any]) -> dict[str, Any]:
        name = request["TrainingJobName"]
        if name in self.jobs:
            raise ServiceError("ResourceInUse", f"Job name must be unique within an AWS account: {name}")
        spot = request.get("EnableManagedSpotTraining", False)
        stopping = request["StoppingCondition"]
        if spot and stopping.get("MaxWaitTimeInSeconds", 0) < stopping.get("MaxRuntimeInSeconds", 86400):
            raise ServiceError("ValidationException", "MaxWaitTimeInSeconds must be at least MaxRuntimeInSeconds")
        if not spot and "MaxWaitTimeInSeconds" in stopping:
            raise ServiceError("ValidationException", "MaxWaitTimeInSeconds needs managed spot training")
        states, reason = self.plans.pop(0) if self.plans else (PLAN, "")
        job = Job(request, list(states[1:]), reason, time.time(), [states[0]])
        self.jobs[name] = job
        self.tags[arn_of("training-job", name)] = tags_of(request)
        return {"TrainingJobArn": arn_of("training-job", name)}

    def _DescribeTrainingJob(self, request: dict[str, Any]) -> dict[str, Any]:
        name = request["TrainingJobName"]
        job = self._job(name)
        answer = self._described(name, job)
        self._advance(job)
        return answer

    def _ListTrainingJobs(self, request: dict[str, Any]) -> dict[str, Any]:
        wanted, part = request.get("StatusEquals"), request.get("NameContains", "")
        found = [
            {
                "TrainingJobName": name,
                "TrainingJobArn": arn_of("training-job", name),
                "CreationTime": job.created,
                "TrainingJobStatus": job.status,
            }
            for name, job in self.jobs.items()
            if part in name and wanted in (None, job.status)
        ]
        return self._page("TrainingJobSummaries", found[::-1], request)  # the newest first

    def _StopTrainingJob(self, request: dict[str, Any]) -> dict[str, Any]:
        job = self._job(request["TrainingJobName"])
        if job.status in ("Completed", "Failed", "Stopped"):
            raise ServiceError(
                "ValidationException", f"The request was rejected because the training job is {job.status}."
            )
        if not job.stopping:
            job.stopping = True
            job.history.append("Stopping")
            job.plan = ["Stopped"]
            if job.container is not None:
                job.container.stop()
        return {}

    def _job(self, name: str) -> Job:
        if name not in self.jobs:
            raise ServiceError("ValidationException", "Requested resource not found.")
        return self.jobs[name]

    def _advance(self, job: Job) -> None:
        """The next state, unless a container is running that has to end first."""
        if job.secondary == "Training" and self.runner is not None and job.container is None:
            job.container = self.runner(job.request)
        if job.container is not None and job.secondary in ("Training", "Stopping"):
            ended = job.container.poll()
            if ended is None:
                return
            code, words = ended
            if code and not job.stopping:
                job.plan, job.reason = (
                    ["Failed"],
                    f"AlgorithmError: {words or 'ExecuteUserScriptError'}, exit code: {code}",
                )
        if job.plan:
            job.history.append(job.plan.pop(0))

    def _described(self, name: str, job: Job) -> dict[str, Any]:
        request, output = job.request, job.request["OutputDataConfig"]["S3OutputPath"].rstrip("/")
        whole = request["OutputDataConfig"].get("CompressionType") == "NONE"
        artifacts = f"{output}/{name}/output/model{'/' if whole else '.tar.gz'}"
        answer = {
            **{key: value for key, value in request.items() if key != "Tags"},
            "TrainingJobArn": arn_of("training-job", name),
            "ModelArtifacts": {"S3ModelArtifacts": artifacts},
            "TrainingJobStatus": job.status,
            "SecondaryStatus": job.secondary,
            "CreationTime": job.created,
            "SecondaryStatusTransitions": [
                {"Status": state, "StartTime": job.created, "StatusMessage": _MESSAGES.get(state, state)}
                for state in job.history
            ],
        }
        return {**answer, "FailureReason": job.reason} if job.reason and job.status == "Failed" else answer
