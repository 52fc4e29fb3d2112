"""The SageMaker Model Registry follows the promotions: one package a version, and what people decided there stands."""

from __future__ import annotations

import hashlib
import os
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.validate import ParamValidator
from moto import mock_aws
from pydantic import ValidationError

from modelmill.components.core.errors import UserError
from modelmill.components.core.manifest import Manifest
from modelmill.components.registry.config import MirrorConfig, SageMakerConfig
from modelmill.components.registry.rollback import rollback
from modelmill.components.registry.sagemaker_mirror import mirror_to_sagemaker, pack, package_request
from tests.components.registry.versions import Workshop, described

REGION, BUCKET = "eu-central-1", "models"


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    with mock_aws():
        configuration = {"LocationConstraint": REGION}
        boto3.client("s3", region_name=REGION).create_bucket(Bucket=BUCKET, CreateBucketConfiguration=configuration)
        yield boto3.client("sagemaker", region_name=REGION)


def section(group: str, **settings: Any) -> SageMakerConfig:
    values = {"group": group, "region": REGION, "model_data": f"s3://{BUCKET}/packed/", "image": "registry/llm:1"}
    return SageMakerConfig.model_validate({**values, **settings})


def mirrored(
    workshop: Workshop, registration: Manifest, promotion: Manifest, config: SageMakerConfig | None
) -> Manifest:
    folder = workshop.fresh("mirror")
    result = mirror_to_sagemaker(
        MirrorConfig(sagemaker=config), folder, registration=registration, promotion=promotion
    )
    return described(folder, result)


def packages(aws: Any, group: str) -> dict[int, dict[str, Any]]:
    listed = aws.list_model_packages(ModelPackageGroupName=group)["ModelPackageSummaryList"]
    found = [aws.describe_model_package(ModelPackageName=each["ModelPackageArn"]) for each in listed]
    return {package["ModelPackageVersion"]: package for package in found}


def approvals(aws: Any, group: str) -> dict[int, str]:
    return {number: package["ModelApprovalStatus"] for number, package in packages(aws, group).items()}


def test_packages_follow_promotion_and_rollback(workshop: Workshop, aws: Any) -> None:
    config, name = section("follows", environment={"MAX_LENGTH": "64"}), "mirrored"
    (first, registration, verdict), (second, *_) = workshop.reign(name, 2)
    # Made one by one as a pipeline would: the first is the champion, then the second.
    rollback(name, "start again")
    workshop.client.delete_model_version_tag(name, "2", "rolled_back")
    again = workshop.promote(registration, verdict)
    assert again.metadata["outcome"] == "already"
    made = mirrored(workshop, registration, again, config)
    assert (made.metadata["approval"], made.counts["mirrored"]) == ("Approved", 1)
    (package,) = packages(aws, "follows").values()
    assert made.metadata["package"] == package["ModelPackageArn"]
    facts = package["CustomerMetadataProperties"]
    assert facts["weights_digest"] == first.metadata["weights_digest"]
    assert facts["mlflow_model"] == f"models:/{name}/1"
    (container,) = package["InferenceSpecification"]["Containers"]
    assert container["Image"] == "registry/llm:1"
    assert container["Environment"] == {"MAX_LENGTH": "64"}
    assert container["ModelDataUrl"] == f"s3://{BUCKET}/packed/{facts['files_digest']}/model.tar.gz"
    assert workshop.tags(name, "1")["sagemaker_package"] == package["ModelPackageArn"]

    assert mirrored(workshop, registration, again, config).metadata == made.metadata
    assert approvals(aws, "follows") == {1: "Approved"}, "once"

    newer = workshop.register(name, second)
    promotion = workshop.promote(newer, workshop.gate(second, first, seed=1))
    assert promotion.metadata["outcome"] == "promoted"
    mirrored(workshop, newer, promotion, config)
    assert sorted(approvals(aws, "follows").values()) == ["Approved", "Approved"]
    done = rollback(name, "wrong | language")
    assert done.warnings == ()
    bad = aws.describe_model_package(
        ModelPackageName=workshop.tags(name, newer.metadata["version"])["sagemaker_package"]
    )
    assert bad["ModelApprovalStatus"] == "Rejected"
    assert bad["ApprovalDescription"] == "rolled back: wrong language"
    assert bad["CustomerMetadataProperties"]["weights_digest"] == second.metadata["weights_digest"]
    assert mirrored(workshop, newer, promotion, config).metadata["approval"] == "Rejected"


def test_a_challenger_waits_for_people_and_their_word_stands(workshop: Workshop, aws: Any) -> None:
    config, name = section("waits"), "waiting"
    ((champion, _, _),) = workshop.reign(name, 1)
    model = workshop.model(2)
    registration = workshop.register(name, model)
    challenge = workshop.promote(registration, workshop.gate(model, workshop.model(0)))
    assert mirrored(workshop, registration, challenge, config).metadata["approval"] == "PendingManualApproval"
    arn = workshop.tags(name, "2")["sagemaker_package"]
    facts = {"files_digest": workshop.tags(name, "2")["files_digest"]}  # moto replaces what AWS would merge
    aws.update_model_package(ModelPackageArn=arn, ModelApprovalStatus="Rejected", CustomerMetadataProperties=facts)
    assert mirrored(workshop, registration, challenge, config).metadata["approval"] == "Rejected"
    promotion = workshop.promote(registration, workshop.gate(model, champion))
    assert mirrored(workshop, registration, promotion, config).metadata["approval"] == "Approved"
    assert approvals(aws, "waits") == {1: "Approved"}


def test_a_version_that_is_kept_and_a_recipe_without_a_group_make_nothing(workshop: Workshop, aws: Any) -> None:
    ((champion, first, _),) = workshop.reign("keeping", 1)
    model = workshop.model(2)
    registration = workshop.register("keeping", model)
    kept = workshop.promote(registration, workshop.gate(model, champion, better=False))
    assert mirrored(workshop, registration, kept, section("none")).metadata == {"package": "", "approval": ""}
    assert mirrored(workshop, first, kept, None).counts == {"mirrored": 0}
    assert aws.list_model_package_groups()["ModelPackageGroupSummaryList"] == []


def test_the_packed_model_is_the_same_bytes_and_unpacks(workshop: Workshop, tmp_path: Path) -> None:
    folder = Path(workshop.model(1).uri) / "model"
    again = Path(workshop.model(1).uri) / "model"
    (again / "config.json").touch()
    (again / "config.json").chmod(0o600)
    digests = set()
    for number, source in enumerate((folder, again)):
        target = tmp_path / f"model-{number}.tar.gz"
        pack(source, target)
        digests.add(hashlib.sha256(target.read_bytes()).hexdigest())
    assert len(digests) == 1
    with tarfile.open(tmp_path / "model-0.tar.gz") as archive:
        assert archive.getnames() == ["config.json", "model.safetensors", "parts/config.json"]
        archive.extractall(tmp_path / "out", filter="data")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_the_request_is_one_that_sagemaker_knows(workshop: Workshop, aws: Any) -> None:
    registration = workshop.register("request", workshop.model(1), method="lora", recipe="laptop/a|b", gate="passed")
    version = workshop.client.get_model_version("request", registration.metadata["version"])
    config = section("group", instance_types=("ml.g5.xlarge",), environment={"A": "1"})
    request = package_request(config, version, "s3://models/k", "Approved", 'better "by" | 0.1')
    shape = aws.meta.service_model.operation_model("CreateModelPackage").input_shape
    report = ParamValidator().validate(request, shape)
    assert not report.has_errors(), report.generate_report()
    assert request["CustomerMetadataProperties"]["recipe"] == "laptop/a b"
    assert request["ModelPackageDescription"] == "request version 1. better by 0.1"
    assert len(request["ClientToken"]) <= 36


@pytest.fixture
def promoted(workshop: Workshop, request: pytest.FixtureRequest) -> tuple[Manifest, Manifest]:
    name = request.node.name.replace("[", "-").replace("]", "")
    ((_, registration, verdict),) = workshop.reign(name, 1)
    return registration, workshop.promote(registration, verdict)


def refusal(workshop: Workshop, promoted: tuple[Manifest, Manifest], config: SageMakerConfig) -> str:
    with pytest.raises(UserError) as failure:
        mirrored(workshop, *promoted, config)
    return str(failure.value)


def test_what_aws_refuses_is_one_line(
    workshop: Workshop, aws: Any, promoted: tuple[Manifest, Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = refusal(workshop, promoted, section("bucket", model_data="s3://nowhere/at/all"))
    assert said.startswith("sagemaker")
    assert "nowhere" in said
    assert "bucket does not exist" in said
    said = refusal(workshop, promoted, section("region", region=None))
    assert said.startswith("sagemaker.region: none is given")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    said = refusal(workshop, promoted, section("credentials"))
    assert said.startswith("sagemaker: there are no AWS credentials; set AWS_PROFILE")
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    said = refusal(workshop, promoted, section("profile"))
    assert "nobody" in said
    monkeypatch.setitem(sys.modules, "sagemaker.core.resources", None)
    said = refusal(workshop, promoted, section("missing"))
    assert "is not installed; pip install 'modelmill[aws]'" in said


def test_a_rollback_does_not_wait_for_aws(workshop: Workshop, aws: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    workshop.reign("offline", 2)
    arn = f"arn:aws:sagemaker:{REGION}:123456789012:model-package/gone/1"
    workshop.client.set_model_version_tag("offline", "2", "sagemaker_package", arn)
    done = rollback("offline", "bad")
    assert done.champion == "1"
    (warning,) = done.warnings
    assert f"--model-approval-status Rejected --model-package-arn {arn}" in warning
    assert workshop.aliases("offline") == {"champion": "1"}


@pytest.mark.parametrize(
    "wrong",
    [
        {"group": "under_score"},
        {"model_data": "/local"},
        {"region": "Frankfurt"},
        {"image": "two words"},
        {"content_types": []},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_config_refuses(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        section(**{"group": "group", **wrong})
