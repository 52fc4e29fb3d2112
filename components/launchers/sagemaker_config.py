"""How a training job becomes a SageMaker training job: the account's part, from the profile of the run."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, PositiveInt, field_validator, model_validator

from modelmill.components.core.errors import UserError
from modelmill.components.core.recipe import Section
from modelmill.components.core.uri import split_s3

# What CreateTrainingJob takes, see its reference.
_Name = Annotated[str, Field(max_length=512, pattern=r"^[a-zA-Z_][a-zA-Z0-9_]*$")]
_Value = Annotated[str, Field(max_length=512)]


class SageMakerConfig(Section):
    """Where a managed training job runs and what it may use."""

    role: str = Field(
        pattern=r"^arn:aws[a-z\-]*:iam::\d{12}:role/[a-zA-Z_0-9+=,.@\-_/]+$", description="ARN of the execution role."
    )
    image: str = Field(
        min_length=1,
        max_length=255,
        pattern=r"^\S+$",
        description="Image of the training processes in ECR, by digest.",
    )
    instance_type: str = Field(
        pattern=r"^ml\.[a-z0-9\-]+\.[a-z0-9]+$", description="Instance type, such as ml.p5.48xlarge."
    )
    output: str = Field(description="s3:// prefix for job files, checkpoints and results.")
    region: str | None = Field(default=None, description="AWS region; null takes that of the environment.")
    volume_gb: PositiveInt = Field(default=200, description="Size of the instance's volume, GB.")
    spot: bool = Field(default=False, description="Whether to use spare capacity, which can be taken away.")
    max_run_seconds: PositiveInt = Field(default=86400, description="Longest training time.")
    max_wait_seconds: PositiveInt | None = Field(
        default=None, description="Longest time with the wait for spare capacity included; null: as max_run_seconds."
    )
    subnets: list[str] = Field(default=[], max_length=16, description="Subnets of the instances; empty: no VPC.")
    security_groups: list[str] = Field(default=[], max_length=5, description="Security groups of the instances.")
    environment: dict[_Name, _Value] = Field(
        default={}, max_length=100, description="Variables of the training processes."
    )

    @field_validator("output")
    @classmethod
    def _an_s3_prefix(cls, value: str) -> str:
        try:
            split_s3(value, parameter="output")
        except UserError as error:
            raise ValueError(str(error)) from None
        return value.rstrip("/")

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.max_wait_seconds is not None:
            if not self.spot:
                raise ValueError("max_wait_seconds: only spare capacity is waited for; set spot, or leave it out")
            if self.max_wait_seconds < self.max_run_seconds:
                raise ValueError(
                    f"max_wait_seconds: {self.max_wait_seconds} includes the training time of up to"
                    f" {self.max_run_seconds}; give at least that"
                )
        if bool(self.subnets) != bool(self.security_groups):
            raise ValueError("subnets and security_groups go together; give both or neither")
        return self
