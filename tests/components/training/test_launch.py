"""The local launcher: threads, ports, failures in words, and no process left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from modelmill.components.training.launch import (
    LocalLauncher,
    RankFailedError,
    TrainingJob,
    TrainingResult,
    TrainingStoppedError,
)
from modelmill.components.training.processes import available_cores, describe_exit
from tests.components.training import endings, runs
from tests.components.training.runs import history, make_loop, single_rank
from tests.components.training.samples import make_tokens, training_config


def job(scratch: Path, training: dict[str, Any] | None = None, **spec: Any) -> TrainingJob:
    scratch.mkdir(parents=True, exist_ok=True)
    return TrainingJob(endings.MODULE, spec, training_config(**(training or {})), scratch)


def wait_for(condition: Any, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.mark.parametrize(
    ("ending", "words"),
    [
        ("exit", ["rank 1 of 2 failed: exit code 3", "something went wrong here"]),
        ("kill", ["rank 1 of 2 failed: killed by SIGKILL", "hello from 1"]),
    ],
)
def test_a_rank_that_ends_badly_is_named_with_its_last_words(tmp_path: Path, ending: str, words: list[str]) -> None:
    with pytest.raises(RankFailedError) as caught:
        LocalLauncher().launch(job(tmp_path, ending=ending))
    for word in words:
        assert word in str(caught.value)
    assert all(gone(int(path.read_text())) for path in tmp_path.glob("pid-*"))


def test_an_export_that_was_cut_off_is_gone_before_the_ranks_start(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/weights").write_text("half of them")
    (tmp_path / "kept").write_text("not an export")
    work = job(tmp_path, ending="environment", others="finish")
    LocalLauncher().launch(replace(work, exports=(tmp_path / "model",)))
    assert not (tmp_path / "model").exists()
    assert (tmp_path / "kept").exists()


def test_two_launches_at_once_do_not_meet_and_share_out_the_cores(tmp_path: Path) -> None:
    results: dict[str, TrainingResult] = {}

    def launch(name: str, training: dict[str, Any]) -> None:
        one = job(tmp_path / name, training, ending="environment", others="finish")
        results[name] = LocalLauncher().launch(one)

    changes: dict[str, dict[str, Any]] = {
        "given": {"threads_per_process": 3},
        "derived": {"threads_per_process": None},
    }
    threads = [threading.Thread(target=launch, args=item) for item in changes.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    given, derived = results["given"].metadata, results["derived"].metadata
    assert given["MASTER_PORT"] != derived["MASTER_PORT"]
    assert given["MASTER_ADDR"] == "127.0.0.1"
    assert given["OMP_NUM_THREADS"] == "3"
    assert derived["OMP_NUM_THREADS"] == str(max(1, available_cores() // 2))


STEP = """
import json, pathlib, sys
from modelmill.components.training.launch import LocalLauncher, TrainingJob
from tests.components.training.samples import training_config
scratch = pathlib.Path(sys.argv[1])
LocalLauncher(grace_seconds=2).launch(
    TrainingJob("tests.components.training.endings", {"ending": "wait"}, training_config(), scratch)
)
"""


def start_step(scratch: Path) -> tuple[subprocess.Popen[str], list[int]]:
    """A process that launches two waiting ranks, and the process ids below it."""
    process = subprocess.Popen([sys.executable, "-c", STEP, str(scratch)], stderr=subprocess.PIPE, text=True)
    wait_for(lambda: len(list(scratch.glob("pid-*"))) == 2)
    children = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
    assert len(children) == 3  # torchrun and two ranks
    return process, children


def test_a_step_that_is_killed_hard_leaves_no_process(tmp_path: Path) -> None:
    process, children = start_step(tmp_path)
    process.kill()
    process.communicate()
    began = time.monotonic()
    wait_for(lambda: all(gone(pid) for pid in children), 5)
    assert time.monotonic() - began < 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_step_that_is_told_to_stop_ends_its_ranks_and_says_so(tmp_path: Path, number: signal.Signals) -> None:
    process, children = start_step(tmp_path)
    process.send_signal(number)
    errors = process.communicate(timeout=20)[1]
    assert f"TrainingStoppedError: training was stopped by {number.name}" in errors
    assert all(gone(pid) for pid in children)


def test_exits_in_words() -> None:
    assert describe_exit(3) == "exit code 3"
    assert describe_exit(-9) == "killed by SIGKILL"
    assert describe_exit(-99) == "killed by signal 99"
    assert issubclass(TrainingStoppedError, RuntimeError)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """What two real ranks find in one launch, see `runs`; and the folder with their histories."""
    folder = tmp_path_factory.mktemp("two-ranks")
    before = os.environ.get("MODELMILL_HOME")
    os.environ["MODELMILL_HOME"] = str(folder / "home")
    try:
        tokens = make_tokens(folder / "tokens")
        spec = {"tokens": tokens.model_dump(mode="json")}
        scratch = folder / "scratch"
        scratch.mkdir()
        result = LocalLauncher().launch(TrainingJob(runs.MODULE, spec, training_config(), scratch))
    finally:
        if before is None:
            del os.environ["MODELMILL_HOME"]
        else:
            os.environ["MODELMILL_HOME"] = before
    assert result.counts == {"world_size": 2}
    return folder, result.metadata["ranks"]


def test_two_ranks_follow_one_rank(two_ranks: tuple[Path, list[dict[str, Any]]], tmp_path: Path, home: object) -> None:
    import torch

    folder, _ = two_ranks
    tokens = make_tokens(tmp_path / "tokens")
    config = training_config(parallel={"processes_per_node": 1}, micro_batch_size=8)
    make_loop(tokens, config, single_rank(tmp_path / "one"), dtype=torch.float64).run()
    for name in ("float64", "accumulated"):
        for one, two in zip(history(tmp_path / "one"), history(folder / "scratch" / name), strict=True):
            assert one == pytest.approx(two, rel=1e-9)


def test_all_ranks_end_with_the_same_weights_and_so_does_a_second_run(
    two_ranks: tuple[Path, list[dict[str, Any]]],
) -> None:
    folder, ranks = two_ranks
    for scenario in ("float64", "first"):
        assert ranks[0][scenario]["digest"] == ranks[1][scenario]["digest"]
    assert ranks[0]["first"]["digest"] == ranks[0]["again"]["digest"]
    written = [(folder / "scratch" / name / "history.jsonl").read_bytes() for name in ("first", "again")]
    assert written[0] == written[1]


def test_all_ranks_skip_the_step_in_which_one_has_an_infinite_loss(
    two_ranks: tuple[Path, list[dict[str, Any]]],
) -> None:
    folder, ranks = two_ranks
    digests = ranks[0]["one bad loss"]["digests"]
    assert ranks[1]["one bad loss"]["digests"] == digests
    assert [step for step in range(1, 9) if digests[step] == digests[step - 1]] == [4]
    assert {"step": 4, "skipped": "nonfinite"} in history(folder / "scratch" / "one bad loss")


def test_ranks_go_back_together(two_ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, ranks = two_ranks
    assert ranks[0]["rolled back"] == ranks[1]["rolled back"]
    records = history(folder / "scratch" / "rolled back")
    # Batch 4 spikes in step 5: back to step 3, whose batch would have been 3, and on with batch 5.
    assert [r for r in records if "cursor" in r] == [{"step": 3, "rollbacks": 1, "cursor": 5, "alarm_step": 5}]
    assert [r["step"] for r in records if "loss" in r] == list(range(1, 9))
    assert ranks[0]["rolled back"]["cursor"] == 10


def test_ranks_stop_together_when_one_is_told_and_resume_to_the_same_bits(
    two_ranks: tuple[Path, list[dict[str, Any]]],
) -> None:
    _, ranks = two_ranks
    assert ranks[0]["stopped"] == ranks[1]["stopped"]
    assert 4 <= ranks[0]["stopped"]["step"] < 8
    assert ranks[0]["resumed"]["digest"] == ranks[0]["first"]["digest"]


def test_ranks_run_with_the_threads_they_were_given(two_ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    _, ranks = two_ranks
    for rank in ranks:
        assert rank["process"]["torch_threads"] == 1
        assert rank["process"]["OMP_NUM_THREADS"] == "1"
