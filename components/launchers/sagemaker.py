"""Runs training jobs as managed SageMaker training jobs.

The job's name comes from a launch id that is kept beside the step's checkpoints, so a step that is tried again finds
the job it started, whatever became of the process that started it: a running one is followed, a finished one's result
is collected. A job that failed or was stopped has used up its name; the next one goes on from the same checkpoints.
SIGTERM stops the job. Result, metrics and checkpoints come through S3, never through logs.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from modelmill.components.core import events, tracking
from modelmill.components.core.aws import aws_trouble, client, error_code, is_missing, open_session
from modelmill.components.core.errors import UserError
from modelmill.components.core.sagemaker import ADOPTED_TAG, RUN_TAG, owner_tags
from modelmill.components.launchers.sagemaker_config import SageMakerConfig
from modelmill.components.launchers.sagemaker_ending import ending, in_words
from modelmill.components.launchers.sagemaker_entry import JOB_FILE, REPORT, RESULT_FILE
from modelmill.components.launchers.sagemaker_files import JobFiles
from modelmill.components.launchers.sagemaker_job import (
    JOB_CHANNEL,
    LAUNCH_TAG,
    Launch,
    PortableSpec,
    training_request,
)
from modelmill.components.training.config import TrainingConfig
from modelmill.components.training.launch import RankFailedError, TrainingJob, TrainingResult, TrainingStoppedError

if TYPE_CHECKING:
    from boto3.session import Session

_PARAMETER = "sagemaker"
_POLL_SECONDS = 20.0
_PATIENCE = 30  # descriptions in a row that may fail before the step gives up watching
_KEPT = "sagemaker.json"  # in the job's scratch folder: launch id, and how much of the report has been read
_RELAYED = ("metrics", "tags", "params")
logger = logging.getLogger("modelmill")


class SageMakerLauncher:
    """See the module."""

    def __init__(self, config: SageMakerConfig, *, poll_seconds: float = _POLL_SECONDS) -> None:
        """
        Args:
            config: the account's part of a job.
            poll_seconds: between two looks at a job.
        """
        self.config, self.poll_seconds = config, poll_seconds

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """The launcher of a profile's section.

        Raises:
            pydantic.ValidationError: a field is wrong.
        """
        return cls(SageMakerConfig.model_validate(config))

    def check(self, training: TrainingConfig) -> None:
        """See `Launcher.check`; what depends on the devices is checked by the container."""
        parallel = training.parallel
        if parallel.nodes > 1:
            raise UserError(
                f"training.parallel.nodes: {parallel.nodes} machines share no checkpoints in a SageMaker job, which"
                " copies each machine's folder by itself; use 1, or the trainjob launcher"
            )
        if parallel.pipeline > 1:
            raise UserError(
                f"training.parallel.pipeline: {parallel.pipeline} is not implemented by the engine, which has no"
                " pipeline schedule; use 1, and shard or tensor to spread the weights"
            )

    def launch(self, job: TrainingJob) -> TrainingResult:
        """See `Launcher.launch`."""
        self.check(job.training)
        with _stop_requests() as stop, aws_trouble(_PARAMETER):
            session = open_session(self.config.region, _PARAMETER)
            return _Training(job, self.config, session, stop, self.poll_seconds).run()


class StopRequests:
    """SIGTERM and SIGINT as they come; a wait that they end."""

    def __init__(self) -> None:
        self.received = 0
        self._arrivals: queue.SimpleQueue[int] = queue.SimpleQueue()  # its put may interrupt its get

    def receive(self, number: int, _frame: object) -> None:
        self.received = number
        self._arrivals.put(number)

    def wait(self, seconds: float) -> None:
        """Wait, but no longer than until the next signal."""
        with suppress(queue.Empty):
            self._arrivals.get(timeout=seconds)

    @property
    def name(self) -> str:
        return signal.Signals(self.received).name


@contextmanager
def _stop_requests() -> Iterator[StopRequests]:
    requests = StopRequests()
    if threading.current_thread() is not threading.main_thread():
        yield requests  # only the main thread may set handlers; whoever runs us in a thread handles signals
        return
    before = {number: signal.signal(number, requests.receive) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield requests
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Training:
    """One call of `launch`."""

    def __init__(
        self, job: TrainingJob, config: SageMakerConfig, session: Session, stop: StopRequests, poll_seconds: float
    ) -> None:
        self.job, self.config, self.stop, self.poll_seconds = job, config, stop, poll_seconds
        self.sagemaker, self.files = client(session, "sagemaker"), JobFiles(client(session, "s3"))
        self.spec = PortableSpec.of(job)
        self._kept = job.scratch / _KEPT
        record = self._read_kept()
        if "launch" in record:
            self.launch = Launch.named(str(record["launch"]), job, config)
        else:
            self.launch = Launch.new(job, self.spec, config)
        self._reported = int(record.get("reported", 0))
        self._keep()  # before the first job exists, so that none is ever lost

    def run(self) -> TrainingResult:
        """Find or start the job and follow it to its end."""
        name, description = self._newest()
        if description is not None and description["TrainingJobStatus"] == "Stopping":
            description = self._follow(name)  # it keeps its checkpoint now; the next one goes on from that
        if description is None or description["TrainingJobStatus"] in ("Failed", "Stopped"):
            name = self.launch.job_name(self._attempt(name, description))
            self._create(name)
        else:
            logger.info("found the training job %s", name)
            self._take_over(description)
        description = self._follow(name)
        if description["TrainingJobStatus"] == "Completed":
            return self._collect(name, description)
        if self.stop.received:
            raise TrainingStoppedError(
                f"training was stopped by {self.stop.name} and its checkpoints are kept; run it again to go on"
            )
        raise ending(name, description, self.config)

    def _take_over(self, description: Mapping[str, Any]) -> None:
        """Say on a job that runs whose it is now: the reaper goes by that, and the run that started it may be over."""
        run = os.environ.get(events.RUN_ID_VARIABLE)
        if not run or description["TrainingJobStatus"] != "InProgress":
            return
        tags = {RUN_TAG: run, ADOPTED_TAG: datetime.now(UTC).isoformat(timespec="seconds"), **owner_tags()}
        self.sagemaker.add_tags(
            ResourceArn=description["TrainingJobArn"],
            Tags=[{"Key": key, "Value": value} for key, value in tags.items()],
        )

    def _newest(self) -> tuple[str, dict[str, Any] | None]:
        """The newest job of the launch and its description; none where no job was started yet."""
        found: tuple[str, dict[str, Any] | None] = "", None
        attempt = 1
        while (description := self._described(self.launch.job_name(attempt))) is not None:
            found = self.launch.job_name(attempt), description
            attempt += 1
        return found

    @staticmethod
    def _attempt(name: str, description: Mapping[str, Any] | None) -> int:
        return 1 if description is None else int(name.rpartition("-")[2]) + 1

    def _described(self, name: str) -> dict[str, Any] | None:
        try:
            return self.sagemaker.describe_training_job(TrainingJobName=name)
        except Exception as error:
            if is_missing(error):
                return None
            raise

    def _create(self, name: str) -> None:
        channels = {
            channel: place if place.startswith("s3://") else self._send(place)
            for channel, place in self.spec.inputs.items()
        }
        record = {
            "module": self.job.module,
            "spec": self.spec.spec,
            "training": self.job.training.model_dump(mode="json"),
            "folders": self.spec.outputs,
            "step": os.environ.get(events.STEP_VARIABLE) or self.launch.step,
        }
        channels[JOB_CHANNEL] = f"{self.launch.place}/job"
        self.files.write(f"{channels[JOB_CHANNEL]}/{JOB_FILE}", json.dumps(record).encode())
        self._unless_stopped()
        run = os.environ.get(events.RUN_ID_VARIABLE, "")
        tags = {LAUNCH_TAG: self.launch.identity, RUN_TAG: run, **owner_tags()}
        request = training_request(name, self.launch, self.config, channels, tags)
        try:
            self.sagemaker.create_training_job(**request)
            logger.info("started the training job %s", name)
        except Exception as error:
            if error_code(error) == "ResourceLimitExceeded":
                raise UserError(
                    f"sagemaker.instance_type: the account's quota for {self.config.instance_type} is used up; ask AWS"
                    " to raise it under Service Quotas, wait for other jobs, or choose another type"
                ) from None
            if (
                error_code(error) != "ResourceInUse"
            ):  # else: by a launcher that died, or by a request answered too late
                raise
        tracking.set_tags({"modelmill.training_job": name})

    def _send(self, place: str) -> str:
        self._unless_stopped()
        return self.files.send(place, f"{self.config.output}/inputs")

    def _unless_stopped(self) -> None:
        if self.stop.received:
            raise TrainingStoppedError(
                f"training was stopped by {self.stop.name} before its job was started; run it again to go on"
            )

    def _follow(self, name: str) -> dict[str, Any]:
        """Wait for a job's end, stopping it when this process is told to stop; returns its last description."""
        asked, failures, described = False, 0, ""
        while True:
            try:
                if self.stop.received and not asked:
                    events.progress(f"stopping {name}")
                    self._ask_to_stop(name)
                    asked = True
                description = self.sagemaker.describe_training_job(TrainingJobName=name)
                self._relay()
                failures = 0
            except Exception as error:
                failures += 1
                if failures > _PATIENCE or not _passes(error):
                    raise UserError(
                        f"sagemaker: {name} can no longer be watched ({type(error).__name__}: {error}) and may still"
                        " run; run it again to find it, or stop it with `aws sagemaker stop-training-job`"
                        f" --training-job-name {name}"
                    ) from None
            else:
                if (words := in_words(description)) != described:
                    described = words
                    logger.info("%s: %s", name, words)
                    events.progress(words)
                if description["TrainingJobStatus"] in ("Completed", "Failed", "Stopped"):
                    self._relay()
                    return description
            self.stop.wait(self.poll_seconds)

    def _ask_to_stop(self, name: str) -> None:
        try:
            self.sagemaker.stop_training_job(TrainingJobName=name)
        except Exception as error:
            if error_code(error) != "ValidationException":  # that: it has ended by itself
                raise

    def _relay(self) -> None:
        """Report the points that the ranks have tracked since the last time as this step's."""
        step = os.environ.get(events.STEP_VARIABLE) or self.launch.step
        lines = self.files.lines_after(f"{self.launch.checkpoints}/{REPORT}/spool/{step}.jsonl", self._reported)
        if not lines:
            return
        latest: dict[str, Any] = {}
        for line in lines.splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            kind = record.pop("type", "")
            if kind in _RELAYED:
                tracking.record(kind, **record)
            if kind == "metrics":
                latest = record
        self._reported += len(lines)
        self._keep()
        if latest:
            loss = latest["values"].get("loss")
            steps = self.job.training.steps
            shown = "" if loss is None else f" loss {loss:.3f}"
            events.progress(f"step {latest['step']}/{steps}{shown}", latest["step"], steps)

    def _collect(self, name: str, description: Mapping[str, Any]) -> TrainingResult:
        place = str(description["ModelArtifacts"]["S3ModelArtifacts"])
        events.progress("fetching the result")
        self.files.fetch(place, self.job.scratch)
        result = self.job.scratch / RESULT_FILE
        try:
            return TrainingResult.model_validate_json(result.read_bytes())
        except (OSError, ValueError) as error:
            raise RankFailedError(
                f"the training job {name} has completed without a result in {place} ({type(error).__name__}); was its"
                " image made from another version?"
            ) from None

    def _read_kept(self) -> dict[str, Any]:
        try:
            found = json.loads(self._kept.read_bytes())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def _keep(self) -> None:
        temporary = Path(f"{self._kept}.{os.getpid()}")
        temporary.write_text(json.dumps({"launch": self.launch.identity, "reported": self._reported}))
        os.replace(temporary, self._kept)


def _passes(error: Exception) -> bool:
    """Whether what went wrong may be over in a moment: the network, throttling, a failure inside AWS."""
    from botocore.exceptions import ClientError, ConnectionError, HTTPClientError

    if isinstance(error, ClientError):
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return status >= 500 or "Throttl" in error_code(error) or error_code(error) == "RequestLimitExceeded"
    return isinstance(error, (ConnectionError, HTTPClientError))
