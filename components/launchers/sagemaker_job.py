"""A training job as SageMaker is given it: its name, what it reads, the request. Pure: nothing here talks to AWS.

A job's spec holds paths of this machine. Each becomes a reference that both sides understand: `input://data0/sub` is
below the channel `data0`, `output://data` is what the module writes, relative to the job's scratch folder.
"""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modelmill.components.core.errors import UserError
from modelmill.components.core.events import RUN_ID_VARIABLE
from modelmill.components.core.manifest import json_digest
from modelmill.components.launchers.sagemaker_config import SageMakerConfig
from modelmill.components.training.launch import TrainingJob

INPUT, OUTPUT = "input://", "output://"
JOB_CHANNEL = "job"
ENTRY = "modelmill.components.launchers.sagemaker_entry"
LAUNCH_TAG = "modelmill:launch"
CHECKPOINTS = "/opt/ml/checkpoints"
_LABELS = ("name",)  # how people call a thing; may look like a path and is never opened
_CHANNELS = 20  # that a job may have


@dataclass
class PortableSpec:
    """A job's spec without a path of this machine.

    Attributes:
        spec: with references in the place of paths.
        inputs: what each channel holds: a local folder or file, or an `s3://` folder.
        outputs: folders that the module writes to, relative to the job's scratch folder.
    """

    spec: Any
    inputs: dict[str, str] = field(default_factory=dict)
    outputs: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, job: TrainingJob) -> PortableSpec:
        """Replace the paths of a job's spec.

        Raises:
            UserError: it reads from more places than a job has channels.
        """
        made = cls(None)
        made.spec = made._replace(dict(job.spec), job.scratch.absolute())
        if len(made.inputs) > _CHANNELS - 1:
            raise UserError(
                f"training: the job reads {len(made.inputs)} folders and a SageMaker job has {_CHANNELS} channels;"
                " merge the data first"
            )
        return made

    def _replace(self, value: Any, scratch: Path) -> Any:
        if isinstance(value, Mapping):
            return {
                key: part if key in _LABELS and isinstance(part, str) else self._replace(part, scratch)
                for key, part in value.items()
            }
        if isinstance(value, list):
            return [self._replace(part, scratch) for part in value]
        return self._reference(value, scratch) if isinstance(value, str) else value

    def _reference(self, value: str, scratch: Path) -> str:
        if value.startswith("s3://"):
            return self._channel(value.rstrip("/"))
        if not value.startswith("/"):
            return value
        path = Path(value)
        if path.is_relative_to(scratch):
            name = path.relative_to(scratch).as_posix()
            if path.is_dir() and name not in self.outputs:
                self.outputs.append(name)
            return OUTPUT + name
        if path.is_dir():
            return self._channel(str(path))
        return f"{self._channel(str(path))}/{path.name}" if path.is_file() else value

    def _channel(self, place: str) -> str:
        for name, held in self.inputs.items():
            if held == place:
                return INPUT + name
        name = f"data{len(self.inputs)}"
        self.inputs[name] = place
        return INPUT + name


def localized(value: Any, inputs: Path, output: Path) -> Any:
    """A spec with the paths of the machine it runs on.

    Args:
        value: as `PortableSpec` made it.
        inputs: folder that holds a folder for each channel.
        output: folder that what the module writes goes to.
    """
    if isinstance(value, Mapping):
        return {key: localized(part, inputs, output) for key, part in value.items()}
    if isinstance(value, list):
        return [localized(part, inputs, output) for part in value]
    if isinstance(value, str):
        for scheme, folder in ((INPUT, inputs), (OUTPUT, output)):
            if value.startswith(scheme):
                return str(folder / value.removeprefix(scheme))
    return value


@dataclass(frozen=True)
class Launch:
    """One training, however many jobs it takes: a job that failed or was stopped has used up its name.

    Attributes:
        identity: survives retries, a resumed run and the loss of this process.
        step: short name for people.
        place: `s3://` folder of its job file, checkpoints and results.
    """

    identity: str
    step: str
    place: str

    @classmethod
    def new(cls, job: TrainingJob, spec: PortableSpec, config: SageMakerConfig) -> Launch:
        """The launch of a job in this run; outside of a cluster's run, one that nothing else can meet."""
        run = os.environ.get(RUN_ID_VARIABLE) or uuid.uuid4().hex
        content = [run, job.module, spec.spec, job.training.model_dump(mode="json"), job.scratch.name]
        return cls.named(json_digest(content)[:16], job, config)

    @classmethod
    def named(cls, identity: str, job: TrainingJob, config: SageMakerConfig) -> Launch:
        step = re.sub(r"[^a-z0-9]+", "-", job.module.rpartition(".")[2].lower()).strip("-")[:24] or "train"
        return cls(identity, step, f"{config.output}/jobs/{step}-{identity}")

    def job_name(self, attempt: int) -> str:
        """Name of the n-th job, at most 63 characters."""
        return f"modelmill-{self.step}-{self.identity}-{attempt}"

    @property
    def checkpoints(self) -> str:
        return f"{self.place}/checkpoints"


def names(launch: Launch) -> Iterator[tuple[int, str]]:
    """Names of a launch's jobs, one after another."""
    attempt = 0
    while True:
        attempt += 1
        yield attempt, launch.job_name(attempt)


def training_request(
    name: str, launch: Launch, config: SageMakerConfig, channels: Mapping[str, str], tags: Mapping[str, str]
) -> dict[str, Any]:
    """The request `CreateTrainingJob`.

    Args:
        name: of the job.
        launch: whose checkpoints it goes on from.
        config: the account's part.
        channels: name of each channel to its `s3://` folder.
        tags: of the job.
    """
    stopping = {"MaxRuntimeInSeconds": config.max_run_seconds}
    if config.spot:
        stopping["MaxWaitTimeInSeconds"] = config.max_wait_seconds or config.max_run_seconds
    request: dict[str, Any] = {
        "TrainingJobName": name,
        "RoleArn": config.role,
        "AlgorithmSpecification": {
            "TrainingImage": config.image,
            "TrainingInputMode": "File",
            "ContainerEntrypoint": ["python", "-m", ENTRY],
        },
        "InputDataConfig": [_channel(channel, uri) for channel, uri in sorted(channels.items())],
        # Files as they are: a model of many gigabytes is neither packed nor unpacked.
        "OutputDataConfig": {"S3OutputPath": f"{launch.place}/results", "CompressionType": "NONE"},
        "CheckpointConfig": {"S3Uri": launch.checkpoints, "LocalPath": CHECKPOINTS},
        "ResourceConfig": {
            "InstanceType": config.instance_type,
            "InstanceCount": 1,
            "VolumeSizeInGB": config.volume_gb,
        },
        "StoppingCondition": stopping,
        "EnableManagedSpotTraining": config.spot,
        "Tags": [{"Key": key, "Value": value} for key, value in tags.items() if value],
    }
    if config.environment:
        request["Environment"] = dict(config.environment)
    if config.subnets:
        request["VpcConfig"] = {"Subnets": list(config.subnets), "SecurityGroupIds": list(config.security_groups)}
    return request


def _channel(name: str, uri: str) -> dict[str, Any]:
    source = {"S3DataType": "S3Prefix", "S3Uri": f"{uri.rstrip('/')}/", "S3DataDistributionType": "FullyReplicated"}
    return {"ChannelName": name, "DataSource": {"S3DataSource": source}, "InputMode": "File"}
