"""In SageMaker too the reaper ends what no live run of its own platform owns, and nothing that it is not sure of."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from modelmill.components.core.aws import client, open_session
from modelmill.components.core.errors import UserError
from modelmill.components.core.sagemaker import ADOPTED_TAG, EXPIRES_TAG, OWNER_TAG, OWNER_VARIABLE, RUN_TAG
from modelmill.components.launchers import reaper, reaper_sagemaker
from modelmill.components.launchers.sagemaker import StopRequests
from modelmill.components.training.launch import TrainingStoppedError
from tests.components.launchers.test_sagemaker import Case, Died
from tests.fakes.sagemaker_api import SageMakerService
from tests.fakes.sagemaker_tagged import arn_of
from tests.fakes.sagemaker_training import Job

OWNER = "team/modelmill"
NOW = datetime.now(UTC).replace(microsecond=0)
HOUR = timedelta(hours=1)
STATES: dict[str, Any] = {
    "r-failed": ("FAILED", NOW),
    "r-done": ("SUCCEEDED", NOW),
    "r-running": ("RUNNING", None),
    "r-canceling": ("CANCELING", None),
    "r-recent": ("CANCELED", NOW + 1.5 * HOUR),
    "r-gone": ("GONE", None),
    "r-error": OSError("503"),
}


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *_: 0)


def tags(run: str = "", owner: str = OWNER, **more: str) -> dict[str, str]:
    given = {RUN_TAG: run, OWNER_TAG: owner, **more}
    return {key: value for key, value in given.items() if value}


def job(
    aws: SageMakerService, name: str, run: str = "", owner: str = OWNER, status: str = "Training", **more: str
) -> None:
    aws.jobs[name] = Job({"TrainingJobName": name}, ["Completed"], "", NOW.timestamp(), [status])
    aws.tags[arn_of("training-job", name)] = tags(run, owner, **more)


def endpoint(aws: SageMakerService, name: str, run: str, status: str = "InService", **more: str) -> None:
    entry = {"request": {"EndpointConfigName": name}, "created": NOW.timestamp()}
    aws.endpoints[name], aws.endpoint_configs[name], aws.models[name] = {**entry, "plan": [status]}, entry, entry
    for kind in ("endpoint", "endpoint-config", "model"):
        aws.tags[arn_of(kind, name)] = tags(run, **more)


def reap(states: dict[str, Any] = STATES, **options: Any) -> tuple[list[str], dict[str, str]]:
    lines: list[str] = []

    def state_of(run: str) -> tuple[str, datetime | None]:
        if isinstance(states[run], Exception):
            raise states[run]
        return states[run]

    settings = {"grace": HOUR, "dry_run": False, "now": NOW + 2 * HOUR, "say": lines.append, **options}
    sagemaker = client(open_session(None, "sagemaker"), "sagemaker")
    removed = reaper_sagemaker.reap(sagemaker, OWNER, state_of, **settings)
    return removed, dict(line.split(": ", 1) for line in lines)


def stopped(aws: SageMakerService) -> list[str]:
    return sorted(name for name, each in aws.jobs.items() if each.stopping)


def test_each_job_gets_its_verdict(aws: SageMakerService) -> None:
    job(aws, "modelmill-lost", "r-failed")
    job(aws, "modelmill-deleted-run", "r-gone")
    job(aws, "modelmill-live", "r-running")
    job(aws, "modelmill-ending", "r-canceling")
    job(aws, "modelmill-recent", "r-recent")
    job(aws, "modelmill-adopted", "r-failed", **{ADOPTED_TAG: (NOW + 1.5 * HOUR).isoformat()})
    job(aws, "modelmill-undated", "r-failed", **{ADOPTED_TAG: "yesterday"})
    job(aws, "modelmill-zoneless", "r-failed", **{ADOPTED_TAG: "2020-01-01T00:00:00"})
    job(aws, "modelmill-unknown", "r-error")
    job(aws, "modelmill-by-hand")
    job(aws, "modelmill-over", "r-failed", status="Completed")
    would, _ = reap(dry_run=True)
    assert stopped(aws) == []
    removed, lines = reap()
    assert sorted(would) == sorted(removed) == stopped(aws) == ["modelmill-deleted-run", "modelmill-lost"]
    said = {name.removeprefix("TrainingJob modelmill-"): line for name, line in lines.items()}
    assert said["lost"] == f"stopped: run r-failed is FAILED since {NOW.isoformat()}"
    assert said["recent"] == "kept: run r-recent is CANCELED, for 30 minutes only"
    assert said["adopted"] == "kept: run r-failed is FAILED, for 30 minutes only"
    assert said["undated"] == "kept: its tag modelmill:adopted is 'yesterday', no time with a zone"
    assert said["zoneless"].endswith("no time with a zone")
    assert said["unknown"] == "kept: the state of run r-error is not known (503)"
    assert said["by-hand"].startswith("kept: belongs to no run")
    assert "over" not in said, "what has ended is not even looked at"


def test_nothing_of_another_platform_is_touched(aws: SageMakerService) -> None:
    """The run of another Kubeflow Pipelines is unknown here, which is no reason to end its job."""
    job(aws, "modelmill-theirs", "r-gone", owner="other/modelmill")
    job(aws, "modelmill-nobodys", "r-gone", owner="")
    job(aws, "their-modelmill-job", "r-gone")
    endpoint(aws, "modelmill-served", "r-gone", **{OWNER_TAG: "other/modelmill"})
    removed, lines = reap()
    assert (removed, lines, stopped(aws)) == ([], {}, [])
    assert len(aws.left()) == 3
    assert not {"StopTrainingJob", "DeleteEndpoint", "DeleteEndpointConfig", "DeleteModel"} & set(aws.calls)


def test_every_page_is_read(aws: SageMakerService) -> None:
    aws.page_size = 2
    for number in range(5):
        job(aws, f"modelmill-lost-{number}", "r-failed")
        endpoint(aws, f"modelmill-served-{number}", "r-failed", **{"a": "1", "b": "2"})
    removed, _ = reap()
    assert len(stopped(aws)) == 5
    assert len(removed) == 5 + 3 * 5
    assert aws.left() == sorted(f"modelmill-served-{number}" for number in range(5)), "AWS is deleting the endpoints"


def test_a_job_taken_over_in_that_moment_goes_on(aws: SageMakerService) -> None:
    job(aws, "modelmill-lost", "r-failed")

    def take_over(operation: str) -> None:
        if operation == "ListTags" and aws.calls.count("ListTags") == 1:
            aws.tags[arn_of("training-job", "modelmill-lost")][RUN_TAG] = "r-running"

    aws.on_call = take_over
    removed, lines = reap()
    assert removed == stopped(aws) == []
    assert lines == {"TrainingJob modelmill-lost": "kept: changed while it was looked at"}


@pytest.mark.parametrize("ending", ["Completed", "Stopping", "refused"])
def test_a_job_that_ends_in_that_moment_is_no_trouble(aws: SageMakerService, ending: str) -> None:
    job(aws, "modelmill-lost", "r-failed")

    def end(operation: str) -> None:
        if operation == "StopTrainingJob" and ending != "refused":
            aws.jobs["modelmill-lost"].history.append(ending)

    aws.on_call = end
    if ending == "refused":  # as AWS may answer for one that is stopping already
        aws.fail("StopTrainingJob", "ValidationException")
    _, lines = reap()
    expected = "stopped: run" if ending == "Stopping" else "kept: has ended by itself"
    assert lines["TrainingJob modelmill-lost"].startswith(expected)


def test_throttling_is_outlasted_or_left_to_the_next_look(aws: SageMakerService) -> None:
    job(aws, "modelmill-lost", "r-failed")
    endpoint(aws, "modelmill-served", "r-failed")
    for operation in ("ListTrainingJobs", "ListTags", "StopTrainingJob", "ListEndpoints", "DeleteEndpoint"):
        aws.fail(operation, "ThrottlingException", 3)
    removed, _ = reap()
    assert removed == ["modelmill-lost", *["modelmill-served"] * 3]
    job(aws, "modelmill-next", "r-failed")
    aws.fail("ListTags", "ThrottlingException", 9)
    lines: list[str] = []
    with pytest.raises(UserError, match="AWS refused or failed 1 times"):
        reap(say=lines.append)
    assert "modelmill-next" not in stopped(aws)
    assert "Rate exceeded" in lines[0] or "ThrottlingException" in lines[0]
    assert reap()[0] == ["modelmill-next"]


def test_what_aws_refuses_does_not_spare_the_rest(aws: SageMakerService) -> None:
    job(aws, "modelmill-first", "r-failed")
    job(aws, "modelmill-second", "r-failed")
    endpoint(aws, "modelmill-served", "r-failed")
    aws.fail("StopTrainingJob", "AccessDeniedException")
    aws.fail("ListEndpoints", "AccessDeniedException")
    lines: list[str] = []
    with pytest.raises(UserError, match="AWS refused or failed 2 times"):
        reap(say=lines.append)
    assert len(stopped(aws)) == 1
    assert lines[0].startswith("TrainingJob modelmill-second: kept: An error occurred (AccessDeniedException)")
    assert len(aws.left()) == 3, "configurations stay while nobody knows which endpoints there are"


@pytest.mark.parametrize(
    ("run", "expires", "status", "left"),
    [
        ("r-failed", "1", "InService", 0),
        ("r-done", "1", "InService", 0),
        ("r-gone", "1", "Failed", 0),
        ("r-running", "1", "InService", 3),
        ("r-recent", "1", "InService", 3),
        ("r-failed", "1", "Creating", 3),
        ("r-failed", "1", "Deleting", 0),
        ("r-failed", "never", "InService", 0),
        ("r-done", "never", "InService", 3),
        ("r-gone", "never", "InService", 3),
    ],
)
def test_endpoints_go_with_all_they_are_made_of(
    aws: SageMakerService, run: str, expires: str, status: str, left: int
) -> None:
    endpoint(aws, "modelmill-served", run, status, **{EXPIRES_TAG: expires})
    reap()
    reap()  # a deleted endpoint is seen once more
    assert len(aws.left()) == left


def test_the_command(
    aws: SageMakerService,
    pipelines: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    address, answers, _ = pipelines
    answers["a"] = 404, {"code": 5}
    job(aws, "modelmill-lost", "a")
    monkeypatch.setenv(reaper.ENDPOINT_VARIABLE, address)
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "none"))
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    given = ["--namespace", "modelmill", "--grace-minutes", "0"]
    assert reaper.main(given) == 2
    assert aws.calls == [], "off unless an owner is named"
    assert reaper.main([*given, "--sagemaker-owner", ""]) == 2
    assert "--sagemaker-owner: '' cannot be a tag" in capsys.readouterr().err
    assert reaper.main([*given, "--sagemaker-owner", OWNER, "--sagemaker-region", "eu-central-1"]) == 2
    told = capsys.readouterr()
    assert "KUBECONFIG: no access to Kubernetes" in told.err
    assert "TrainingJob modelmill-lost: stopped: run a is GONE" in told.out
    assert stopped(aws) == ["modelmill-lost"]


@pytest.fixture
def case(tmp_path: Path, request: pytest.FixtureRequest, aws: SageMakerService) -> Case:
    made = Case(tmp_path, request.node.name)
    made.results_of_every_job(aws)
    return made


def die(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """A launcher that is killed as soon as its job runs."""

    def wait(_self: Any, _seconds: float) -> None:
        raise Died

    with monkeypatch.context() as dying:
        dying.setattr(StopRequests, "wait", wait)
        with pytest.raises(Died):
            case.launch()


def test_the_job_of_a_killed_launcher_is_stopped(
    case: Case, aws: SageMakerService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODELMILL_RUN_ID", "r-failed")
    monkeypatch.setenv(OWNER_VARIABLE, OWNER)
    die(case, monkeypatch)
    assert reap({"r-failed": ("RUNNING", None)})[0] == []
    (name,) = aws.running()
    assert reap()[0] == [name]
    monkeypatch.setenv("MODELMILL_RUN_ID", "r-running")
    assert case.launch().metrics == {"loss": 1.5}
    assert len(aws.jobs) == 2, "the resumed run goes on from its checkpoints in a new job"


def test_a_resumed_run_takes_the_job_over(case: Case, aws: SageMakerService, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELMILL_RUN_ID", "r-failed")
    monkeypatch.setenv(OWNER_VARIABLE, OWNER)
    die(case, monkeypatch)
    monkeypatch.setenv("MODELMILL_RUN_ID", "r-running")
    looks: list[list[str]] = []
    wait = StopRequests.wait

    def look(self: StopRequests, seconds: float) -> None:
        looks.append(reap()[0])
        wait(self, seconds)

    monkeypatch.setattr(StopRequests, "wait", look)
    assert case.launch().metrics == {"loss": 1.5}
    assert looks
    assert not any(looks)
    assert len(aws.jobs) == 1
    (held,) = aws.tags.values()
    assert held[RUN_TAG] == "r-running"
    assert held["modelmill:launch"], "what it was tagged with stays"


def test_a_run_whose_job_the_reaper_stopped_in_spite_of_it_says_so(
    case: Case, aws: SageMakerService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The moment between the last look at the tags and the stop: nothing is lost, and the step says what to do."""
    monkeypatch.setenv("MODELMILL_RUN_ID", "r-failed")
    die(case, monkeypatch)
    (name,) = aws.jobs

    def stop(operation: str) -> None:
        if operation == "AddTags":
            aws.handle("StopTrainingJob", {"TrainingJobName": name})

    aws.on_call = stop
    with pytest.raises(TrainingStoppedError, match="its checkpoints are kept: run it again"):
        case.launch()


def test_what_runs_outside_of_pipelines_has_no_owner(
    case: Case, aws: SageMakerService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(OWNER_VARIABLE, OWNER)
    monkeypatch.delenv("MODELMILL_RUN_ID", raising=False)
    case.launch()
    (held,) = aws.tags.values()
    assert held.keys() == {"modelmill:launch"}
    monkeypatch.setenv("MODELMILL_RUN_ID", "r-running")
    monkeypatch.setenv(OWNER_VARIABLE, "team's")
    with pytest.raises(UserError, match=r"MODELMILL_OWNER: \"team's\" cannot be a tag"):
        Case(case.scratch.parent.parent / "other", case.prefix).launch()
