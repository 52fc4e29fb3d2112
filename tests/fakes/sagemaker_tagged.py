"""What every part of the small SageMaker shares: errors, ARNs, tags."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ACCOUNT, REGION = "123456789012", "eu-central-1"


class ServiceError(Exception):
    """An error as the service answers it."""

    def __init__(self, code: str, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.code, self.message, self.status = code, message, status


class Tagged:
    """Tags of everything, by ARN."""

    def __init__(self) -> None:
        self.tags: dict[str, dict[str, str]] = {}

    def _ListTags(self, request: dict[str, Any]) -> dict[str, Any]:
        held = self.tags.get(request["ResourceArn"])
        if held is None:
            raise ServiceError("ValidationException", "Could not find the resource")
        return {"Tags": [{"Key": key, "Value": value} for key, value in held.items()]}


def arn_of(kind: str, name: str) -> str:
    return f"arn:aws:sagemaker:{REGION}:{ACCOUNT}:{kind}/{name}"


def tags_of(request: Mapping[str, Any]) -> dict[str, str]:
    return {tag["Key"]: tag["Value"] for tag in request.get("Tags", [])}
