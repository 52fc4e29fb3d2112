"""The container of a SageMaker job, really run on this machine: the ranks, SIGTERM, and the next job that goes on."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from modelmill.components.core import events
from modelmill.components.core.errors import UserError
from modelmill.components.core.manifest import Manifest
from modelmill.components.core.step import StepResult
from modelmill.components.launchers.sagemaker import SageMakerLauncher
from modelmill.components.launchers.sagemaker_entry import ROOT_VARIABLE
from modelmill.components.llama.pretrain import pretrain
from modelmill.components.training.launch import LocalLauncher, RankFailedError, TrainingJob, TrainingStoppedError
from tests.components.launchers.sagemaker_sections import config
from tests.components.training import endings
from tests.components.training.samples import make_tokenizer, make_tokens, pretrain_config, training_config
from tests.fakes.aws import objects, s3
from tests.fakes.sagemaker_api import SageMakerService
from tests.fakes.sagemaker_container import TrainingContainer


@pytest.fixture
def containers(aws: SageMakerService, tmp_path: Path) -> list[TrainingContainer]:
    """The containers that SageMaker has started."""
    started: list[TrainingContainer] = []

    def run(request: dict[str, Any]) -> TrainingContainer:
        started.append(TrainingContainer(request, tmp_path / f"ml-{len(started)}", s3()))
        return started[-1]

    aws.runner = run
    return started


def launcher(prefix: str) -> SageMakerLauncher:
    return SageMakerLauncher(config(prefix), poll_seconds=0.05)


def job(folder: Path, **spec: Any) -> TrainingJob:
    (folder / "key.partial" / "data").mkdir(parents=True)
    return TrainingJob(endings.MODULE, spec, training_config(), folder / "key.partial")


def test_the_ranks_result_comes_back(tmp_path: Path, containers: list[TrainingContainer]) -> None:
    done = launcher("entry/result").launch(job(tmp_path, ending="environment", others="finish"))
    assert done.metadata["WORLD_SIZE"] == "2"
    assert "NCCL_PROTO" not in containers[0].request.get("Environment", {})


@pytest.mark.slow
def test_a_rank_that_fails_says_so_through_sagemaker(tmp_path: Path, containers: list[TrainingContainer]) -> None:
    with pytest.raises(RankFailedError, match="rank 1 of 2 failed: exit code 3"):
        launcher("entry/failure").launch(job(tmp_path, ending="exit"))


@pytest.mark.slow
def test_a_users_mistake_comes_back_as_one(
    tmp_path: Path, aws: SageMakerService, containers: list[TrainingContainer]
) -> None:
    made = job(tmp_path, ending="finish")
    training = made.training.model_copy(update={"accelerator": "cuda"})
    with pytest.raises(UserError, match=r"^training\.accelerator"):
        launcher("entry/mistake").launch(TrainingJob(made.module, made.spec, training, made.scratch))


def test_sigterm_before_the_ranks_are_started_ends_the_container(tmp_path: Path) -> None:
    """The first process of a container gets no signal that it has no handler for."""
    folder = tmp_path / "input" / "data" / "job"
    folder.mkdir(parents=True)
    os.mkfifo(folder / "job.json")
    command = [sys.executable, "-m", "modelmill.components.launchers.sagemaker_entry"]
    process = subprocess.Popen(command, env={**os.environ, ROOT_VARIABLE: str(tmp_path)})
    try:
        with (folder / "job.json").open("wb"):  # opens when the other side does, which then waits for what is in it
            process.terminate()
            assert process.wait(60) == 75
    finally:
        process.kill()


def weights(folder: Path) -> dict[str, Any]:
    return {
        f"{path.name}:{name}": tensor.tobytes()
        for path in sorted((folder / "model").glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


class Pretraining:
    """The step of a small decoder that two processes train, in a folder of its own."""

    def __init__(self, folder: Path, tokens: Manifest, tokenizer: Manifest) -> None:
        self.output, self._inputs = folder / "key.partial" / "data", {"tokens": tokens, "tokenizer": tokenizer}
        self.output.mkdir(parents=True, exist_ok=True)
        self.config = pretrain_config(parallel={"processes_per_node": 2}, checkpoint_every=2)

    def run(self, place: Any) -> StepResult:
        return pretrain(self.config, self.output, launcher=place, **self._inputs)


@pytest.mark.slow
def test_a_training_that_is_stopped_and_resumed_ends_with_the_weights_of_an_undisturbed_one(
    tmp_path: Path,
    aws: SageMakerService,
    containers: list[TrainingContainer],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MODELMILL_HOME", str(tmp_path / "home"))
    inputs = make_tokens(tmp_path / "tokens"), make_tokenizer(tmp_path / "tokenizer")
    here = Pretraining(tmp_path / "here", *inputs)
    expected = here.run(LocalLauncher())

    monkeypatch.setenv(events.RUN_VARIABLE, str(tmp_path / "run"))
    monkeypatch.setenv(events.STEP_VARIABLE, "pretrain")
    (tmp_path / "run").mkdir()
    away = Pretraining(tmp_path / "away", *inputs)
    looks = itertools.count()

    def stop_after_a_checkpoint(operation: str) -> None:
        if operation != "DescribeTrainingJob" or next(looks) % 5:
            return
        if any(key.endswith("checkpoint.json") and "/." not in key for key in objects("entry/resumed")):
            os.kill(os.getpid(), signal.SIGTERM)
            aws.on_call = None

    aws.on_call = stop_after_a_checkpoint
    with pytest.raises(TrainingStoppedError, match="stopped by SIGTERM"):
        away.run(launcher("entry/resumed"))
    assert aws.running() == []
    assert not (away.output / "model").exists()
    done = away.run(launcher("entry/resumed"))
    assert len(containers) == 2
    history = [json.loads(line) for line in (away.output / "history.jsonl").read_text().splitlines()]
    assert history == [json.loads(line) for line in (here.output / "history.jsonl").read_text().splitlines()]
    assert weights(away.output) == weights(here.output)
    assert done.metadata == expected.metadata
    assert done.counts == expected.counts
    spool = tmp_path / "run" / "spool" / "pretrain.jsonl"
    tracked = [record for _, record in events.read_lines(spool) if record["type"] == "metrics"]
    assert {record["step"] for record in tracked if "loss" in record["values"]} == set(range(1, 9))
