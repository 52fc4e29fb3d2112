"""Step `package_model`: a model as SageMaker serves it, with the code that serves it, in the model registry."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelmill.components.core import events, tracking
from modelmill.components.core.aws import aws_trouble, client, is_missing
from modelmill.components.core.errors import UserError
from modelmill.components.core.manifest import Manifest, file_digest, json_digest
from modelmill.components.core.model_folder import model_folder
from modelmill.components.core.step import StepResult, step_options
from modelmill.components.core.uri import split_s3
from modelmill.components.registry import sagemaker_serving
from modelmill.components.registry.flavors import Flavor, flavor_of
from modelmill.components.registry.sagemaker_endpoint_config import EndpointConfig
from modelmill.components.registry.sagemaker_mirror import find_package, make_group, open_aws, pack

if TYPE_CHECKING:
    from boto3.session import Session

EXAMPLE = "example.json"
_DIGEST = "package_digest"
_SERVED = {"forecaster": "dataframe_records", "language-model": "inputs"}
_PARAMS: dict[str, dict[str, Any]] = {"forecaster": {"horizon": 8}, "language-model": {"max_new_tokens": 8}}
logger = logging.getLogger("modelmill")


@step_options(reuse=False, device=True)
def package_model(config: EndpointConfig, output: Path, *, model: Manifest) -> StepResult:
    """Pack a model with its serving code, put it into S3, and make a model package of it.

    The packed model answers its flavor's input example here first; `example.json` holds request and answer, which the
    endpoint must repeat. The same files, code and container are one package, found by their digest.

    Args:
        config: group, image and where the packed models lie.
        output: an empty folder.
        model: manifest of `fetch_model` or of a training step.

    Returns:
        kind `package`; metadata `package` (ARN), `model_data` (URI), `flavor`, `weights_digest`.

    Raises:
        UserError: the flavor cannot be served there, the packages for AWS are not installed, or AWS refuses.
    """
    config.require_account()
    name, flavor = flavor_of(model)
    if name not in _SERVED:
        raise UserError(f"model: its flavor {name!r} is not served by SageMaker here; it serves {', '.join(_SERVED)}")
    staged = stage(model, flavor, output.parent / "staged")
    request = {_SERVED[name]: flavor.example, "params": _PARAMS[name]}
    events.progress("answering the input example")
    answer = sagemaker_serving.Served(staged).answer(json.dumps(request).encode())
    example = {"request": request, "answer": json.loads(answer)}
    (output / EXAMPLE).write_text(json.dumps(example, indent=1) + "\n")
    files = {path.relative_to(staged).as_posix(): file_digest(path) for path in staged.rglob("*") if path.is_file()}
    with aws_trouble("endpoint"):
        session = open_aws(config.region, "endpoint")
        data = _upload(config, staged, json_digest(files), output.parent / "model.tar.gz", session)
        arn = _package(config, model, name, data, session)
    shutil.rmtree(staged)
    logger.info("%s serves %s", arn, data)
    tracking.set_tags({"modelmill.sagemaker_package": arn})
    metadata = {"package": arn, "model_data": data, "flavor": name}
    return StepResult(
        "package", {"files": len(files)}, metadata={**metadata, "weights_digest": model.metadata.get("weights_digest")}
    )


def stage(model: Manifest, flavor: Flavor, folder: Path) -> Path:
    """The model data as it will lie in the container: the model's files, and `code/` with loader and server.

    Args:
        model: manifest with `model/`.
        flavor: of the model.
        folder: to make anew.
    """
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(model_folder(model), folder, copy_function=_take)
    code = folder / "code"
    code.mkdir(exist_ok=True)
    shutil.copyfile(flavor.loader(), code / sagemaker_serving.LOADER)
    shutil.copyfile(sagemaker_serving.__file__, code / Path(sagemaker_serving.__file__).name)
    (code / "requirements.txt").write_text("".join(f"{name}\n" for name in flavor.requirements))
    return folder


def _take(source: str, target: str) -> str:
    """Link a file, or copy it where that cannot be."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
    return target


def _upload(config: EndpointConfig, staged: Path, digest: str, scratch: Path, session: Session) -> str:
    """URI of the packed model below the digest of its files; uploaded unless it is there already."""
    bucket, prefix = split_s3(config.model_data, parameter="endpoint.model_data")
    key = "/".join(part for part in (prefix, digest[:32], "model.tar.gz") if part)
    s3 = client(session, "s3")
    try:
        s3.head_object(Bucket=bucket, Key=key)
    except Exception as error:
        if not is_missing(error):
            raise
        events.progress("packing the model")
        pack(staged, scratch)
        events.progress("uploading the model")
        try:
            s3.upload_file(str(scratch), bucket, key)
        finally:
            scratch.unlink()
    return f"s3://{bucket}/{key}"


def _package(config: EndpointConfig, model: Manifest, flavor: str, data: str, session: Session) -> str:
    request = package_request(config, model, flavor, data)
    digest = json_digest(request["InferenceSpecification"])
    found = find_package(config.group, _DIGEST, digest, session)
    if found is not None:
        return str(found.model_package_arn)
    make_group(config.group, f"Models that {config.name} serves", session)
    request["CustomerMetadataProperties"] = {**request["CustomerMetadataProperties"], _DIGEST: digest}
    made = client(session, "sagemaker").create_model_package(**request, ClientToken=digest[:36])
    return str(made["ModelPackageArn"])


def package_request(config: EndpointConfig, model: Manifest, flavor: str, data: str) -> dict[str, Any]:
    """The request `CreateModelPackage`, without the token that makes it once.

    Args:
        config: group and container.
        model: what is packed.
        flavor: of the model.
        data: URI of the packed files.
    """
    container: dict[str, Any] = {"Image": config.image, "ModelDataUrl": data}
    if config.environment:
        container["Environment"] = dict(config.environment)
    digest = str(model.metadata.get("weights_digest") or "")
    return {
        "ModelPackageGroupName": config.group,
        "ModelPackageDescription": f"A {flavor} with the weights {digest[:16]}",
        "InferenceSpecification": {
            "Containers": [container],
            "SupportedContentTypes": [sagemaker_serving.CONTENT_TYPE],
            "SupportedResponseMIMETypes": [sagemaker_serving.CONTENT_TYPE],
            "SupportedRealtimeInferenceInstanceTypes": [config.instance_type],
        },
        "ModelApprovalStatus": "Approved",
        "CustomerMetadataProperties": {"weights_digest": digest, "flavor": flavor} if digest else {"flavor": flavor},
    }
