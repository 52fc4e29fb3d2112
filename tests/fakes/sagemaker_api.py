"""A small SageMaker: training jobs, models, endpoints and model packages that live through their states.

`sagemaker_http` puts it behind a socket. Every request and every response is checked against botocore's service model.
Nothing moves by itself: a job or an endpoint takes its next state each time it is
described, so that a test meets every state in the same order.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from tests.fakes.service_model import problems, service_model

ACCOUNT, REGION = "123456789012", "eu-central-1"
PLAN = ("Starting", "DownloadingTrainingImage", "Downloading", "Training", "Uploading", "Completed")
_ENDED = ("Completed", "Failed", "Stopped", "MaxRuntimeExceeded", "MaxWaitTimeExceeded")
_MESSAGES = {"Interrupted": "The job was interrupted and goes on when there is spare capacity"}


class ServiceError(Exception):
    """An error as the service answers it."""

    def __init__(self, code: str, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.code, self.message, self.status = code, message, status


class Container(Protocol):
    """What runs in a training job, where a test wants something to run."""

    def poll(self) -> tuple[int, str] | None:
        """Exit code and the text of /opt/ml/output/failure, or None while it runs."""

    def stop(self) -> None:
        """SIGTERM."""


@dataclass
class Fault:
    """An answer that goes wrong: `before` it takes effect, or after it has (the answer is lost)."""

    operation: str
    code: str
    times: int
    before: bool = True
    status: int = 400


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


class SageMakerService:
    """The state, and what a test arranges.

    Attributes:
        plans: secondary statuses of the jobs to come, first in first out; then `default_plan`.
        calls: names of the operations, as they came.
        violations: what broke the service model.
    """

    def __init__(self) -> None:
        self.jobs: dict[str, Job] = {}
        self.models: dict[str, dict[str, Any]] = {}
        self.endpoint_configs: dict[str, dict[str, Any]] = {}
        self.endpoints: dict[str, dict[str, Any]] = {}
        self.packages: dict[str, dict[str, Any]] = {}
        self.groups: dict[str, dict[str, Any]] = {}
        self.tags: dict[str, dict[str, str]] = {}
        self.plans: list[tuple[tuple[str, ...], str]] = []
        self.endpoint_plans: list[tuple[str, ...]] = []
        self.faults: list[Fault] = []
        self.calls: list[str] = []
        self.violations: list[str] = []
        self.runner: Callable[[dict[str, Any]], Container] | None = None
        self.invoke: Callable[[dict[str, Any], bytes, Mapping[str, str]], tuple[int, str, bytes]] | None = None
        self.on_call: Callable[[str], None] | None = None
        self._lock = threading.RLock()

    def plan(self, *states: str, reason: str = "") -> None:
        """The states of the next job to be created."""
        self.plans.append((states, reason))

    def fail(self, operation: str, code: str, times: int = 1, *, before: bool = True, status: int = 400) -> None:
        """Answer the next calls of an operation with an error."""
        self.faults.append(Fault(operation, code, times, before, status))

    def running(self) -> list[str]:
        """Jobs that cost money."""
        return [name for name, job in self.jobs.items() if job.status in ("InProgress", "Stopping")]

    def left(self) -> list[str]:
        """What is left of endpoints."""
        return sorted([*self.endpoints, *self.endpoint_configs, *self.models])

    def handle(self, operation: str, request: dict[str, Any]) -> dict[str, Any]:
        """Answer one request."""
        model = service_model("sagemaker").operation_model(operation)
        if self.on_call is not None:
            self.on_call(operation)
        with self._lock:
            self.calls.append(operation)
            if wrong := problems(request, model.input_shape):
                self.violations += wrong
                raise ServiceError("ValidationException", "; ".join(wrong))
            self._fault(operation, before=True)
            answer = getattr(self, f"_{operation}")(request)
            if model.output_shape is not None and (wrong := problems(answer, model.output_shape)):
                self.violations += [f"response: {each}" for each in wrong]
            self._fault(operation, before=False)
            return answer

    def _fault(self, operation: str, *, before: bool) -> None:
        for fault in self.faults:
            if fault.operation == operation and fault.before == before and fault.times:
                fault.times -= 1
                raise ServiceError(fault.code, f"{fault.code} as arranged", fault.status)

    # Training jobs.

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
        self.tags[_arn("training-job", name)] = _tags(request)
        return {"TrainingJobArn": _arn("training-job", name)}

    def _DescribeTrainingJob(self, request: dict[str, Any]) -> dict[str, Any]:
        name = request["TrainingJobName"]
        job = self._job(name)
        answer = self._described(name, job)
        self._advance(job)
        return answer

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
            "TrainingJobArn": _arn("training-job", name),
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

    # Models, endpoint configurations, endpoints.

    def _CreateModel(self, request: dict[str, Any]) -> dict[str, Any]:
        container = request.get("PrimaryContainer", {})
        package = container.get("ModelPackageName")
        if package is not None and package not in self.packages:
            raise ServiceError("ValidationException", f"Could not find model package {package}")
        return {"ModelArn": self._create("model", self.models, request["ModelName"], request)}

    def _CreateEndpointConfig(self, request: dict[str, Any]) -> dict[str, Any]:
        for variant in request["ProductionVariants"]:
            if variant.get("ModelName") not in self.models:
                raise ServiceError("ValidationException", f"Could not find model {variant.get('ModelName')}")
        name = request["EndpointConfigName"]
        return {"EndpointConfigArn": self._create("endpoint-config", self.endpoint_configs, name, request)}

    def _CreateEndpoint(self, request: dict[str, Any]) -> dict[str, Any]:
        if request["EndpointConfigName"] not in self.endpoint_configs:
            raise ServiceError("ValidationException", "Could not find endpoint configuration")
        arn = self._create("endpoint", self.endpoints, request["EndpointName"], request)
        plan = self.endpoint_plans.pop(0) if self.endpoint_plans else ("Creating", "InService")
        self.endpoints[request["EndpointName"]]["plan"] = list(plan)
        return {"EndpointArn": arn}

    def _create(self, kind: str, held: dict[str, dict[str, Any]], name: str, request: dict[str, Any]) -> str:
        arn = _arn(kind, name)
        if name in held:
            raise ServiceError("ValidationException", f'Cannot create already existing {kind} "{arn}".')
        held[name] = {"request": request, "created": time.time()}
        self.tags[arn] = _tags(request)
        return arn

    def _held(self, kind: str, held: dict[str, dict[str, Any]], name: str) -> dict[str, Any]:
        if name not in held:
            raise ServiceError("ValidationException", f'Could not find {kind.replace("-", " ")} "{_arn(kind, name)}".')
        return held[name]

    def _DescribeModel(self, request: dict[str, Any]) -> dict[str, Any]:
        name = request["ModelName"]
        held = self._held("model", self.models, name)
        kept = {key: value for key, value in held["request"].items() if key != "Tags"}
        return {**kept, "CreationTime": held["created"], "ModelArn": _arn("model", name)}

    def _DescribeEndpointConfig(self, request: dict[str, Any]) -> dict[str, Any]:
        name = request["EndpointConfigName"]
        held = self._held("endpoint-config", self.endpoint_configs, name)
        kept = {key: value for key, value in held["request"].items() if key != "Tags"}
        return {**kept, "CreationTime": held["created"], "EndpointConfigArn": _arn("endpoint-config", name)}

    def _DescribeEndpoint(self, request: dict[str, Any]) -> dict[str, Any]:
        name = request["EndpointName"]
        held = self._held("endpoint", self.endpoints, name)
        status = held["plan"][0]
        answer = self._endpoint(name, held, status)
        if status == "Deleting" and len(held["plan"]) == 1:
            del self.endpoints[name]
        elif len(held["plan"]) > 1:
            held["plan"].pop(0)
        return answer

    def _endpoint(self, name: str, held: dict[str, Any], status: str) -> dict[str, Any]:
        answer = {
            "EndpointName": name,
            "EndpointArn": _arn("endpoint", name),
            "EndpointConfigName": held["request"]["EndpointConfigName"],
            "EndpointStatus": status,
            "CreationTime": held["created"],
            "LastModifiedTime": held["created"],
        }
        return {**answer, "FailureReason": "The container did not pass the ping"} if status == "Failed" else answer

    def _ListEndpoints(self, request: dict[str, Any]) -> dict[str, Any]:
        part = request.get("NameContains", "")
        named = {name: held for name, held in self.endpoints.items() if part in name}
        for name in [name for name, held in named.items() if held["plan"] == ["Deleting"]]:
            del self.endpoints[name]  # the last time that it is seen
        fields = ("EndpointName", "EndpointArn", "EndpointStatus", "CreationTime", "LastModifiedTime")
        found = [self._endpoint(name, held, held["plan"][0]) for name, held in named.items()]
        return {"Endpoints": [{key: each[key] for key in fields} for each in found]}

    def _ListEndpointConfigs(self, request: dict[str, Any]) -> dict[str, Any]:
        return {"EndpointConfigs": self._listed("EndpointConfig", "endpoint-config", self.endpoint_configs, request)}

    def _ListModels(self, request: dict[str, Any]) -> dict[str, Any]:
        return {"Models": self._listed("Model", "model", self.models, request)}

    @staticmethod
    def _listed(word: str, kind: str, held: dict[str, Any], request: dict[str, Any]) -> list[dict[str, Any]]:
        part = request.get("NameContains", "")
        return [
            {f"{word}Name": name, f"{word}Arn": _arn(kind, name), "CreationTime": entry["created"]}
            for name, entry in held.items()
            if part in name
        ]

    def _DeleteEndpoint(self, request: dict[str, Any]) -> dict[str, Any]:
        held = self._held("endpoint", self.endpoints, request["EndpointName"])
        if held["plan"][0] in ("Creating", "Deleting"):
            if len(held["plan"]) > 1:
                held["plan"].pop(0)
            raise ServiceError("ValidationException", "Cannot update in-progress endpoint")
        held["plan"] = ["Deleting"]
        return {}

    def _DeleteEndpointConfig(self, request: dict[str, Any]) -> dict[str, Any]:
        self._held("endpoint-config", self.endpoint_configs, request["EndpointConfigName"])
        del self.endpoint_configs[request["EndpointConfigName"]]
        return {}

    def _DeleteModel(self, request: dict[str, Any]) -> dict[str, Any]:
        self._held("model", self.models, request["ModelName"])
        del self.models[request["ModelName"]]
        return {}

    def _ListTags(self, request: dict[str, Any]) -> dict[str, Any]:
        held = self.tags.get(request["ResourceArn"])
        if held is None:
            raise ServiceError("ValidationException", "Could not find the resource")
        return {"Tags": [{"Key": key, "Value": value} for key, value in held.items()]}

    # Model packages.

    def _CreateModelPackageGroup(self, request: dict[str, Any]) -> dict[str, Any]:
        name = request["ModelPackageGroupName"]
        if name in self.groups:
            raise ServiceError("ValidationException", f"Model Package Group already exists: {name}")
        self.groups[name] = request
        return {"ModelPackageGroupArn": _arn("model-package-group", name)}

    def _DescribeModelPackageGroup(self, request: dict[str, Any]) -> dict[str, Any]:
        name = request["ModelPackageGroupName"]
        if name not in self.groups:
            raise ServiceError("ValidationException", f"Model Package Group does not exist: {name}")
        facts = {"CreationTime": time.time(), "ModelPackageGroupStatus": "Completed", "CreatedBy": {}}
        return {"ModelPackageGroupName": name, "ModelPackageGroupArn": _arn("model-package-group", name), **facts}

    def _CreateModelPackage(self, request: dict[str, Any]) -> dict[str, Any]:
        group = request["ModelPackageGroupName"]
        if group not in self.groups:
            raise ServiceError("ValidationException", f"Model Package Group does not exist: {group}")
        for arn, package in self.packages.items():
            if package["ClientToken"] == request.get("ClientToken", object()):
                return {"ModelPackageArn": arn}
        number = 1 + sum(package["ModelPackageGroupName"] == group for package in self.packages.values())
        arn = _arn("model-package", f"{group}/{number}")
        created = {"ModelPackageVersion": number, "CreationTime": time.time()}
        self.packages[arn] = {"ClientToken": arn, **request, **created}
        self.tags[arn] = _tags(request)
        return {"ModelPackageArn": arn}

    def _DescribeModelPackage(self, request: dict[str, Any]) -> dict[str, Any]:
        arn = request["ModelPackageName"]
        if arn not in self.packages:
            raise ServiceError("ValidationException", f"ModelPackage {arn} does not exist")
        kept = {key: value for key, value in self.packages[arn].items() if key not in ("ClientToken", "Tags")}
        done: dict[str, Any] = {
            "ModelPackageStatus": "Completed",
            "ModelPackageStatusDetails": {"ValidationStatuses": []},
        }
        return {
            **kept,
            **done,
            "ModelPackageName": self.packages[arn]["ModelPackageGroupName"],
            "ModelPackageArn": arn,
        }

    def _ListModelPackages(self, request: dict[str, Any]) -> dict[str, Any]:
        group = request.get("ModelPackageGroupName")
        if group not in self.groups:
            raise ServiceError("ValidationException", f"Model Package Group does not exist: {group}")
        found = [
            {
                "ModelPackageName": group,
                "ModelPackageArn": arn,
                "ModelPackageVersion": package["ModelPackageVersion"],
                "CreationTime": package["CreationTime"],
                "ModelPackageStatus": "Completed",
            }
            for arn, package in self.packages.items()
            if package["ModelPackageGroupName"] == group
        ]
        return {"ModelPackageSummaryList": found[::-1]}

    # The runtime.

    def invoked(self, name: str, body: bytes, headers: Mapping[str, str]) -> tuple[int, str, bytes]:
        """Status, content type and body of an invocation."""
        if self.on_call is not None:
            self.on_call("InvokeEndpoint")
        with self._lock:
            self.calls.append("InvokeEndpoint")
            self._fault("InvokeEndpoint", before=True)
            held = self.endpoints.get(name)
            if held is None or held["plan"][0] != "InService" or self.invoke is None:
                raise ServiceError("ValidationError", f"Endpoint {name} of account {ACCOUNT} not found.")
            config = self.endpoint_configs[held["request"]["EndpointConfigName"]]["request"]
            model = self.models[config["ProductionVariants"][0]["ModelName"]]["request"]
        return self.invoke(model, body, headers)


def _arn(kind: str, name: str) -> str:
    return f"arn:aws:sagemaker:{REGION}:{ACCOUNT}:{kind}/{name}"


def _tags(request: Mapping[str, Any]) -> dict[str, str]:
    return {tag["Key"]: tag["Value"] for tag in request.get("Tags", [])}
