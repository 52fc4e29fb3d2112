"""A training job as SageMaker is given it: what the section refuses, paths as references, the SDK's request."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import boto3
import pytest
from pydantic import ValidationError

from modelmill.components.launchers.sagemaker_job import Launch, PortableSpec, localized, training_request
from modelmill.components.training.launch import (
    TrainingJob,
)
from tests.components.launchers.sagemaker_sections import config
from tests.components.training.samples import training_config
from tests.fakes.aws import BUCKET
from tests.fakes.service_model import problems, service_model


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"role": "training"}, "role"),
        ({"output": "/local"}, "is not an S3 URI"),
        ({"max_wait_seconds": 90000}, "only spare capacity is waited for"),
        ({"spot": True, "max_wait_seconds": 5}, "give at least that"),
        ({"subnets": ["subnet-1"]}, "subnets and security_groups go together"),
        ({"environment": {"A": "x" * 600}}, "environment"),
        ({"instance_type": "p5.48xlarge"}, "instance_type"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_the_section_refuses(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        config("x", **changes)


def test_paths_travel_as_references(tmp_path: Path) -> None:
    scratch, data = tmp_path / "scratch", tmp_path / "data"
    for folder in (scratch / "data", data):
        folder.mkdir(parents=True)
    (tmp_path / "vocabulary.txt").write_text("a")
    spec = {
        "base": {"folder": str(data), "name": str(data)},
        "again": [str(data), 1, None],
        "file": str(tmp_path / "vocabulary.txt"),
        "remote": "s3://bucket/rows/",
        "output": str(scratch / "data"),
        "text": "/no/such/place",
    }
    portable = PortableSpec.of(TrainingJob("m", spec, training_config(), scratch))
    assert portable.inputs == {
        "data0": str(data),
        "data1": str(tmp_path / "vocabulary.txt"),
        "data2": "s3://bucket/rows",
    }
    there = localized(portable.spec, Path("/in"), Path("/out"))
    assert there["base"] == {"folder": "/in/data0", "name": str(data)}
    assert there["again"] == ["/in/data0", 1, None]
    assert (there["file"], there["remote"]) == ("/in/data1/vocabulary.txt", "/in/data2")
    assert (there["output"], there["text"]) == ("/out/data", "/no/such/place")


def test_the_request_is_that_of_the_sdk(monkeypatch: pytest.MonkeyPatch) -> None:
    """`ModelTrainer` makes the same of the same settings, but for the name and the entry point it chooses itself."""
    from sagemaker.core.helper.session_helper import Session
    from sagemaker.core.shapes import CheckpointConfig, OutputDataConfig, Tag
    from sagemaker.train import ModelTrainer
    from sagemaker.train.configs import Compute, InputData, Networking, StoppingCondition

    made = config("x", spot=True, subnets=["subnet-1"], security_groups=["sg-1"], environment={"A": "1"})
    launch = Launch("0123456789abcdef", "pretrain", f"{made.output}/jobs/pretrain-0123456789abcdef")
    place = f"s3://{BUCKET}/rows"
    ours = training_request(launch.job_name(1), launch, made, {"data0": place}, {"modelmill:run": "1"})
    assert problems(ours, service_model("sagemaker").operation_model("CreateTrainingJob").input_shape) == []
    session = Session(
        boto3.session.Session(region_name="eu-central-1", aws_access_key_id="a", aws_secret_access_key="b")
    )
    monkeypatch.setenv("SAGEMAKER_VALIDATE_ROLE", "false")
    trainer = ModelTrainer(
        sagemaker_session=session,
        role=made.role,
        training_image=made.image,
        compute=Compute(
            instance_type=made.instance_type,
            instance_count=1,
            volume_size_in_gb=made.volume_gb,
            enable_managed_spot_training=True,
        ),
        networking=Networking(subnets=made.subnets, security_group_ids=made.security_groups),
        stopping_condition=StoppingCondition(
            max_runtime_in_seconds=made.max_run_seconds, max_wait_time_in_seconds=made.max_run_seconds
        ),
        output_data_config=OutputDataConfig(s3_output_path=f"{launch.place}/results", compression_type="NONE"),
        checkpoint_config=CheckpointConfig(s3_uri=launch.checkpoints, local_path="/opt/ml/checkpoints"),
        environment=made.environment,
        tags=[Tag(key="modelmill:run", value="1")],
    )
    channel = InputData(channel_name="data0", data_source=f"{place}/")
    theirs = trainer._create_training_job_args(input_data_config=[channel], boto3=True)
    for request in (ours, theirs):
        del request["TrainingJobName"]
        request["AlgorithmSpecification"].pop("ContainerEntrypoint", None)
        for each in request["InputDataConfig"]:
            each.pop("InputMode", None)  # that of the job
    theirs = {name: value for name, value in theirs.items() if value not in (None, {}, [])}
    assert theirs == ours
