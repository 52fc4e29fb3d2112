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
    """Tags of everything, by ARN.

    Attributes:
        page_size: most entries of an answer that lists something; 10 where a request says nothing, as at AWS.
    """

    def __init__(self) -> None:
        self.tags: dict[str, dict[str, str]] = {}
        self.page_size = 10

    def _ListTags(self, request: dict[str, Any]) -> dict[str, Any]:
        held = self.tags.get(request["ResourceArn"])
        if held is None:
            raise ServiceError("ValidationException", "Could not find the resource")
        return self._page("Tags", [{"Key": key, "Value": value} for key, value in held.items()], request)

    def _AddTags(self, request: dict[str, Any]) -> dict[str, Any]:
        if request["ResourceArn"] not in self.tags:
            raise ServiceError("ValidationException", "Could not find the resource")
        held = self.tags[request["ResourceArn"]]
        held |= tags_of(request)
        return {"Tags": [{"Key": key, "Value": value} for key, value in held.items()]}

    def _page(self, field: str, entries: list[dict[str, Any]], request: dict[str, Any]) -> dict[str, Any]:
        """A part of a listing, and where the next begins."""
        begin = int(request.get("NextToken", 0))
        end = begin + self.page_size
        return {field: entries[begin:end]} | ({"NextToken": str(end)} if end < len(entries) else {})


def arn_of(kind: str, name: str) -> str:
    return f"arn:aws:sagemaker:{REGION}:{ACCOUNT}:{kind}/{name}"


def tags_of(request: Mapping[str, Any]) -> dict[str, str]:
    return {tag["Key"]: tag["Value"] for tag in request.get("Tags", [])}
