"""How a SageMaker training job ended, in words for whoever started the training. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from modelmill.components.core.errors import UserError
from modelmill.components.core.step import USER_ERROR_EXIT
from modelmill.components.launchers.sagemaker_config import SageMakerConfig
from modelmill.components.training.launch import STOPPED_EXIT, RankFailedError, TrainingStoppedError

_OUT_OF_MEMORY_EXIT = 137
_WORDS = {
    "Pending": "waiting in SageMaker's queue",
    "Starting": "SageMaker is starting the job",
    "LaunchingMLInstances": "waiting for an instance",
    "PreparingTrainingStack": "the instance is starting",
    "DownloadingTrainingImage": "the instance is fetching the image",
    "Downloading": "the instance is fetching the data",
    "Training": "training",
    "Uploading": "the instance is uploading the result",
    "Interrupted": "the spare capacity was taken away; the job waits and goes on from its newest checkpoint",
    "Restarting": "the instance failed; SageMaker is starting another",
    "Stopping": "stopping",
}


def in_words(description: Mapping[str, Any]) -> str:
    """What a job is doing."""
    secondary = str(description["SecondaryStatus"])
    return _WORDS.get(secondary, secondary)


def ending(name: str, description: Mapping[str, Any], config: SageMakerConfig) -> Exception:
    """What to raise for a job that has ended without a result.

    Args:
        name: of the job.
        description: answer of `DescribeTrainingJob`.
        config: the account's part, whose fields the advice names.
    """
    secondary, reason = str(description["SecondaryStatus"]), str(description.get("FailureReason", ""))
    if secondary == "MaxRuntimeExceeded":
        return UserError(
            f"sagemaker.max_run_seconds: {config.max_run_seconds} seconds were over before {name} was done; raise it"
            " and run again, which goes on from the newest checkpoint"
        )
    if secondary == "MaxWaitTimeExceeded":
        waited = config.max_wait_seconds or config.max_run_seconds
        return UserError(
            f"sagemaker.max_wait_seconds: no spare {config.instance_type} was to be had for {name} within {waited}"
            " seconds; raise it, or set sagemaker.spot to false, and run again"
        )
    if description["TrainingJobStatus"] == "Stopped":
        return TrainingStoppedError(f"training was stopped; its checkpoints are kept: run it again to go on ({name})")
    return _failure(name, reason, config)


def _failure(name: str, reason: str, config: SageMakerConfig) -> Exception:
    kind = reason.partition(":")[0].strip()
    told = reason.partition(":")[2].strip() if kind.endswith("Error") else reason
    lower = reason.lower()
    if kind == "CapacityError" or "insufficient capacity" in lower or "insufficientcapacity" in lower:
        return UserError(
            f"sagemaker.instance_type: AWS has no {config.instance_type} free at the moment ({name}); run again later,"
            " or choose another type, region or subnet"
        )
    if any(word in lower for word in ("ecr", "pull the image", "image manifest", "cannotpullcontainer")):
        return UserError(
            f"sagemaker.image: the instance could not fetch {config.image} ({told}); check the reference, that it"
            " is in the job's region, and that the role may read it"
        )
    if any(word in lower for word in ("no space left on device", "disk is full")):
        return UserError(
            f"sagemaker.volume_gb: the volume of {config.volume_gb} GB is full ({name}); raise it and run again"
        )
    code = _exit_code(reason)
    if code == USER_ERROR_EXIT:
        return UserError(_without_exit_code(told))
    if code == STOPPED_EXIT:
        return TrainingStoppedError(f"{_without_exit_code(told) or 'training was stopped'} ({name})")
    if code == _OUT_OF_MEMORY_EXIT or "out of memory" in lower or "outofmemory" in lower:
        return RankFailedError(
            f"the memory of {config.instance_type} was not enough ({name}): {_without_exit_code(told) or reason}; use"
            " a larger instance or a smaller training.micro_batch_size, or spread the weights by training.parallel"
        )
    if kind == "InternalServerError":
        return RankFailedError(
            f"SageMaker failed while it ran {name} ({told}); run it again, which goes on from the newest checkpoint"
        )
    if kind == "ClientError":
        return UserError(f"sagemaker: the job {name} could not run: {told}; mend that in the profile and run again")
    return RankFailedError(f"the training job {name} failed: {_without_exit_code(told) or 'no reason was given'}")


def _exit_code(reason: str) -> int | None:
    found = re.search(r"exit code: (\d+)", reason, re.IGNORECASE)
    return int(found[1]) if found else None


def _without_exit_code(told: str) -> str:
    return re.sub(r",?\s*exit code: \d+\s*$", "", told, flags=re.IGNORECASE).strip()
