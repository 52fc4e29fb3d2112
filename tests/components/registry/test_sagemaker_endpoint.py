"""Endpoints of SageMaker: they answer as the model does, and no run leaves one behind however it ends."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from modelmill.components.core.errors import UserError
from modelmill.components.core.manifest import Manifest
from modelmill.components.core.step import StepResult
from modelmill.components.registry import sagemaker_deletion, sagemaker_endpoint
from modelmill.components.registry.config import FetchModelConfig
from modelmill.components.registry.fetch_model import fetch_model
from modelmill.components.registry.flavors import flavor_of
from modelmill.components.registry.sagemaker_deletion import delete_endpoint
from modelmill.components.registry.sagemaker_endpoint import StoppedError, deploy_endpoint, invoke_endpoint
from modelmill.components.registry.sagemaker_endpoint_config import EndpointConfig, InvokeConfig
from modelmill.components.registry.sagemaker_package import package_model, stage
from tests.components.forecasting import chronos_models
from tests.fakes.aws import BUCKET, objects
from tests.fakes.sagemaker_api import SageMakerService

EXAMPLE = {"request": {"inputs": ["a"]}, "answer": {"predictions": [{"item_id": "a", "0.5": 1.5}]}}


def section(**changes: Any) -> EndpointConfig:
    values = {
        "name": "served",
        "group": "served",
        "role": "arn:aws:iam::123456789012:role/serving",
        "image": "registry/cpu@sha256:" + "0" * 64,
        "model_data": f"s3://{BUCKET}/packed",
        "instance_type": "ml.c7i.xlarge",
    }
    return EndpointConfig.model_validate({**values, **changes})


def described(folder: Path, result: StepResult) -> Manifest:
    return Manifest.describe(folder, kind=result.kind, counts=result.counts, metadata=result.metadata)


class Run:
    """The steps of one run, each in a folder of its own."""

    def __init__(self, folder: Path, aws: SageMakerService, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        self.folder, self.aws, self.name, self._patch = folder, aws, name, monkeypatch
        self._made = 0

    def fresh(self) -> Path:
        self._patch.setenv("MODELMILL_RUN_ID", self.name)
        self._patch.setenv("MODELMILL_OWNER", "team")
        self._made += 1
        path = self.folder / f"{self.name}-{self._made}" / "data"
        path.mkdir(parents=True)
        return path

    def package(self) -> Manifest:
        """A package, as if a model had been packed."""
        folder = self.fresh()
        (folder / "example.json").write_text(json.dumps(EXAMPLE))
        arn = "arn:aws:sagemaker:eu-central-1:123456789012:model-package/served/1"
        self.aws.packages.setdefault(arn, {"ModelPackageGroupName": "served", "ModelPackageVersion": 1})
        return Manifest.describe(folder, kind="package", metadata={"package": arn, "flavor": "language-model"})

    def deploy(self, **changes: Any) -> Manifest:
        folder = self.fresh()
        return described(folder, deploy_endpoint(section(**changes), folder, package=self.package()))

    def invoke(self, package: Manifest, endpoint: Manifest, **changes: Any) -> Manifest:
        folder, config = self.fresh(), InvokeConfig(endpoint=section(**changes), requests=3)
        return described(folder, invoke_endpoint(config, folder, package=package, endpoint=endpoint))

    def delete(self, state: str = "SUCCEEDED", **changes: Any) -> dict[str, int]:
        return delete_endpoint(section(**changes), self.fresh(), status={"state": state}).counts


def answer(_model: dict[str, Any], body: bytes, _headers: Mapping[str, str]) -> tuple[int, str, bytes]:
    """The container of the packages above."""
    if json.loads(body) != EXAMPLE["request"]:
        return 400, "application/json", b'{"error": "no"}'
    return 200, "application/json", json.dumps(EXAMPLE["answer"]).encode()


@pytest.fixture
def run(tmp_path: Path, aws: SageMakerService, home: Any, monkeypatch: pytest.MonkeyPatch) -> Run:
    for module in (sagemaker_endpoint, sagemaker_deletion):
        monkeypatch.setattr(module, "_POLL_SECONDS", 0.001)
    aws.invoke = answer
    return Run(tmp_path, aws, monkeypatch, "run-1")


def test_a_run_deploys_tries_and_deletes(run: Run, aws: SageMakerService) -> None:
    aws.endpoint_plans.append(("Creating", "Creating", "InService"))
    endpoint = run.deploy()
    (name,) = aws.endpoints
    assert re.fullmatch(r"served-[0-9a-f]{12}", name)
    assert endpoint.metadata["endpoint"] == name
    assert aws.left() == [name] * 3
    assert {(tags["modelmill:run"], tags["modelmill:owner"]) for tags in aws.tags.values()} == {("run-1", "team")}
    again = run.deploy()
    assert again.metadata == endpoint.metadata
    assert aws.left() == [name] * 3, "once"
    assert run.invoke(run.package(), endpoint).counts == {"requests": 3}
    assert run.delete() == {"deleted": 3, "kept": 0}
    assert aws.left() == []
    assert run.delete("FAILED") == {"deleted": 0, "kept": 0}


def test_an_endpoint_is_kept_only_by_a_run_that_succeeded(run: Run, aws: SageMakerService) -> None:
    run.deploy(keep=True)
    assert run.delete(keep=True) == {"deleted": 0, "kept": 3}
    assert len(aws.left()) == 3
    assert run.delete("FAILED", keep=True) == {"deleted": 3, "kept": 0}
    assert aws.left() == []


def test_nothing_of_another_run_is_touched(
    run: Run, aws: SageMakerService, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    other = Run(tmp_path, aws, monkeypatch, "run-2")
    theirs = other.deploy().metadata["endpoint"]
    run.deploy()
    run.delete()
    assert aws.left() == [theirs] * 3


STAGES = ["CreateModel", "CreateEndpointConfig", "CreateEndpoint", "DescribeEndpoint", "InvokeEndpoint"]


def at(aws: SageMakerService, stage: str, act: Any) -> None:
    """Do something when an operation is called for the first time once the model exists, or is being made."""
    done: list[str] = []

    def watch(operation: str) -> None:
        if operation == stage and not done and (aws.models or stage == "CreateModel"):
            done.append(operation)
            act()

    aws.on_call = watch


@pytest.mark.parametrize("stage", STAGES)
def test_a_step_that_is_cancelled_deletes_what_it_made(run: Run, aws: SageMakerService, stage: str) -> None:
    at(aws, stage, lambda: os.kill(os.getpid(), signal.SIGTERM))
    aws.endpoint_plans.append(("Creating", "Creating", "Creating", "InService"))
    with pytest.raises(StoppedError):
        run.deploy()
    # What AWS did after the step had stopped listening falls to the exit handler.
    run.delete("FAILED")
    assert aws.left() == []
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize("stage", STAGES[1:4])
def test_what_a_killed_step_made_falls_to_the_exit_handler_or_to_its_retry(
    run: Run, aws: SageMakerService, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    aws.endpoint_plans += [("Creating", "Creating", "InService")] * 2
    with monkeypatch.context() as killed:
        killed.setattr(sagemaker_endpoint, "_delete_all", lambda *_: None)
        at(aws, stage, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(StoppedError):
            run.deploy()
    aws.on_call = None
    time.sleep(0.05)  # for the request that was under way
    run.deploy()
    assert len(aws.left()) == 3
    with monkeypatch.context() as killed:
        killed.setattr(sagemaker_endpoint, "_delete_all", lambda *_: None)
        at(aws, "DescribeEndpoint", lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(StoppedError):
            run.deploy()
    assert run.delete("FAILED")["deleted"] == 3
    assert aws.left() == []


def test_an_endpoint_that_fails_is_explained_and_deleted(run: Run, aws: SageMakerService) -> None:
    aws.endpoint_plans.append(("Creating", "Failed"))
    with pytest.raises(UserError, match=r"is Failed and not in service \(The container did not pass the ping\)"):
        run.deploy()
    assert aws.left() == []


def test_one_that_takes_too_long_is_deleted_as_soon_as_that_is_possible(run: Run, aws: SageMakerService) -> None:
    aws.endpoint_plans.append(("Creating",) * 100_000)
    created = aws._DeleteEndpoint

    def deletable(request: dict[str, Any]) -> dict[str, Any]:
        if aws.calls.count("DeleteEndpoint") == 1:
            aws.endpoints[request["EndpointName"]]["plan"] = ["Creating", "Creating", "InService"]
        return created(request)

    aws._DeleteEndpoint = deletable  # type: ignore[method-assign]
    with pytest.raises(UserError, match=r"endpoint.timeout_seconds: .* within 1 seconds"):
        run.deploy(timeout_seconds=1)
    assert aws.left() == []
    assert aws.calls.count("DeleteEndpoint") > 1


def test_what_an_attempt_left_half_deleted_is_made_anew(run: Run, aws: SageMakerService) -> None:
    run.deploy()
    (name,) = aws.endpoints
    aws.endpoints[name]["plan"] = ["Deleting"]
    del aws.models[name]
    assert run.deploy().metadata["endpoint"] == name
    assert len(aws.left()) == 3


@pytest.mark.parametrize(
    ("kind", "body", "words"),
    [
        ("application/json", {"predictions": [{"item_id": "a", "0.5": 2.5}]}, r"answer.predictions\[0\].0.5: 2.5"),
        ("application/json", {"predictions": []}, "0 and not 1 entries"),
        ("text/csv", EXAMPLE["answer"], "answers text/csv, its package declares application/json"),
    ],
    ids=["value", "length", "type"],
)
def test_another_answer_than_the_models_is_refused(
    run: Run, aws: SageMakerService, kind: str, body: dict[str, Any], words: str
) -> None:
    aws.invoke = lambda *_: (200, kind, json.dumps(body).encode())
    with pytest.raises(UserError, match=words):
        run.deploy()
    assert aws.left() == []


def test_an_endpoint_that_answers_nonsense_is_refused_and_one_of_a_resumed_run_is_made_again(
    run: Run, aws: SageMakerService, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    package, endpoint = run.package(), run.deploy()
    run.delete()
    resumed = Run(tmp_path, aws, monkeypatch, "run-2")
    resumed.invoke(package, endpoint)
    assert resumed.delete() == {"deleted": 3, "kept": 0}
    aws.invoke = lambda *_: (200, "application/json", json.dumps(EXAMPLE["answer"]).encode())
    with pytest.raises(UserError, match="answers a request that makes no sense"):
        resumed.invoke(package, endpoint)
    assert aws.left() == []


def test_deletion_outlasts_throttling(run: Run, aws: SageMakerService, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *_: 0)
    run.deploy()
    for operation in ("ListEndpoints", "ListTags", "DeleteEndpoint", "DeleteModel"):
        aws.fail(operation, "ThrottlingException", 10)
    aws.fail("DeleteEndpointConfig", "InternalFailure", 1, before=False, status=500)
    assert run.delete("FAILED")["deleted"] == 3
    assert aws.left() == []


def test_what_cannot_be_deleted_is_named(run: Run, aws: SageMakerService, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sagemaker_deletion, "_SECONDS", 0.1)
    run.deploy()
    (name,) = aws.endpoints
    aws.endpoints[name]["plan"] = ["Creating"]
    with pytest.raises(UserError, match=f"Endpoint {name} cannot be deleted within 0 seconds"):
        run.delete("FAILED")


def test_the_clean_up_deletes_what_has_expired(
    run: Run, aws: SageMakerService, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    kept = Run(tmp_path, aws, monkeypatch, "run-2").deploy(keep=True).metadata["endpoint"]
    gone = run.deploy().metadata["endpoint"]
    assert sagemaker_deletion.main([]) == 0
    assert capsys.readouterr().out == "nothing to delete\n"
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 7 * 3600)
    assert sagemaker_deletion.main(["--region", "eu-central-1"]) == 0
    assert capsys.readouterr().out == f"deleted {gone}\n" * 3
    assert aws.left() == [kept] * 3


def test_the_account_must_be_given(run: Run, aws: SageMakerService) -> None:
    with pytest.raises(UserError, match=r"endpoint.role: '' is none; set it with --set endpoint.role="):
        run.deploy(role="")
    aws.fail("CreateEndpoint", "ResourceLimitExceeded")
    with pytest.raises(UserError, match=r"endpoint.instance_type: the account's quota for ml\.c7i\.xlarge"):
        run.deploy()
    assert aws.left() == []


@pytest.fixture(scope="module")
def forecaster(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    folder = tmp_path_factory.mktemp("bolt")
    model = chronos_models.bolt(folder)
    return model.model_copy(update={"metadata": {**model.metadata, "flavor": "forecaster"}})


class Container:
    """The serving container: the packed model, served by the file that travels with it."""

    def __init__(self, folder: Path) -> None:
        environment = {**os.environ, "SM_MODEL_DIR": str(folder), "SAGEMAKER_BIND_TO_PORT": "0"}
        command = [sys.executable, str(folder / "code" / "sagemaker_serving.py")]
        self.process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=folder
        )
        assert self.process.stdout is not None
        self.url = f"http://127.0.0.1:{self.process.stdout.readline().split()[-1]}"

    def ask(self, path: str, body: bytes | None = None, **headers: str) -> tuple[int, str, bytes]:
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        try:
            with urllib.request.urlopen(urllib.request.Request(self.url + path, body, given), timeout=60) as found:
                return found.status, found.headers["Content-Type"], found.read()
        except urllib.error.HTTPError as error:
            return error.code, error.headers["Content-Type"], error.read()

    def stop(self) -> int:
        self.process.terminate()
        return self.process.wait(30)


@pytest.fixture(scope="module")
def container(forecaster: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Container]:
    folder = stage(forecaster, flavor_of(forecaster)[1], tmp_path_factory.mktemp("staged") / "model")
    started = Container(folder)
    yield started
    assert started.stop() == 0


def test_the_container_speaks_as_sagemaker_asks(container: Container) -> None:
    good = json.dumps({"dataframe_records": flavor_records(), "params": {"horizon": 2}}).encode()
    assert container.ask("/ping")[0] == 200
    status, kind, body = container.ask("/invocations", good, Content_Type="application/json", Accept="*/*")
    assert (status, kind) == (200, "application/json")
    (first, _) = json.loads(body)["predictions"]
    assert (first["item_id"], first["timestamp"]) == ("a", "2024-01-29T00:00:00")
    assert sorted(set(first) - {"item_id", "timestamp"}) == [f"0.{level}" for level in range(1, 10)]
    for body, kind, status in (
        (good, "text/csv", 415),
        (b"{", "application/json", 400),
        (b'{"instances": []}', "application/json", 400),
        (b'{"dataframe_records": [{"item_id": "a"}]}', "application/json", 400),
        (b'{"dataframe_records": 1}', "application/json", 400),
    ):
        found = container.ask("/invocations", body, Content_Type=kind)
        assert found[0] == status
        assert json.loads(found[2])["error"]
    assert container.ask("/invocations", good, Content_Type="application/json", Accept="text/csv")[0] == 406
    assert container.ask("/elsewhere", good)[0] == 404


def flavor_records() -> list[dict[str, Any]]:
    from modelmill.components.registry.flavors import FLAVORS

    return FLAVORS["forecaster"].example


def test_a_forecaster_is_packed_and_served(
    run: Run, aws: SageMakerService, forecaster: Manifest, container: Container, tmp_path: Path
) -> None:
    folder = run.fresh()
    config = FetchModelConfig(reference=str(Path(forecaster.uri) / "model"))
    fetched = described(folder, fetch_model(config, folder))
    assert fetched.metadata["flavor"] == "forecaster"
    folder = run.fresh()
    package = described(folder, package_model(section(), folder, model=fetched))
    again = run.fresh()
    assert package_model(section(), again, model=fetched).metadata == package.metadata
    (made,) = aws.packages.values()
    specification = made["InferenceSpecification"]
    for name in ("SupportedContentTypes", "SupportedResponseMIMETypes"):
        assert specification[name] == ["application/json"]
    (packed,) = objects("packed/").values()
    (tmp_path / "model.tar.gz").write_bytes(packed)
    with tarfile.open(tmp_path / "model.tar.gz") as archive:
        names = set(archive.getnames())
    assert {"config.json", "model.safetensors", "code/loader.py", "code/sagemaker_serving.py"} <= names

    def invoke(_model: dict[str, Any], body: bytes, headers: Mapping[str, str]) -> tuple[int, str, bytes]:
        asked = {name.replace("-", "_"): headers[name] for name in ("Content-Type", "Accept") if headers.get(name)}
        return container.ask("/invocations", body, **asked)

    aws.invoke = invoke
    folder = run.fresh()
    endpoint = described(folder, deploy_endpoint(section(), folder, package=package))
    assert run.invoke(package, endpoint).counts == {"requests": 3}
    assert run.delete() == {"deleted": 3, "kept": 0}
    assert aws.left() == []


def test_what_is_not_served_there_is_refused(run: Run, forecaster: Manifest) -> None:
    other = forecaster.model_copy(update={"metadata": {"flavor": "embedding"}})
    with pytest.raises(UserError, match="its flavor 'embedding' is not served by SageMaker here"):
        package_model(section(), run.fresh(), model=other)
