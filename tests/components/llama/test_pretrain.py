"""The pretraining step in real processes: its artifact, its repeatability, and what it survives."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from modelmill.components.core.errors import UserError
from modelmill.components.core.home import Home
from modelmill.components.core.manifest import Manifest
from modelmill.components.core.step import section
from modelmill.components.core.weights import weights_digest
from modelmill.components.llama.huggingface import load_huggingface
from modelmill.components.llama.pretrain import pretrain
from tests.components.training.samples import VOCAB, make_tokenizer, make_tokens, pretrain_config

ROOT = Path(__file__).resolve().parents[3]
STEP = [sys.executable, "-m", "tests.components.llama.step_process"]
# Long enough to be caught in the middle: 200 steps of a few milliseconds.
LONG: dict[str, Any] = {
    "steps": 200,
    "log_every": 10,
    "validate_every": 50,
    "checkpoint_every": 40,
    "learning_rate": 3e-3,
    "min_learning_rate": 3e-4,
}
ALONE = {"processes_per_node": 1}  # where a second rank would add nothing but its start


@dataclass
class Outcome:
    """How a step process ended."""

    code: int
    log: str
    events: list[dict[str, Any]]
    spool: list[dict[str, Any]]


class Workplace:
    """Inputs of the step in a home of its own, and the processes started there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.home = folder / "home"
        self.environment = {**os.environ, "MODELMILL_HOME": str(self.home), "PYTHONPATH": str(ROOT)}
        for name in ("MODELMILL_RUN_DIR", "MODELMILL_STEP"):
            self.environment.pop(name, None)
        make_tokens(folder / "tokens").write(folder / "tokens.json")
        make_tokenizer(folder / "tokenizer").write(folder / "tokenizer.json")

    def start(self, run: str = "run", **changes: Any) -> subprocess.Popen[str]:
        config = pretrain_config(**changes)
        self.run = self.home / "runs" / run
        self.run.mkdir(parents=True, exist_ok=True)
        return subprocess.Popen(
            [*STEP, str(self.folder), section("pretrain", config, pretrain)],
            env={**self.environment, "MODELMILL_RUN_DIR": str(self.run)},
            cwd=ROOT,
            text=True,
        )

    def finish(self, process: subprocess.Popen[str]) -> Outcome:
        code = process.wait(120)
        lines = {
            name: [json.loads(line) for line in (self.run / name).read_text().splitlines()]
            for name in ("events.jsonl", "spool/pretrain.jsonl")
        }
        log = (self.run / "logs" / "pretrain.log").read_text()
        return Outcome(code, log, lines["events.jsonl"], lines["spool/pretrain.jsonl"])

    def checkpoints(self) -> list[Path]:
        return sorted(self.home.glob("store/pretrain/*.partial/checkpoints/step-*"))

    def history(self) -> str:
        return "".join(path.read_text() for path in self.home.glob("store/pretrain/*.partial/history.jsonl"))

    def model(self) -> Manifest:
        return Manifest.read(self.folder / "model.json")


def wait_for(condition: Callable[[], Any], seconds: float = 60) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.005)
    return found


def below(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[Workplace, Outcome]:
    """A long run that nothing disturbed."""
    place = Workplace(tmp_path_factory.mktemp("reference"))
    return place, place.finish(place.start(**LONG))


def test_the_artifact_is_what_the_contract_says(reference: tuple[Workplace, Outcome]) -> None:
    place, outcome = reference
    assert outcome.code == 0, outcome.log
    model, folder = place.model(), Path(place.model().uri)
    assert model.kind == "model"
    assert model.counts == {
        "parameters": sum(p.numel() for p in load_huggingface(folder / "model").parameters()),
        "steps": 200,
        "tokens": 200 * 8 * 24,
        "world_size": 2,
    }
    tokens, tokenizer = (Manifest.read(place.folder / f"{name}.json") for name in ("tokens", "tokenizer"))
    assert model.metadata == {
        "weights_digest": weights_digest(folder / "model"),
        "dataset_digest": tokens.digest,
        "tokenizer_digest": tokenizer.digest,
    }
    assert {"train_loss", "validation_loss", "tokens_per_second", "peak_memory_bytes"} <= model.metrics.keys()
    assert {entry.path for entry in model.files} >= {"history.jsonl", "model/config.json", "model/tokenizer.json"}
    # Nothing beside the artifact stays: checkpoints and logs of the ranks were scratch.
    assert {path.name for path in folder.parent.iterdir()} <= {"data", "manifest.json", "tracking.jsonl"}


def test_the_model_learned_and_transformers_loads_it(reference: tuple[Workplace, Outcome]) -> None:
    from transformers import AutoTokenizer, LlamaForCausalLM

    place, _ = reference
    folder = Path(place.model().uri) / "model"
    records = [json.loads(line) for line in (folder.parent / "history.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if "loss" in record]
    validation = [record["validation_loss"] for record in records if "validation_loss" in record]
    assert losses[0] == pytest.approx(4.6, abs=0.2)  # nothing known: log(97)
    assert losses[-1] < 0.6 * losses[0]
    assert len(validation) == 4
    assert validation[-1] < 3.5
    assert {"step", "loss", "learning_rate", "grad_norm", "param_norm", "tokens"} <= set(records[0])
    model = LlamaForCausalLM.from_pretrained(folder)
    assert model.config.vocab_size == VOCAB
    rows = torch.arange(24)[None]
    torch.testing.assert_close(model(rows).logits, load_huggingface(folder)(rows), rtol=1e-4, atol=1e-4)
    assert AutoTokenizer.from_pretrained(folder).eos_token_id == 0


def test_progress_and_points_are_reported(reference: tuple[Workplace, Outcome]) -> None:
    _, outcome = reference
    progress = [event for event in outcome.events if event["event"] == "progress"]
    assert progress[-1]["done"] == progress[-1]["total"] == 200
    assert progress[-1]["message"].startswith("step 200/200 loss ")
    assert " val " in progress[-1]["message"]
    points = [line for line in outcome.spool if line["type"] == "metrics" and "loss" in line["values"]]
    assert [point["step"] for point in points] == [1, *range(10, 201, 10)]
    assert {"tokens_per_second", "tokens_per_second_per_device", "grad_norm"} <= points[0]["values"].keys()
    params = {
        key: value for line in outcome.spool if line["type"] == "params" for key, value in line["values"].items()
    }
    assert (params["world_size"], params["accumulation_steps"], params["vocab_size"]) == (2, 2, VOCAB)
    datasets = {line["context"]: line for line in outcome.spool if line["type"] == "dataset"}
    assert datasets["training"]["profile"]["rows"] == 40
    assert datasets["validation"]["profile"]["rows"] == 10
    assert [Path(line["path"]).name for line in outcome.spool if line["type"] == "artifact"] == ["history.jsonl"]
    assert "Traceback" not in outcome.log
    assert "Warning" not in outcome.log


@pytest.mark.slow
def test_whatever_ends_an_attempt_the_next_goes_on_to_the_same_bits(
    reference: tuple[Workplace, Outcome], tmp_path: Path
) -> None:
    place = Workplace(tmp_path)
    kill_a_rank(place)
    tell_to_stop(place)
    kill_the_step(place)
    last = place.finish(place.start("last", **LONG))
    assert last.code == 0, last.log
    assert "going on after step" in last.log
    assert place.model().digest == reference[0].model().digest


def kill_a_rank(place: Workplace) -> None:
    """The step ends, says which rank was killed, and leaves no process and no artifact."""
    process = place.start("killed", **LONG)
    wait_for(place.checkpoints)
    children = below(process)
    ranks = [p for p in children if "RANK" in p.environ()]
    assert len(ranks) == 2
    os.kill(max(p.pid for p in ranks), signal.SIGKILL)
    outcome = place.finish(process)
    assert outcome.code == 1
    assert not alive(children)
    failed = [event for event in outcome.events if event["event"] == "failed"]
    assert failed[0]["kind"] == "crash"
    assert "failed: killed by SIGKILL" in failed[0]["message"]
    assert not (place.folder / "model.json").exists()


def tell_to_stop(place: Workplace) -> None:
    """The step keeps its place in a checkpoint between two regular ones."""
    before = set(place.checkpoints())
    process = place.start("stopped", **LONG)
    wait_for(lambda: '"step":60,' in place.history())
    children = below(process)
    # Whoever ends a run signals all its processes, and a parent's end brings the step a second signal.
    for one in [psutil.Process(process.pid), *children, psutil.Process(process.pid)]:
        one.terminate()
    outcome = place.finish(process)
    assert outcome.code == 1
    assert not alive(children)
    assert "training was stopped by SIGTERM after step" in outcome.events[-1]["message"]
    kept = [int(path.name.removeprefix("step-")) for path in place.checkpoints() if path not in before]
    assert kept[-1] >= 60
    assert kept[-1] % LONG["checkpoint_every"] != 0


def kill_the_step(place: Workplace) -> None:
    """No rank outlives the step's process."""
    stopped = place.checkpoints()[-1]
    process = place.start("again", **LONG)
    wait_for(lambda: place.checkpoints()[-1] != stopped)
    children = below(process)
    process.kill()
    process.wait()
    wait_for(lambda: not alive(children), 5)


def test_divergence_is_one_line_and_the_users_exit_code(tmp_path: Path) -> None:
    place = Workplace(tmp_path)
    outcome = place.finish(place.start(learning_rate=1e25, clip_norm=None, warmup_steps=0, parallel=ALONE))
    assert outcome.code == 2
    failed = outcome.events[-1]
    assert failed["event"] == "failed"
    assert failed["kind"] == "user"
    assert failed["message"].startswith(
        "training.learning_rate: the loss or its gradient became infinite or nan at step"
    )
    assert "Traceback" not in outcome.log


def test_a_wrong_section_starts_no_process(home: Home, tmp_path: Path) -> None:
    tokens, tokenizer = make_tokens(tmp_path / "tokens"), make_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "out" / "data").mkdir(parents=True)
    for config, field in (
        (pretrain_config(model={"max_sequence_length": 8}), "packing.sequence_length: 24"),
        (pretrain_config(parallel={"pipeline": 2}), "training.parallel.pipeline: 2"),
        (
            pretrain_config(parallel={"processes_per_node": 64}, global_batch_size=128),
            "training.global_batch_size: 128",
        ),
    ):
        with pytest.raises(UserError, match=field):
            pretrain(config, tmp_path / "out" / "data", tokenizer=tokenizer, tokens=tokens)
    assert list((tmp_path / "out").iterdir()) == [tmp_path / "out" / "data"]
    assert not list((tmp_path / "out" / "data").iterdir())


def can_mount() -> bool:
    """Whether this user may mount a small file system in a namespace of its own."""
    command = ["unshare", "-Urm", "sh", "-c", "mount -t tmpfs -o size=64k none /mnt"]
    return shutil.which("unshare") is not None and subprocess.run(command, capture_output=True).returncode == 0


@pytest.mark.skipif(not can_mount(), reason="no user namespaces here")
def test_a_full_disk_is_one_line_and_leaves_room_to_say_so(tmp_path: Path) -> None:
    place = Workplace(tmp_path)
    place.home.mkdir(exist_ok=True)
    model = {"hidden_size": 128, "intermediate_size": 256}
    config = pretrain_config(model=model, checkpoint_every=1, parallel=ALONE)
    (place.home / "store").mkdir()
    (place.home / "runs" / "run").mkdir(parents=True)
    # The store is a file system of 3 MiB, too small for the second checkpoint; events and logs lie outside it.
    script = f'mount -t tmpfs -o size=3m none "{place.home}/store" && exec "$@"'
    command = [
        "unshare",
        "-Urm",
        "sh",
        "-c",
        script,
        "sh",
        sys.executable,
        "-m",
        "tests.components.llama.step_process",
    ]
    environment = {**place.environment, "MODELMILL_RUN_DIR": str(place.home / "runs" / "run")}
    place.run = place.home / "runs" / "run"
    process = subprocess.Popen(
        [*command, str(tmp_path), section("pretrain", config, pretrain)], env=environment, cwd=ROOT
    )
    outcome = place.finish(process)  # type: ignore[arg-type]
    failed = outcome.events[-1]
    assert (outcome.code, failed["event"], failed["kind"]) == (2, "failed", "user"), outcome.log
    assert "the disk is full; free space" in failed["message"]
