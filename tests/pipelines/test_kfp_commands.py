"""The command against a cluster: what is printed, what it leaves with, and what it refuses before anything is sent."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from modelmill.components.core.errors import UserError
from modelmill.components.core.home import Home
from modelmill.pipelines.cli import cli
from modelmill.pipelines.launch import cancel
from modelmill.pipelines.launch.runs import Run, all_runs
from tests.pipelines.cluster import Cluster, cluster
from tests.pipelines.conftest import COMMAND, run, wait_for


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared_store: str) -> Iterator[Cluster]:
    with cluster(tmp_path, monkeypatch, shared_store) as found:
        folder = tmp_path / "profiles"
        folder.mkdir()
        (folder / "test.yaml").write_text(found.profile().model_dump_json())
        monkeypatch.setenv("MODELMILL_PROFILES", str(folder))
        yield found


def command(*words: str) -> Result:
    """The command in this process: importing everything anew costs seconds."""
    return CliRunner().invoke(cli, words)


def refused(*words: str) -> str:
    result = command(*words)
    assert isinstance(result.exception, UserError), (result.output, result.exception)
    return str(result.exception)


def test_a_detached_run_says_how_to_find_it_and_is_listed(here: Cluster) -> None:
    done = command("run", "words", "--on", "kfp", "--profile", "test", "--detach")
    assert done.exit_code == 0, (done.output, done.exception)
    (kept,) = all_runs(Home.current())
    run_id = kept.record.place["run_id"]
    assert f"{here.api.url}/#/runs/details/{run_id}" in done.output
    (entry,) = json.loads(command("runs", "--json").output)
    assert (entry["state"], entry["place"]["profile"]) == ("running", "test")
    here.api.end(run_id, "SUCCEEDED")
    assert json.loads(command("runs", "--json", "--offline").output)[0]["state"] == "running"
    assert json.loads(command("runs", "--json").output)[0]["state"] == "succeeded"
    (there,) = json.loads(command("runs", "--profile", "test", "--json").output)
    assert (there["run"], there["name"]) == (run_id, kept.id)


def test_an_endpoint_that_is_away_costs_the_list_one_line(here: Cluster) -> None:
    command("run", "words", "--profile", "test", "--detach")
    here.api.fail(503, times=99)
    done = command("runs")
    assert done.exit_code == 0
    assert "as it was seen last" in done.output
    assert " test " in done.output


def test_schedules_by_command(here: Cluster) -> None:
    words = ("schedule", "words", "--profile", "test", "--cron", "0 6 * * *", "--name", "nightly")
    assert "created: nightly, cron 0 0 6 * * * UTC" in command(*words).output
    assert "unchanged: nightly" in command(*words).output
    assert command("schedules", "pause", "nightly", "--profile", "test").output == "paused: nightly\n"
    (found,) = json.loads(command("schedules", "--profile", "test", "--json").output)
    assert (found["name"], found["enabled"], found["timing"]["cron"]) == ("nightly", False, "0 0 6 * * *")
    assert "paused; `modelmill schedules resume nightly" in command(*words).output
    assert "no schedule is called 'nihgtly'; did you mean nightly?" in refused(
        "schedules", "delete", "nihgtly", "--profile", "test"
    )
    assert command("schedules", "delete", "nightly", "--profile", "test").output == "deleted: nightly\n"
    assert not here.api.recurring


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["run", "words", "--on", "kfp"], "--on kfp: needs --profile"),
        (["run", "words", "--detach"], "--detach: a run on this machine ends with its command"),
        (["run", "words", "--on", "kfp", "--profile", "laptop"], "--profile: laptop is for this machine"),
        (["run", "words", "--on", "local", "--profile", "test"], "--on local: the profile test is for a cluster"),
        (["run", "words", "--profile-set", "retries=0"], "--profile-set: changes a profile"),
        (["run", "words", "--profile", "test", "--profile-set", "images.registry=''"], "images.registry: empty"),
        (["schedule", "words", "--profile", "test"], "give either --cron or --every"),
        (["schedules", "pause", "--profile", "test"], "name the schedule to pause"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_what_is_refused_is_sent_to_nobody(here: Cluster, words: list[str], problem: str) -> None:
    assert problem in refused(*words)
    assert not here.api.requests
    assert not all_runs(Home.current())


def test_compile_with_a_profile_writes_what_would_be_uploaded(here: Cluster, tmp_path: Path) -> None:
    done = command("compile", "words", "--profile", "test", "-o", str(tmp_path / "out"))
    assert done.exit_code == 0, (done.output, done.exception)
    text = (tmp_path / "out" / "words.yaml").read_text()
    assert "registry.example/team" in text
    assert "close-run" in text


def test_a_cancelled_cluster_run_is_cancelled_there(here: Cluster) -> None:
    command("run", "words", "--profile", "test", "--detach")
    (kept,) = all_runs(Home.current())
    assert f"{kept.id}: cancelled" in command("cancel", "latest").output
    assert here.api.runs[kept.record.place["run_id"]]["state"] == "FAILED", "as the workflow of a terminated run"
    assert "there is nothing to cancel" in refused("cancel", "latest")


def test_cancel_ends_a_run_of_this_machine(tmp_path: Path) -> None:
    settings = ["--set", "count.behaviour=sleep", "--set", f"count.scratch={tmp_path}", "--grace", "2"]
    process = subprocess.Popen(
        [*COMMAND, "run", "words", *settings], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    wait_for(lambda: (tmp_path / "pids").exists(), 60)
    (kept,) = all_runs(Home.current())
    assert cancel.cancel_local(kept, 2.0) == "cancelled"
    assert process.wait(90) == 143
    assert not Run.open(kept.folder).alive
    with pytest.raises(UserError, match="nothing to cancel"):
        cancel.cancel_local(Run.open(kept.folder), 2.0)


def test_cancel_spares_a_process_that_only_has_the_number(tmp_path: Path) -> None:
    finished = run().run
    lock = finished.hold()
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    finished.record.state, finished.record.pid = "running", sleeper.pid
    finished.save()
    try:
        with pytest.raises(UserError, match="not on this machine"):
            cancel.cancel_local(Run.open(finished.folder), 1.0)
        assert sleeper.poll() is None
    finally:
        sleeper.kill()
        sleeper.wait()
        os.close(lock)


def test_outputs_of_a_run_are_fetched_whole_or_refused(tmp_path: Path) -> None:
    made = run().run
    done = command("fetch", made.id, "--step", "write_words", "-o", str(tmp_path / "out"), "--json")
    assert json.loads(done.output)["files"] == 1
    assert (tmp_path / "out" / "words.txt").read_text() == "the quick brown fox"
    assert "made no model; name the output with --step" in refused("fetch", made.id, "-o", str(tmp_path / "new"))
    assert "is not an empty folder" in refused("fetch", made.id, "--step", "write_words", "-o", str(tmp_path / "out"))
    assert "no output of 'words'" in refused("fetch", made.id, "--step", "words", "-o", str(tmp_path / "new"))
    assert f"report: {made.id} has no report" in refused("report", made.id)
    words = next((Home.current().store / "write_words").glob("*/data/words.txt"))
    words.write_text("the quick brown dog")
    assert "corrupt" in refused("fetch", made.id, "--step", "write_words", "-o", str(tmp_path / "new"))
    assert not [path for path in tmp_path.iterdir() if "new" in path.name], "not a part of it either"
    below = str(tmp_path / "out" / "words.txt" / "x")
    assert "cannot be filled" in refused("fetch", made.id, "--step", "write_words", "-o", below)
