"""Model packages of the small SageMaker and their groups."""

from __future__ import annotations

import time
from typing import Any

from tests.fakes.sagemaker_tagged import ServiceError, Tagged, arn_of, tags_of


class ModelPackages(Tagged):
    """The operations on model packages."""

    def __init__(self) -> None:
        super().__init__()
        self.packages: dict[str, dict[str, Any]] = {}
        self.groups: dict[str, dict[str, Any]] = {}

    def _CreateModelPackageGroup(self, request: dict[str, Any]) -> dict[str, Any]:
        name = request["ModelPackageGroupName"]
        if name in self.groups:
            raise ServiceError("ValidationException", f"Model Package Group already exists: {name}")
        self.groups[name] = request
        return {"ModelPackageGroupArn": arn_of("model-package-group", name)}

    def _DescribeModelPackageGroup(self, request: dict[str, Any]) -> dict[str, Any]:
        name = request["ModelPackageGroupName"]
        if name not in self.groups:
            raise ServiceError("ValidationException", f"Model Package Group does not exist: {name}")
        facts = {"CreationTime": time.time(), "ModelPackageGroupStatus": "Completed", "CreatedBy": {}}
        return {"ModelPackageGroupName": name, "ModelPackageGroupArn": arn_of("model-package-group", name), **facts}

    def _CreateModelPackage(self, request: dict[str, Any]) -> dict[str, Any]:
        group = request["ModelPackageGroupName"]
        if group not in self.groups:
            raise ServiceError("ValidationException", f"Model Package Group does not exist: {group}")
        for arn, package in self.packages.items():
            if package["ClientToken"] == request.get("ClientToken", object()):
                return {"ModelPackageArn": arn}
        number = 1 + sum(package["ModelPackageGroupName"] == group for package in self.packages.values())
        arn = arn_of("model-package", f"{group}/{number}")
        created = {"ModelPackageVersion": number, "CreationTime": time.time()}
        self.packages[arn] = {"ClientToken": arn, **request, **created}
        self.tags[arn] = tags_of(request)
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
        return self._page("ModelPackageSummaryList", found[::-1], request)
