"""A model served by SageMaker for the length of a run, or longer where the recipe says so."""

from __future__ import annotations

from pydantic import Field, PositiveInt, field_validator

from modelmill.components.core.errors import UserError
from modelmill.components.core.recipe import Section
from modelmill.components.core.uri import split_s3


class EndpointConfig(Section):
    """Container, package and endpoint of a deployment."""

    name: str = Field(
        pattern=r"^[a-zA-Z0-9](-*[a-zA-Z0-9]){0,39}$",
        description="Beginning of the names of model, endpoint configuration and endpoint; the run's digest follows. "
        "The shipped policies and the reaper know `modelmill-...` only.",
    )
    group: str = Field(
        pattern=r"^[a-zA-Z0-9](-*[a-zA-Z0-9]){0,62}$",
        description="Model package group; made when there is none. The shipped policies know `modelmill-...` only.",
    )
    role: str = Field(
        default="",
        pattern=r"^(arn:aws[a-z\-]*:iam::\d{12}:role/[a-zA-Z_0-9+=,.@\-_/]+)?$",
        description="ARN of the role that the container has: it reads image and model data.",
    )
    image: str = Field(
        default="",
        max_length=255,
        pattern=r"^\S*$",
        description="Image in ECR that serves: ours, or one whose command `serve` runs code/sagemaker_serving.py.",
    )
    model_data: str = Field(default="", description="Folder for the packed models, as s3://bucket/prefix.")
    region: str | None = Field(default=None, description="AWS region; null takes that of the environment.")
    instance_type: str = Field(
        pattern=r"^ml\.[a-z0-9\-]+\.[a-z0-9]+$", description="Instance type, such as ml.c7i.xlarge."
    )
    instance_count: PositiveInt = Field(default=1, description="Instances behind the endpoint.")
    environment: dict[str, str] = Field(default={}, max_length=100, description="Environment of the container.")
    timeout_seconds: PositiveInt = Field(
        default=1800, description="Longest wait for the endpoint to serve; then all of it is deleted again."
    )
    max_hours: PositiveInt = Field(
        default=6, description="Age at which the clean-up deletes an endpoint that is not kept and whose run is gone."
    )
    keep: bool = Field(
        default=False, description="Whether the endpoint, which costs money, stays after a run that succeeded."
    )

    @field_validator("model_data")
    @classmethod
    def _an_s3_folder(cls, value: str) -> str:
        try:
            if value:
                split_s3(value, parameter="model_data")
        except UserError as error:
            raise ValueError(str(error)) from None
        return value.rstrip("/")

    def require_account(self) -> None:
        """Refuse a section that lacks what only an account knows; the shipped recipes name no account.

        Raises:
            UserError: role, image or model_data is missing.
        """
        for name in ("role", "image", "model_data"):
            if not getattr(self, name):
                raise UserError(
                    f"endpoint.{name}: '' is none; set it with --set endpoint.{name}=..., or in a recipe that extends"
                    " this one"
                )


class InvokeConfig(Section):
    """The endpoint and how it is tried."""

    endpoint: EndpointConfig
    requests: PositiveInt = Field(default=20, description="Invocations with the input example.")
