"""The account's part of SageMaker jobs, for tests."""

from __future__ import annotations

from typing import Any

from modelmill.components.launchers.sagemaker_config import SageMakerConfig
from tests.fakes.aws import BUCKET

ACCOUNT_PART: dict[str, Any] = {
    "role": "arn:aws:iam::123456789012:role/training",
    "image": "123456789012.dkr.ecr.eu-central-1.amazonaws.com/gpu@sha256:" + "0" * 64,
    "instance_type": "ml.g6.12xlarge",
}


def config(prefix: str, **changes: Any) -> SageMakerConfig:
    return SageMakerConfig.model_validate({**ACCOUNT_PART, "output": f"s3://{BUCKET}/{prefix}", **changes})
