"""Step `mirror_to_sagemaker`: the SageMaker Model Registry follows the promotions, by model package groups.

A package is a model's files in S3, a container that serves them, and an approval: Approved for the champion,
PendingManualApproval for a challenger, Rejected after a rollback. What watches approvals there deploys as ever. The
packages of earlier champions stay Approved, so that rejecting the newest one brings back the one before.
"""

from __future__ import annotations

import gzip
import json
import logging
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelmill.components.core import events, tracking
from modelmill.components.core.aws import aws_trouble, client, is_missing, open_session
from modelmill.components.core.errors import UserError
from modelmill.components.core.manifest import Manifest
from modelmill.components.core.mlflow_store import one_line
from modelmill.components.core.step import StepResult, step_options
from modelmill.components.core.uri import split_s3
from modelmill.components.registry.config import MirrorConfig, SageMakerConfig
from modelmill.components.registry.store import FILES_TAG, WEIGHTS_TAG, check_files, find_version, open_registry

if TYPE_CHECKING:
    from boto3.session import Session
    from mlflow.entities.model_registry import ModelVersion
    from sagemaker.core.resources import ModelPackage

PACKAGE_TAG = "sagemaker_package"
_APPROVALS = {"promoted": "Approved", "already": "Approved", "challenger": "PendingManualApproval"}
logger = logging.getLogger("modelmill")


@step_options(reuse=False)
def mirror_to_sagemaker(
    config: MirrorConfig, output: Path, *, registration: Manifest, promotion: Manifest
) -> StepResult:
    """Give a version a package in the SageMaker Model Registry, with the approval its promotion calls for.

    The same version has one package, found by the digest of its files; repeating the step changes nothing. Writes
    `mirror.json`. A version that is not promoted gets no package; one that has a package keeps it as it is, or sees it
    rejected where the version was rolled back.

    Args:
        config: the group, or null to do nothing.
        output: an empty folder.
        registration: manifest of `register_model`.
        promotion: manifest of `promote`.

    Returns:
        kind `mirror`; metadata `package` (ARN, empty where there is none), `approval`; counts `mirrored`.

    Raises:
        UserError: the packages for AWS are not installed, region, credentials or bucket are missing or refused, or the
            version's files are not what was registered.
    """
    arn = approval = ""
    if config.sagemaker is not None:
        if promotion.kind != "promotion":
            raise UserError(f"promotion: {promotion.uri} is of kind {promotion.kind}; give that of promote")
        outcome = str(promotion.metadata["outcome"])
        arn, approval = _mirror(config.sagemaker, output, registration, outcome, str(promotion.metadata["reason"]))
    (output / "mirror.json").write_text(json.dumps({"package": arn, "approval": approval}, indent=1) + "\n")
    if arn:
        tracking.set_tags({"modelmill.sagemaker_package": arn, "modelmill.sagemaker_approval": approval})
        logger.info("%s is %s", arn, approval)
    return StepResult("mirror", {"mirrored": int(bool(arn))}, metadata={"package": arn, "approval": approval})


def reject_package(arn: str, reason: str) -> None:
    """Reject a package by its ARN, which names its region.

    Raises:
        UserError: AWS cannot be reached or refuses.
    """
    with aws_trouble("sagemaker"):
        _set_approval(_get_package(arn, open_aws(arn.split(":")[3])), "Rejected", reason)


def _mirror(
    config: SageMakerConfig, output: Path, registration: Manifest, outcome: str, reason: str
) -> tuple[str, str]:
    """ARN and approval of a version's package, or two empty strings."""
    name, number = str(registration.metadata["name"]), str(registration.metadata["version"])
    with open_registry() as client:
        version = find_version(client, name, number)
        if version is None:
            raise UserError(
                f"registration: {name} version {number} is not in the registry any more; register it again"
            )
        with aws_trouble("sagemaker"):
            session = open_aws(config.region)
            package = find_package(config.group, FILES_TAG, _digest(version), session)
            approval = _approval(version, outcome, package)
            if package is None and not approval:
                return "", ""
            if package is None:
                folder = check_files(client, version, output.parent)
                data = _upload(config, version, folder, output.parent / "model.tar.gz", session)
                package = _create_package(config, version, data, approval, reason, session)
            elif approval:
                _set_approval(package, approval, reason)
            arn, found = str(package.model_package_arn), str(package.model_approval_status)
        if version.tags.get(PACKAGE_TAG) != arn:
            client.set_model_version_tag(name, number, PACKAGE_TAG, arn)
    return arn, found


def _approval(version: ModelVersion, outcome: str, package: ModelPackage | None) -> str:
    """Approval to give a package, or an empty string to leave it, or the group without it, as it is.

    What people decided in SageMaker since stands: only a promotion or a rollback overrules it.
    """
    if "rolled_back" in version.tags:
        return "Rejected" if package is not None else ""
    if package is None or outcome == "promoted":
        return _APPROVALS.get(outcome, "")
    waits = package.model_approval_status == "PendingManualApproval"
    return "Approved" if outcome == "already" and waits else ""


def open_aws(region: str | None, parameter: str = "sagemaker") -> Session:
    """A session, with the SDK whose resources are used here.

    Raises:
        UserError: the packages are not installed, or there is no region or no credentials.
    """
    try:
        import sagemaker.core.resources  # noqa: F401  (the extra brings it and boto3)
    except ModuleNotFoundError as error:
        raise UserError(f"{parameter}: {error.name} is not installed; pip install 'modelmill[aws]'") from None
    return open_session(region, parameter)


def pack(folder: Path, target: Path) -> None:
    """Pack a model's files as SageMaker's containers want them; equal files give equal bytes.

    Weights hardly shrink, so the lowest level of compression is used: it is a matter of minutes for a large model.
    """
    with (
        target.open("wb") as raw,
        gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0, compresslevel=1) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as archive,
    ):
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            entry = tarfile.TarInfo(path.relative_to(folder).as_posix())
            entry.size, entry.mode = path.stat().st_size, 0o644
            with path.open("rb") as file:
                archive.addfile(entry, file)


def _digest(version: ModelVersion) -> str:
    """What tells versions apart: the digest of their files, or of the weights where they are older than that tag."""
    return str(version.tags.get(FILES_TAG) or version.tags[WEIGHTS_TAG])


def _upload(config: SageMakerConfig, version: ModelVersion, folder: Path, scratch: Path, session: Session) -> str:
    """URI of the packed model below the digest of its files; uploaded unless it is there already."""
    from botocore.exceptions import ClientError

    bucket, prefix = split_s3(config.model_data, parameter="sagemaker.model_data")
    key = "/".join(part for part in (prefix, _digest(version), "model.tar.gz") if part)
    client = session.client("s3")
    try:
        client.head_object(Bucket=bucket, Key=key)
    except ClientError as error:
        if not is_missing(error):
            raise UserError(
                f"sagemaker.model_data: s3://{bucket}/{key}: {one_line(error)}; check bucket and rights"
            ) from None
        events.progress("packing the model")
        pack(folder, scratch)
        events.progress("uploading the model")
        try:
            client.upload_file(str(scratch), bucket, key)
        finally:
            scratch.unlink()
    return f"s3://{bucket}/{key}"


def find_package(group: str, fact: str, digest: str, session: Session) -> ModelPackage | None:
    """The newest package of a group one of whose facts is a digest.

    Each is asked for by its ARN: `ModelPackage.get_all` asks by name, and versions of a group have none of their own.
    """
    if not _has_group(group, session):
        return None
    pages = client(session, "sagemaker").get_paginator("list_model_packages")
    for page in pages.paginate(ModelPackageGroupName=group, SortBy="CreationTime", SortOrder="Descending"):
        for entry in page["ModelPackageSummaryList"]:
            package = _get_package(entry["ModelPackageArn"], session)
            facts = package.customer_metadata_properties
            if isinstance(facts, dict) and facts.get(fact) == digest:
                return package
    return None


def _has_group(group: str, session: Session) -> bool:
    from botocore.exceptions import ClientError
    from sagemaker.core.resources import ModelPackageGroup

    try:
        ModelPackageGroup.get(group, session=session, region=session.region_name)
    except ClientError as error:
        if is_missing(error):
            return False
        raise
    return True


def make_group(group: str, description: str, session: Session) -> None:
    """Make a model package group where there is none."""
    from sagemaker.core.resources import ModelPackageGroup

    if not _has_group(group, session):
        ModelPackageGroup.create(
            model_package_group_name=group,
            model_package_group_description=description,
            session=session,
            region=session.region_name,
        )


def _get_package(arn: str, session: Session) -> ModelPackage:
    from sagemaker.core.resources import ModelPackage

    package = ModelPackage.get(arn, session=session, region=session.region_name)
    assert package is not None
    return package


def _create_package(
    config: SageMakerConfig, version: ModelVersion, data: str, approval: str, reason: str, session: Session
) -> ModelPackage:
    """Make the package, through the SDK's client.

    Not by `ModelPackage.create`: in sagemaker-core 2.27 it takes the inference specification of a model card, which
    has no content types, and refuses that of a package.
    """
    from sagemaker.core.resources import ModelPackage

    make_group(config.group, f"Promoted versions of {version.name}", session)
    client = ModelPackage.get_sagemaker_client(
        session=session, region_name=session.region_name, service_name="sagemaker"
    )
    events.progress("making the model package")
    made = client.create_model_package(**package_request(config, version, data, approval, reason))
    return _get_package(made["ModelPackageArn"], session)


def package_request(
    config: SageMakerConfig, version: ModelVersion, data: str, approval: str, reason: str
) -> dict[str, Any]:
    """The request `CreateModelPackage` for a version.

    Args:
        config: group, container and what it takes.
        version: of the registry.
        data: URI of its packed files.
        approval: `Approved`, `PendingManualApproval` or `Rejected`.
        reason: of the promotion.
    """
    container: dict[str, Any] = {"Image": config.image, "ModelDataUrl": data}
    if config.environment:
        container["Environment"] = config.environment
    specification: dict[str, Any] = {
        "Containers": [container],
        "SupportedContentTypes": list(config.content_types),
        "SupportedResponseMIMETypes": list(config.response_types),
    }
    if config.instance_types:
        specification["SupportedRealtimeInferenceInstanceTypes"] = list(config.instance_types)
    return {
        "ModelPackageGroupName": config.group,
        "ModelPackageDescription": _plain(f"{version.name} version {version.version}. {reason}", 1024),
        "InferenceSpecification": specification,
        "ModelApprovalStatus": approval,
        "CustomerMetadataProperties": _facts(version),
        # A request that is sent twice, as after a lost answer, makes one package.
        "ClientToken": _digest(version)[:36],
    }


def _set_approval(package: ModelPackage, approval: str, reason: str) -> None:
    if package.model_approval_status == approval:
        return
    known: Any = package.customer_metadata_properties
    package.update(
        model_approval_status=approval,
        approval_description=_plain(reason, 1024),
        **({"customer_metadata_properties": known} if isinstance(known, dict) else {}),
    )


def _facts(version: ModelVersion) -> dict[str, str]:
    """What a package says about its model; SageMaker takes letters, digits, blanks and `_.:/=+-@`."""
    tags = version.tags
    names = (WEIGHTS_TAG, "dataset_digest", "base_digest", "method", "gate", "gate_digest", "gate_metric", "recipe")
    facts = {FILES_TAG: _digest(version), "mlflow_model": f"models:/{version.name}/{version.version}"}
    return facts | {name: _plain(tags[name], 256) for name in names if tags.get(name)}


def _plain(text: str, limit: int) -> str:
    """Text with nothing in it that SageMaker's patterns refuse."""
    kept = "".join(sign if sign.isalnum() or sign in " _.:/=+-@" else " " for sign in text)
    return " ".join(kept.split())[:limit]
