"""The recipe of the `deploy_forecaster` pipeline."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from modelmill.components.core.recipe import PlannedStep, Recipe
from modelmill.components.registry.config import FetchModelConfig
from modelmill.components.registry.sagemaker_endpoint_config import EndpointConfig, InvokeConfig

_REGISTRY = "modelmill.components.registry"


class DeployForecasterRecipe(Recipe):
    """Serve a registered forecaster (or language model) by a SageMaker endpoint, try it, and delete it."""

    pipeline: Literal["deploy_forecaster"]
    model: FetchModelConfig = Field(description="What is served, such as models:/<name>@champion.")
    endpoint: EndpointConfig = Field(description="Container and endpoint; with `keep` it stays.")
    requests: int = Field(default=20, ge=1, description="Invocations with the input example.")

    def check_local(self) -> None:
        """See `Recipe.check_local`: the account's part must be given."""
        self.endpoint.require_account()

    def steps(self) -> list[PlannedStep]:
        return [
            PlannedStep("fetch_model", self.model, f"{_REGISTRY}.fetch_model:fetch_model"),
            PlannedStep(
                "package_model",
                self.endpoint,
                f"{_REGISTRY}.sagemaker_package:package_model",
                {"model": "fetch_model"},
            ),
            PlannedStep(
                "deploy_endpoint",
                self.endpoint,
                f"{_REGISTRY}.sagemaker_endpoint:deploy_endpoint",
                {"package": "package_model"},
            ),
            PlannedStep(
                "invoke_endpoint",
                InvokeConfig(endpoint=self.endpoint, requests=self.requests),
                f"{_REGISTRY}.sagemaker_endpoint:invoke_endpoint",
                {"package": "package_model", "endpoint": "deploy_endpoint"},
            ),
            PlannedStep("delete_endpoint", self.endpoint, f"{_REGISTRY}.sagemaker_deletion:delete_endpoint"),
        ]
