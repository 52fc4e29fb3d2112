"""The pipeline that deploys, run as on a laptop: nothing is left behind, whichever way it ends."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from modelmill.components.core.home import Home
from modelmill.components.core.manifest import Manifest
from modelmill.components.registry.flavors import flavor_of
from modelmill.components.registry.sagemaker_package import stage
from modelmill.components.registry.sagemaker_serving import BadRequest, Served
from modelmill.pipelines import catalog
from modelmill.pipelines.launch.local import run_local
from tests.components.forecasting import chronos_models
from tests.fakes.aws import BUCKET
from tests.fakes.sagemaker_api import SageMakerService


@pytest.mark.slow
def test_nothing_is_left_of_a_run_that_succeeds_or_fails(tmp_path: Path, home: Home, aws: SageMakerService) -> None:
    made = chronos_models.bolt(tmp_path / "bolt")
    model: Manifest = made.model_copy(update={"metadata": {**made.metadata, "flavor": "forecaster"}})
    served = Served(stage(model, flavor_of(model)[1], tmp_path / "staged"))

    def invoke(_model: dict[str, Any], body: bytes, _headers: Mapping[str, str]) -> tuple[int, str, bytes]:
        try:
            return 200, "application/json", served.answer(body)
        except BadRequest as error:
            return 400, "application/json", str(error).encode()

    aws.invoke = invoke
    recipe = catalog.load(
        "sagemaker/forecaster-endpoint",
        [
            f"model.reference={tmp_path / 'bolt' / 'model'}",
            "endpoint.role=arn:aws:iam::123456789012:role/serving",
            "endpoint.image=registry/cpu:1",
            f"endpoint.model_data=s3://{BUCKET}/pipeline",
            "requests=2",
        ],
    )
    aws.endpoint_plans += [("InService",), ("Creating", "Failed")]
    done = run_local(recipe, reference="sagemaker/forecaster-endpoint", grace=1.0, deliver=False)
    assert done.state == "succeeded", done.message
    assert aws.left() == []
    failed = run_local(recipe, reference="sagemaker/forecaster-endpoint", grace=1.0, deliver=False)
    assert failed.state == "failed"
    assert "is Failed and not in service" in failed.message
    assert aws.left() == []
    assert aws.calls.count("InvokeEndpoint") == 4
