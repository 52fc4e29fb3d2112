"""The SageMaker launcher: one job whatever becomes of its launcher, endings in words, results through S3."""

from __future__ import annotations

import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from modelmill.components.core import events
from modelmill.components.core.errors import UserError
from modelmill.components.launchers.sagemaker import SageMakerLauncher, StopRequests
from modelmill.components.launchers.sagemaker_ending import ending
from modelmill.components.launchers.sagemaker_files import JobFiles
from modelmill.components.training.launch import (
    LAUNCHER_VARIABLE,
    RankFailedError,
    TrainingJob,
    TrainingResult,
    TrainingStoppedError,
    current_launcher,
)
from tests.components.launchers.sagemaker_sections import config
from tests.components.training.samples import training_config
from tests.fakes.aws import BUCKET, objects, s3
from tests.fakes.sagemaker_api import SageMakerService
from tests.fakes.sagemaker_training import PLAN


class Case:
    """A step's folder with an input beside it, and launches of its job."""

    def __init__(self, folder: Path, prefix: str) -> None:
        self.scratch, self.prefix = folder / "store" / "key.partial", prefix
        (self.scratch / "data").mkdir(parents=True)
        (folder / "rows").mkdir()
        (folder / "rows" / "train.bin").write_bytes(b"rows")
        self.spec = {"rows": {"uri": str(folder / "rows")}, "output": str(self.scratch / "data"), "name": "/a/label"}
        self.training = training_config()

    def job(self) -> TrainingJob:
        return TrainingJob("a.module.pretrain", self.spec, self.training, self.scratch)

    def launch(self, **changes: Any) -> TrainingResult:
        return SageMakerLauncher(config(self.prefix, **changes), poll_seconds=0.001).launch(self.job())

    def leave_result(self, name: str, loss: float = 1.5) -> None:
        """What the container of a job would have uploaded."""
        launch = name.removeprefix("modelmill-").rpartition("-")[0]
        place = f"{self.prefix}/jobs/{launch}/results/{name}/output/model"
        result = TrainingResult(counts={"steps": 3}, metrics={"loss": loss}).model_dump_json()
        client = s3()
        client.put_object(Bucket=BUCKET, Key=f"{place}/result.json", Body=result.encode())
        client.put_object(Bucket=BUCKET, Key=f"{place}/data/model/weights", Body=name.encode())

    def results_of_every_job(self, service: SageMakerService) -> None:
        """Have each job leave a result as soon as it is created."""

        def watch(_operation: str) -> None:
            for name in [name for name, job in service.jobs.items() if job.secondary == "Uploading"]:
                self.leave_result(name)

        service.on_call = watch


@pytest.fixture
def case(tmp_path: Path, request: pytest.FixtureRequest, aws: SageMakerService) -> Case:
    made = Case(tmp_path, request.node.name.replace("[", "-").replace("]", ""))
    made.results_of_every_job(aws)
    return made


def test_a_job_runs_and_its_result_comes_back(case: Case, aws: SageMakerService) -> None:
    result = case.launch(environment={"NCCL_DEBUG": "WARN"}, spot=True, subnets=["subnet-1"], security_groups=["sg-1"])
    assert (result.counts, result.metrics) == ({"steps": 3}, {"loss": 1.5})
    (name,) = aws.jobs
    assert (case.scratch / "data" / "model" / "weights").read_text() == name
    request = aws.jobs[name].request
    assert request["AlgorithmSpecification"]["ContainerEntrypoint"][-1] == (
        "modelmill.components.launchers.sagemaker_entry"
    )
    assert request["CheckpointConfig"]["LocalPath"] == "/opt/ml/checkpoints"
    assert request["StoppingCondition"] == {"MaxRuntimeInSeconds": 86400, "MaxWaitTimeInSeconds": 86400}
    (record,) = [json.loads(content) for key, content in objects(case.prefix).items() if key.endswith("job.json")]
    assert record["spec"] == {"rows": {"uri": "input://data0"}, "output": "output://data", "name": "/a/label"}
    assert record["folders"] == ["data"]
    channels = {
        channel["ChannelName"]: channel["DataSource"]["S3DataSource"]["S3Uri"]
        for channel in request["InputDataConfig"]
    }
    rows = channels["data0"].removeprefix(f"s3://{BUCKET}/")
    assert objects(rows) == {f"{rows}train.bin": b"rows"}


def test_an_input_is_sent_once(case: Case, aws: SageMakerService) -> None:
    case.launch()
    before = {key for key in objects(case.prefix) if "/inputs/" in key}
    other = Case(case.scratch.parent.parent / "other", case.prefix)
    other.launch()
    assert {key for key in objects(case.prefix) if "/inputs/" in key} == before
    assert len(aws.jobs) == 2


class Died(BaseException):
    """The launcher's process is gone, without a last word."""


@pytest.mark.parametrize("after", ["CreateTrainingJob", "2 DescribeTrainingJob", "4 DescribeTrainingJob"])
def test_a_launcher_that_died_is_followed_by_one_that_finds_its_job(
    case: Case,
    aws: SageMakerService,
    after: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    count, _, operation = after.rpartition(" ")
    launcher = SageMakerLauncher(config(case.prefix), poll_seconds=0.001)
    original, seen = SageMakerService.handle, []

    def handle(self: SageMakerService, called: str, request: dict[str, Any]) -> dict[str, Any]:
        answer = original(self, called, request)
        seen.append(called)
        return answer

    monkeypatch.setattr(SageMakerService, "handle", handle)

    def wait(self: Any, seconds: float) -> None:
        if seen.count(operation) >= int(count or 1):
            raise Died

    with monkeypatch.context() as dying:
        dying.setattr(StopRequests, "wait", wait)
        with pytest.raises(Died):
            launcher.launch(case.job())
    assert len(aws.running()) == 1
    assert case.launch().metrics == {"loss": 1.5}
    assert len(aws.jobs) == 1
    assert aws.running() == []


def test_the_store_of_a_run_may_be_lost_with_its_launcher(
    case: Case,
    aws: SageMakerService,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a cluster the run's id names the launch too."""
    monkeypatch.setenv("MODELMILL_RUN_ID", "run-1")
    case.launch()
    (case.scratch / "sagemaker.json").unlink()
    case.launch()
    assert len(aws.jobs) == 1
    (case.scratch / "sagemaker.json").unlink()
    monkeypatch.setenv("MODELMILL_RUN_ID", "run-2")
    case.launch()
    assert len(aws.jobs) == 2
    tags = [{tag["Key"]: tag["Value"] for tag in job.request["Tags"]} for job in aws.jobs.values()]
    assert [tag["modelmill:run"] for tag in tags] == ["run-1", "run-2"]


def test_a_lost_answer_and_a_second_launcher_make_no_second_job(case: Case, aws: SageMakerService) -> None:
    aws.fail("CreateTrainingJob", "InternalFailure", before=False, status=500)
    case.launch()
    assert len(aws.jobs) == 1
    assert aws.calls.count("CreateTrainingJob") == 2


def test_throttling_and_failures_of_aws_pass(
    case: Case,
    aws: SageMakerService,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *_: 0)
    aws.fail("CreateTrainingJob", "ThrottlingException", 3)
    created = aws._CreateTrainingJob

    def create(request: dict[str, Any]) -> dict[str, Any]:
        aws.fail("DescribeTrainingJob", "ThrottlingException", 12)
        return created(request)

    monkeypatch.setattr(aws, "_CreateTrainingJob", create)
    assert case.launch().counts == {"steps": 3}


@pytest.mark.parametrize("before", ["CreateTrainingJob", "Downloading", "Training"])
def test_sigterm_stops_the_job_and_the_next_launch_goes_on(
    case: Case,
    aws: SageMakerService,
    before: str,
) -> None:
    told = []

    def watch(operation: str) -> None:
        for name in [name for name, job in aws.jobs.items() if job.secondary == "Uploading" and told]:
            case.leave_result(name)
        reached = [job for job in aws.jobs.values() if job.secondary == before] or operation == before
        if reached and not told:
            told.append(operation)
            os.kill(os.getpid(), signal.SIGTERM)

    aws.on_call = watch
    if before != "CreateTrainingJob":
        aws.plan(*PLAN[:4], "Training", "Training", *PLAN[4:], *PLAN[-1:])
    with pytest.raises(TrainingStoppedError, match="stopped by SIGTERM"):
        case.launch()
    assert aws.running() == [], "nothing goes on that costs money"
    first = dict(aws.jobs)
    case.launch()
    names = [name for name in aws.jobs if name not in first]
    assert len(names) == 1
    assert len({job.request["CheckpointConfig"]["S3Uri"] for job in aws.jobs.values()}) == 1
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_job_that_completes_while_it_is_being_stopped_counts(case: Case, aws: SageMakerService) -> None:
    def watch(operation: str) -> None:
        for name, job in list(aws.jobs.items()):
            if job.secondary == "Uploading":
                case.leave_result(name)
                job.history.append("Completed")
                job.plan.clear()
                os.kill(os.getpid(), signal.SIGTERM)

    aws.on_call = watch
    assert case.launch().counts == {"steps": 3}


def test_no_job_is_started_after_sigterm(case: Case, aws: SageMakerService, monkeypatch: pytest.MonkeyPatch) -> None:
    original = JobFiles.send

    def send(self: JobFiles, place: str, prefix: str) -> str:
        os.kill(os.getpid(), signal.SIGTERM)
        return original(self, place, prefix)

    monkeypatch.setattr(JobFiles, "send", send)
    with pytest.raises(TrainingStoppedError, match="before its job was started"):
        case.launch()
    assert aws.jobs == {}


def test_spare_capacity_that_is_taken_away_is_waited_for(
    case: Case,
    aws: SageMakerService,
    caplog: pytest.LogCaptureFixture,
) -> None:
    aws.plan("Starting", "Training", "Interrupted", "Starting", "Training", "Uploading", "Completed")
    with caplog.at_level("INFO"):
        case.launch(spot=True, max_run_seconds=10, max_wait_seconds=20)
    assert "taken away" in caplog.text
    assert len(aws.jobs) == 1


def test_a_job_that_failed_is_explained_and_followed_by_another(case: Case, aws: SageMakerService) -> None:
    aws.plan("Starting", "Failed", reason="CapacityError: Unable to provision requested ML compute capacity.")
    with pytest.raises(UserError, match="AWS has no ml"):
        case.launch()
    case.launch()
    assert [name[-2:] for name in aws.jobs] == ["-1", "-2"]
    assert len({job.request["CheckpointConfig"]["S3Uri"] for job in aws.jobs.values()}) == 1


ENDINGS: list[tuple[str, str, type[Exception], str]] = [
    ("Failed", "CapacityError: Unable to provision.", UserError, "AWS has no ml.g6.12xlarge free"),
    ("Failed", "ClientError: Cannot pull the image", UserError, "sagemaker.image: the instance could not fetch"),
    ("Failed", "AlgorithmError: training.a: 'b' is wrong, exit code: 2", UserError, "training.a: 'b' is wrong"),
    ("Failed", "AlgorithmError: ExecuteUserScriptError, exit code: 137", RankFailedError, "memory of ml.g6.12xlarge"),
    ("Failed", "AlgorithmError: CUDA out of memory, exit code: 1", RankFailedError, "was not enough"),
    (
        "Failed",
        "AlgorithmError: rank 1 of 2 failed: exit code 3, exit code: 1",
        RankFailedError,
        "failed: exit code 3",
    ),
    ("Failed", "AlgorithmError: it was told to stop, exit code: 75", TrainingStoppedError, "it was told to stop"),
    ("Failed", "InternalServerError: We encountered an error.", RankFailedError, "SageMaker failed while it ran"),
    ("Failed", "ClientError: Artifact upload failed", UserError, "could not run: Artifact upload failed"),
    ("Failed", "AlgorithmError: No space left on device, exit code: 1", UserError, "sagemaker.volume_gb: the volume"),
    ("MaxRuntimeExceeded", "", UserError, "sagemaker.max_run_seconds: 86400 seconds were over"),
    ("MaxWaitTimeExceeded", "", UserError, "sagemaker.max_wait_seconds: no spare ml.g6.12xlarge"),
    ("Stopped", "", TrainingStoppedError, "its checkpoints are kept"),
]


@pytest.mark.parametrize(("state", "reason", "kind", "words"), ENDINGS, ids=[each[3] for each in ENDINGS])
def test_endings_in_words(state: str, reason: str, kind: type[Exception], words: str) -> None:
    status = "Failed" if state == "Failed" else "Stopped"
    told = ending(
        "job-1", {"TrainingJobStatus": status, "SecondaryStatus": state, "FailureReason": reason}, config("x")
    )
    assert type(told) is kind
    assert words in str(told)
    assert "\n" not in str(told)


def test_a_used_up_quota_is_named(case: Case, aws: SageMakerService) -> None:
    aws.fail("CreateTrainingJob", "ResourceLimitExceeded")
    with pytest.raises(UserError, match=r"quota for ml\.g6\.12xlarge is used up"):
        case.launch()


def test_a_job_that_cannot_be_watched_any_more_is_named_and_found_again(case: Case, aws: SageMakerService) -> None:
    seen: list[str] = []

    def refuse(operation: str) -> None:
        seen.append(operation)
        if operation == "CreateTrainingJob":
            aws.fail("DescribeTrainingJob", "AccessDeniedException")

    aws.on_call = refuse
    with pytest.raises(UserError, match=r"can no longer be watched .* and may still run"):
        case.launch()
    assert len(aws.running()) == 1
    case.results_of_every_job(aws)
    case.launch()
    assert len(aws.jobs) == 1


def test_a_job_without_a_result_says_so(case: Case, aws: SageMakerService) -> None:
    aws.on_call = None
    with pytest.raises(RankFailedError, match="completed without a result"):
        case.launch()


def test_what_the_ranks_track_becomes_the_steps(
    case: Case,
    aws: SageMakerService,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(events.RUN_VARIABLE, str(tmp_path / "run"))
    monkeypatch.setenv(events.STEP_VARIABLE, "pretrain")
    monkeypatch.setattr(events, "_PROGRESS_INTERVAL", 0)
    (tmp_path / "run").mkdir()
    lines: list[bytes] = []
    client = s3()

    def watch(operation: str) -> None:
        for name, job in list(aws.jobs.items()):
            if job.secondary == "Training":
                step = len(lines) + 1
                point = {"type": "metrics", "time": step, "values": {"loss": 1 / step}, "step": step}
                lines.append(json.dumps(point).encode() + b"\n")
                place = job.request["CheckpointConfig"]["S3Uri"].removeprefix(f"s3://{BUCKET}/")
                content = b"".join(lines) + b'{"type": "metr'  # the next one is being written
                client.put_object(Bucket=BUCKET, Key=f"{place}/report/spool/pretrain.jsonl", Body=content)
            if job.secondary == "Uploading":
                case.leave_result(name)

    aws.on_call = watch
    aws.plan("Starting", "Training", "Training", "Training", "Uploading", "Completed")
    case.launch()
    tracked = [record for _, record in events.read_lines(tmp_path / "run" / "spool" / "pretrain.jsonl")]
    points = [(record["step"], record["time"]) for record in tracked if record["type"] == "metrics"]
    assert points == [(1, 1), (2, 2), (3, 3)]
    told = [record["message"] for _, record in events.read_lines(tmp_path / "run" / "events.jsonl")]
    assert any(message.startswith("SageMaker is starting") for message in told)


def test_the_profile_chooses_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = {
        "launcher": "modelmill.components.launchers.sagemaker:SageMakerLauncher",
        "config": config("x").model_dump(mode="json"),
    }
    monkeypatch.setenv(LAUNCHER_VARIABLE, json.dumps(chosen))
    launcher = current_launcher()
    assert isinstance(launcher, SageMakerLauncher)
    assert launcher.config == config("x")


def test_what_a_job_cannot_do_is_refused(case: Case, aws: SageMakerService) -> None:
    case.training = training_config(parallel={"nodes": 2, "processes_per_node": 2}, global_batch_size=8)
    with pytest.raises(UserError, match=r"training.parallel.nodes: 2 machines .* use 1"):
        case.launch()
    assert aws.calls == []


def test_a_launch_in_a_thread_leaves_signals_alone(case: Case, aws: SageMakerService) -> None:
    found: list[TrainingResult] = []
    thread = threading.Thread(target=lambda: found.append(case.launch()))
    thread.start()
    thread.join(20)
    assert found
    assert found[0].counts == {"steps": 3}
