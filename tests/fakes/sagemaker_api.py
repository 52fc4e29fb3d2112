"""A small SageMaker: training jobs, models, endpoints and model packages that live through their states.

`sagemaker_http` puts it behind a socket. Every request and every response is checked against botocore's service model.
Nothing moves by itself: a job or an endpoint takes its next state each time it is
described, so that a test meets every state in the same order. The other files `sagemaker_*` hold its parts.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tests.fakes.sagemaker_hosting import Hosting
from tests.fakes.sagemaker_tagged import ACCOUNT, ServiceError
from tests.fakes.sagemaker_training import TrainingJobs
from tests.fakes.service_model import problems, service_model


@dataclass
class Fault:
    """An answer that goes wrong: `before` it takes effect, or after it has (the answer is lost)."""

    operation: str
    code: str
    times: int
    before: bool = True
    status: int = 400


class SageMakerService(TrainingJobs, Hosting):
    """All of it, and what a test arranges.

    Attributes:
        calls: names of the operations, as they came.
        violations: what broke the service model.
    """

    def __init__(self) -> None:
        super().__init__()
        self.faults: list[Fault] = []
        self.calls: list[str] = []
        self.violations: list[str] = []
        self.invoke: Callable[[dict[str, Any], bytes, Mapping[str, str]], tuple[int, str, bytes]] | None = None
        self.on_call: Callable[[str], None] | None = None
        self._lock = threading.RLock()

    def fail(self, operation: str, code: str, times: int = 1, *, before: bool = True, status: int = 400) -> None:
        """Answer the next calls of an operation with an error."""
        self.faults.append(Fault(operation, code, times, before, status))

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
