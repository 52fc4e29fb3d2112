"""Steps `deploy_endpoint` and `invoke_endpoint`: a model package behind a SageMaker endpoint that belongs to one run.

Model, endpoint configuration and endpoint carry the run's id as a tag and its digest in their name, so that making
them twice makes them once, and deleting them touches nothing of another run.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import signal
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelmill.components.core import events, tracking
from modelmill.components.core.aws import aws_trouble, client, error_code, is_missing, open_session
from modelmill.components.core.errors import UserError
from modelmill.components.core.manifest import Manifest
from modelmill.components.core.sagemaker import EXPIRES_TAG, RUN_TAG, owner_tags
from modelmill.components.core.step import StepResult, step_options
from modelmill.components.registry.sagemaker_deletion import delete_of_run
from modelmill.components.registry.sagemaker_endpoint_config import EndpointConfig, InvokeConfig
from modelmill.components.registry.sagemaker_names import current_run
from modelmill.components.registry.sagemaker_package import EXAMPLE
from modelmill.components.registry.sagemaker_serving import CONTENT_TYPE

_PARAMETER = "endpoint"
_POLL_SECONDS = 5.0
_USABLE = ("InService", "Creating", "Updating", "SystemUpdating")
_TOLERANCE = 1e-3  # relative: other processors sum in another order
logger = logging.getLogger("modelmill")


class StoppedError(BaseException):
    """The step was told to stop; what it made is deleted again. No Exception, as botocore would try again on those."""


@dataclass(frozen=True)
class Deployment:
    """What one run deploys.

    Attributes:
        config: of the endpoint.
        package: ARN of the model package.
        run: id of the run.
    """

    config: EndpointConfig
    package: str
    run: str

    @property
    def name(self) -> str:
        """Of the model, the endpoint configuration and the endpoint alike."""
        return f"{self.config.name}-{hashlib.sha256(self.run.encode()).hexdigest()[:12]}"

    def tags(self) -> list[dict[str, str]]:
        expires = "never" if self.config.keep else str(int(time.time()) + 3600 * self.config.max_hours)
        tags = {RUN_TAG: self.run[:256], EXPIRES_TAG: expires, **owner_tags()}
        return [{"Key": key, "Value": value} for key, value in tags.items()]

    def requests(self) -> list[tuple[str, dict[str, Any]]]:
        """Operations and their requests, in order."""
        config, name, tags = self.config, self.name, self.tags()
        variant = {
            "VariantName": "all",
            "ModelName": name,
            "InitialInstanceCount": config.instance_count,
            "InstanceType": config.instance_type,
        }
        return [
            (
                "create_model",
                {
                    "ModelName": name,
                    "ExecutionRoleArn": config.role,
                    "PrimaryContainer": {"ModelPackageName": self.package},
                    "Tags": tags,
                },
            ),
            (
                "create_endpoint_config",
                {"EndpointConfigName": name, "ProductionVariants": [variant], "Tags": tags},
            ),
            ("create_endpoint", {"EndpointName": name, "EndpointConfigName": name, "Tags": tags}),
        ]


@step_options(reuse=False)
def deploy_endpoint(config: EndpointConfig, output: Path, *, package: Manifest) -> StepResult:
    """Serve a model package and see that it answers as it did when it was packed.

    Whatever goes wrong, and SIGTERM too, has everything deleted again. Repeating the step finds what it made.

    Args:
        config: of the endpoint.
        output: an empty folder.
        package: manifest of `package_model`.

    Returns:
        kind `endpoint`; metadata `endpoint` (name), `package`, `weights_digest`; metrics `deploy_seconds`.

    Raises:
        UserError: AWS refuses, the endpoint fails or does not serve in time, or it answers something else.
    """
    began = time.monotonic()
    with _serving(config, package) as (deployment, runtime):
        _check_answer(runtime, deployment.name, _example(package))
    logger.info("%s serves %s", deployment.name, deployment.package)
    tracking.set_tags({"modelmill.sagemaker_endpoint": deployment.name})
    (output / "endpoint.json").write_text(json.dumps({"package": deployment.package}, indent=1) + "\n")
    metadata = {
        "endpoint": deployment.name,
        "package": deployment.package,
        "weights_digest": package.metadata.get("weights_digest"),
    }
    return StepResult("endpoint", metadata=metadata, metrics={"deploy_seconds": time.monotonic() - began})


@step_options(reuse=False)
def invoke_endpoint(config: InvokeConfig, output: Path, *, package: Manifest, endpoint: Manifest) -> StepResult:
    """Ask the endpoint again and again, and for nonsense, which it must refuse without falling over.

    Args:
        config: the endpoint and how often.
        output: an empty folder.
        package: manifest of `package_model`.
        endpoint: manifest of `deploy_endpoint`. A run that is resumed gets an endpoint of its own here, as its
            predecessor's is deleted.

    Returns:
        kind `invocations`; counts `requests`; metrics `median_seconds`, `slowest_seconds`.

    Raises:
        UserError: as of `deploy_endpoint`, or nonsense is answered as if it made sense.
    """
    if endpoint.metadata["package"] != package.metadata["package"]:
        raise UserError("endpoint: it serves another package; give the steps the output of one package_model")
    example = _example(package)
    seconds = []
    with _serving(config.endpoint, package) as (deployment, runtime):
        for number in range(config.requests):
            began = time.monotonic()
            _check_answer(runtime, deployment.name, example)
            seconds.append(time.monotonic() - began)
            events.progress("invoking the endpoint", number + 1, config.requests)
        _check_refusal(runtime, deployment.name)
    metrics = {"median_seconds": statistics.median(seconds), "slowest_seconds": max(seconds)}
    (output / "invocations.json").write_text(json.dumps({"requests": config.requests}) + "\n")
    return StepResult("invocations", counts={"requests": config.requests}, metrics=metrics)


@contextmanager
def _serving(config: EndpointConfig, package: Manifest) -> Iterator[tuple[Deployment, Any]]:
    """The deployment of this run, serving, and a client of the runtime; all is deleted where anything goes wrong."""
    config.require_account()
    deployment = Deployment(config, str(package.metadata["package"]), current_run())
    with aws_trouble(_PARAMETER), _sigterm_raises():
        session = open_session(config.region, _PARAMETER)
        sagemaker = client(session, "sagemaker")
        try:
            if _is_unusable(deployment, sagemaker):  # left by an attempt that failed or was being deleted
                _delete_all(deployment, sagemaker)
            _create(deployment, sagemaker)
            _wait(deployment, sagemaker)
            yield deployment, client(session, "sagemaker-runtime")
        except BaseException:
            with _sigterm_is_late():
                _delete_all(deployment, sagemaker)
            raise


def _delete_all(deployment: Deployment, sagemaker: Any) -> None:
    delete_of_run(sagemaker, deployment.config.name, deployment.run)


def _is_unusable(deployment: Deployment, sagemaker: Any) -> bool:
    try:
        status = sagemaker.describe_endpoint(EndpointName=deployment.name)["EndpointStatus"]
    except Exception as error:
        if is_missing(error):
            return False
        raise
    return status not in _USABLE


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    """Turn SIGTERM into an error, so that a step that is cancelled cleans up."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(_number: int, _frame: object) -> None:
        raise StoppedError("the step was told to stop")

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _sigterm_is_late() -> Iterator[None]:
    """Finish the deletion that a first SIGTERM has begun."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _create(deployment: Deployment, sagemaker: Any) -> None:
    """Make what does not exist yet."""
    for operation, request in deployment.requests():
        events.progress(operation.replace("_", " "))
        try:
            getattr(sagemaker, operation)(**request)
        except Exception as error:
            if error_code(error) == "ResourceLimitExceeded":
                raise UserError(
                    f"endpoint.instance_type: the account's quota for {deployment.config.instance_type} is used up;"
                    " ask AWS to raise it under Service Quotas, or choose another type"
                ) from None
            if "already existing" not in str(error):
                raise


def _wait(deployment: Deployment, sagemaker: Any) -> None:
    """Wait until the endpoint serves.

    Raises:
        UserError: it failed, or the time is over.
    """
    config, deadline = deployment.config, time.monotonic() + deployment.config.timeout_seconds
    while True:
        description = sagemaker.describe_endpoint(EndpointName=deployment.name)
        status = description["EndpointStatus"]
        if status == "InService":
            return
        if status not in _USABLE:
            reason = description.get("FailureReason", "no reason was given")
            raise UserError(
                f"endpoint: {deployment.name} is {status} and not in service ({reason}); look at its log group"
                f" /aws/sagemaker/Endpoints/{deployment.name}, mend image, role or model and run again"
            )
        if time.monotonic() >= deadline:
            raise UserError(
                f"endpoint.timeout_seconds: {deployment.name} was not in service within {config.timeout_seconds}"
                " seconds and is deleted; raise it, or check the image"
            )
        events.progress(f"the endpoint is {status.lower()}")
        time.sleep(_POLL_SECONDS)


def _example(package: Manifest) -> dict[str, Any]:
    return json.loads(package.path(EXAMPLE).read_bytes())


def _check_answer(runtime: Any, name: str, example: dict[str, Any]) -> None:
    """Invoke with the input example.

    Raises:
        UserError: the answer is not what the same model gave when it was packed.
    """
    body = json.dumps(example["request"]).encode()
    answer = runtime.invoke_endpoint(EndpointName=name, Body=body, ContentType=CONTENT_TYPE, Accept=CONTENT_TYPE)
    kind = str(answer["ContentType"]).partition(";")[0]
    if kind != CONTENT_TYPE:
        raise UserError(f"endpoint: {name} answers {kind}, its package declares {CONTENT_TYPE}; use the image of ours")
    if difference := _difference(json.loads(answer["Body"].read()), example["answer"], "answer"):
        raise UserError(
            f"endpoint: {name} answers the input example otherwise than the model did when it was packed"
            f" ({difference}); check that the image's packages are those of the model"
        )


def _check_refusal(runtime: Any, name: str) -> None:
    try:
        runtime.invoke_endpoint(EndpointName=name, Body=b'{"columns": [1]}', ContentType=CONTENT_TYPE)
    except Exception as error:
        if error_code(error) != "ModelError":
            raise
    else:
        raise UserError(f"endpoint: {name} answers a request that makes no sense; use the image of ours")


def _difference(found: Any, expected: Any, place: str) -> str:
    """The first place where two JSON values differ by more than rounding, or an empty string."""
    if isinstance(expected, float) and isinstance(found, (int, float)):
        return "" if math.isclose(found, expected, rel_tol=_TOLERANCE, abs_tol=_TOLERANCE) else f"{place}: {found}"
    if type(found) is not type(expected):
        return f"{place}: {found!r}"
    if isinstance(expected, dict):
        if set(found) != set(expected):
            return f"{place}: the fields {', '.join(sorted(set(found) ^ set(expected)))}"
        parts = [_difference(found[name], expected[name], f"{place}.{name}") for name in expected]
    elif isinstance(expected, list):
        if len(found) != len(expected):
            return f"{place}: {len(found)} and not {len(expected)} entries"
        parts = [_difference(*pair, f"{place}[{n}]") for n, pair in enumerate(zip(found, expected, strict=True))]
    else:
        return "" if found == expected else f"{place}: {found!r}"
    return next((part for part in parts if part), "")
