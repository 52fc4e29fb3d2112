"""Models, endpoint configurations and endpoints of the small SageMaker."""

from __future__ import annotations

import time
from typing import Any

from tests.fakes.sagemaker_packages import ModelPackages
from tests.fakes.sagemaker_tagged import ServiceError, arn_of, tags_of


class Hosting(ModelPackages):
    """The operations on what serves.

    Attributes:
        endpoint_plans: states of the endpoints to come, first in first out.
    """

    def __init__(self) -> None:
        super().__init__()
        self.models: dict[str, dict[str, Any]] = {}
        self.endpoint_configs: dict[str, dict[str, Any]] = {}
        self.endpoints: dict[str, dict[str, Any]] = {}
        self.endpoint_plans: list[tuple[str, ...]] = []

    def left(self) -> list[str]:
        """What is left of endpoints."""
        return sorted([*self.endpoints, *self.endpoint_configs, *self.models])

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
        arn = arn_of(kind, name)
        if name in held:
            raise ServiceError("ValidationException", f'Cannot create already existing {kind} "{arn}".')
        held[name] = {"request": request, "created": time.time()}
        self.tags[arn] = tags_of(request)
        return arn

    def _held(self, kind: str, held: dict[str, dict[str, Any]], name: str) -> dict[str, Any]:
        if name not in held:
            raise ServiceError(
                "ValidationException", f'Could not find {kind.replace("-", " ")} "{arn_of(kind, name)}".'
            )
        return held[name]

    def _DescribeModel(self, request: dict[str, Any]) -> dict[str, Any]:
        name = request["ModelName"]
        held = self._held("model", self.models, name)
        kept = {key: value for key, value in held["request"].items() if key != "Tags"}
        return {**kept, "CreationTime": held["created"], "ModelArn": arn_of("model", name)}

    def _DescribeEndpointConfig(self, request: dict[str, Any]) -> dict[str, Any]:
        name = request["EndpointConfigName"]
        held = self._held("endpoint-config", self.endpoint_configs, name)
        kept = {key: value for key, value in held["request"].items() if key != "Tags"}
        return {**kept, "CreationTime": held["created"], "EndpointConfigArn": arn_of("endpoint-config", name)}

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
            "EndpointArn": arn_of("endpoint", name),
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
        return self._page("Endpoints", [{key: each[key] for key in fields} for each in found], request)

    def _ListEndpointConfigs(self, request: dict[str, Any]) -> dict[str, Any]:
        found = self._listed("EndpointConfig", "endpoint-config", self.endpoint_configs, request)
        return self._page("EndpointConfigs", found, request)

    def _ListModels(self, request: dict[str, Any]) -> dict[str, Any]:
        return self._page("Models", self._listed("Model", "model", self.models, request), request)

    @staticmethod
    def _listed(word: str, kind: str, held: dict[str, Any], request: dict[str, Any]) -> list[dict[str, Any]]:
        part = request.get("NameContains", "")
        return [
            {f"{word}Name": name, f"{word}Arn": arn_of(kind, name), "CreationTime": entry["created"]}
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
