"""How a training job becomes a SageMaker training job: the account's part, from the profile of the run."""

from __future__ import annotations

from pydantic import Field, PositiveInt

from modelmill.components.core.recipe import Section


class SageMakerConfig(Section):
    """Where a managed training job runs and what it may use."""

    role: str = Field(description="ARN of the execution role.")
    image: str = Field(description="Image of the training processes in ECR, by digest.")
    instance_type: str = Field(description="Instance type, such as ml.p5.48xlarge.")
    output: str = Field(description="s3:// prefix for job files, checkpoints and results.")
    region: str | None = Field(default=None, description="AWS region; null takes that of the environment.")
    volume_gb: PositiveInt = Field(default=200, description="Size of the instance's volume, GB.")
    spot: bool = Field(default=False, description="Whether to use spare capacity, which can be taken away.")
    max_run_seconds: PositiveInt = Field(default=86400, description="Longest training time.")
    max_wait_seconds: PositiveInt | None = Field(
        default=None, description="Longest time with the wait for spare capacity included; null: as max_run_seconds."
    )
    subnets: list[str] = Field(default=[], description="Subnets of the instances; empty: no VPC.")
    security_groups: list[str] = Field(default=[], description="Security groups of the instances.")
    environment: dict[str, str] = Field(default={}, description="Variables of the training processes.")
