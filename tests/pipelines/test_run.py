"""What a run leaves behind, how it says what went wrong, and what kfp's habits may not do."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

from modelmill.components.core.errors import UserError
from modelmill.components.core.events import read_lines
from modelmill.components.core.home import Home
from modelmill.components.core.manifest import Manifest
from modelmill.pipelines import catalog
from modelmill.pipelines.launch import backlog, forkserver
from modelmill.pipelines.launch.local import run_local
from modelmill.pipelines.launch.runs import Run, all_runs, find_run
from tests.pipelines.conftest import COMMAND, leftovers, modelmill, recipe, run, states, wait_for


def spool(result_folder: Path, name: str) -> list[dict[str, object]]:
    return [record for _, record in read_lines(result_folder / "spool" / f"{name}.jsonl")]


def test_a_run_keeps_everything_in_its_folder(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    private = Path(tempfile.mkdtemp(prefix="mm-"))  # other tests leave their own things in the common folder
    request.addfinalizer(lambda: shutil.rmtree(private))
    monkeypatch.setattr(tempfile, "tempdir", str(private))
    result = run()
    assert (result.state, result.exit_code) == ("succeeded", 0)
    assert states(result) == dict.fromkeys(["write_words", "count_words", "announce", "archive"], "finished")
    folder = result.run.folder
    for name in ("recipe.yaml", "sections.json", "run.json", "events.jsonl", "driver.log", "environment.txt"):
        assert (folder / name).stat().st_size > 0, name
    assert (folder / "logs" / "count_words.log").read_text().startswith("counting on standard output")
    assert "kfp==" in (folder / "environment.txt").read_text()
    assert catalog.SHIPPED is not catalog.current()
    left = {path.name for path in private.iterdir()}
    assert not any(name.startswith(("modelmill-", "kfp-workspace-")) for name in left)
    assert {path.name for path in tmp_path.iterdir()} == {"home"}
    assert not leftovers(home)


def test_the_pipeline_run_is_recorded_for_tracking() -> None:
    result = run()
    records = spool(result.run.folder, "_run")
    kinds = [record["type"] for record in records]
    assert kinds[0] == "start"
    assert kinds[-1] == "end"
    assert records[-1]["status"] == "FINISHED"
    tags = next(record["values"] for record in records if record["type"] == "tags")
    assert tags["modelmill.recipe_hash"] == recipe().hash  # type: ignore[index]
    kept = [str(record["path"]) for record in records if record["type"] == "artifact"]
    assert sum(path.endswith("manifest.json") for path in kept) == 4
    assert all(Path(path).is_file() for path in kept)


def test_a_second_run_reuses_and_repeats_only_side_effects(tmp_path: Path) -> None:
    ledger = tmp_path / "ledger"
    run(announce__ledger=ledger)
    again = run(announce__ledger=ledger)
    assert states(again) == {
        "write_words": "reused",
        "count_words": "reused",
        "announce": "finished",
        "archive": "reused",
    }
    assert ledger.read_text() == "19\n19\n"


def test_changing_one_section_reruns_only_what_depends_on_it() -> None:
    run()
    again = run(archive__fail_while="/nowhere")
    assert states(again)["count_words"] == "reused"
    assert states(again)["archive"] == "finished"


def test_fresh_computes_everything_again() -> None:
    run()
    again = run_local(recipe(), grace=1.0, fresh=True, deliver=False)
    assert set(states(again).values()) == {"finished"}


@pytest.mark.parametrize(
    ("behaviour", "code", "fault", "words"),
    [
        ("mistake", 2, "user", "count.text: 'x' has no letters; give some"),
        ("crash", 1, "crash", "RuntimeError: something broke"),
        ("killed", 1, "crash", "was killed by SIGKILL"),
    ],
)
def test_a_failed_step_is_named_with_its_cause(behaviour: str, code: int, fault: str, words: str) -> None:
    result = run(count__behaviour=behaviour)
    assert (result.state, result.exit_code) == ("failed", code)
    step = result.view.steps["count_words"]
    assert (step.state, step.fault) == ("failed", fault)
    assert words in step.message
    assert words in result.message
    assert result.view.steps["archive"].state == "waiting"
    assert spool(result.run.folder, "count_words")[-1] | {"time": 0} == {"type": "end", "status": "FAILED", "time": 0}
    assert spool(result.run.folder, "_run")[-1]["status"] == "FAILED"
    assert Run.open(result.run.folder).record.exit_code == code


def test_a_step_that_cannot_be_imported_is_blamed_with_the_exception() -> None:
    result = run_local(catalog.load("unimportable"), grace=1.0, deliver=False)
    assert result.exit_code == 1
    step = result.view.steps["count_words"]
    assert step.state == "failed"
    assert "No module named 'tests.pipelines.sample.nowhere'" in step.message


def test_a_refused_pipeline_starts_no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    changed = recipe().model_copy(update={"pipeline": "unimportable", "name": "x" * 5})
    shorter = changed.steps()[:2]
    monkeypatch.setattr(type(changed), "steps", lambda self: shorter)
    result = run_local(changed, grace=1.0, deliver=False)
    assert result.exit_code == 2
    assert "parameter announce belongs to no step" in result.message
    assert not list((result.run.folder / "logs").iterdir())


def test_a_background_process_a_step_forgot_neither_stalls_nor_survives_the_run(home: Home, tmp_path: Path) -> None:
    result = run(count__behaviour="leave", count__scratch=tmp_path)
    assert result.exit_code == 0
    assert not leftovers(home)


def test_text_that_kfp_would_change_arrives_unchanged(home: Home) -> None:
    """kfp puts the interpreter's path for the word python3 in every argument of a step."""
    text = "see /usr/lib/python3/dist-packages, {{workflow.name}}, 'single' \"double\" $HOME `id` \\n é 中"
    result = run(words__text=json.dumps(text))
    assert result.exit_code == 0
    manifest = next((home.store / "write_words").glob("*/manifest.json"))
    assert Manifest.read(manifest).path("words.txt").read_text() == text


def test_a_module_in_the_working_directory_shadows_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("random.py", "kfp.py", "pydantic.py"):
        (tmp_path / name).write_text("raise RuntimeError('the wrong module')\n")
    monkeypatch.chdir(tmp_path)
    assert run().exit_code == 0


def test_two_runs_at_once_share_a_home(home: Home) -> None:
    results: list[int] = []
    threads = [threading.Thread(target=lambda: results.append(run().exit_code)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [0, 0]
    assert len(all_runs(home)) == 2
    assert len(list((home.store / "count_words").glob("*/manifest.json"))) == 1


def test_a_home_that_cannot_be_written_is_one_line_and_starts_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in ("/proc/modelmill", str(tmp_path / "file" / "home")):
        with pytest.raises(UserError):
            run_local(recipe(), home=Home(Path(place)), deliver=False)


def test_runs_are_found_by_prefix_part_and_latest(home: Home) -> None:
    with pytest.raises(UserError, match="there is no run"):
        find_run(home, "latest")
    first, second = run().run, run().run
    assert find_run(home, "latest").id == second.id
    assert find_run(home, first.id[-4:]).id == first.id
    with pytest.raises(UserError, match="start of 2 runs"):
        find_run(home, first.id[:8])
    with pytest.raises(UserError, match="no run is called 'nothing'"):
        find_run(home, "nothing")


def test_points_reach_mlflow_and_the_summary_says_where(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    done = modelmill("run", "words")
    assert done.returncode == 0, done.stderr
    assert "count_words: finished after" in done.stdout
    assert "count_words.loss  4.75  (bigram 5.75)" in done.stdout
    assert f"sqlite:///{home.root}/mlflow.db" in done.stdout
    from mlflow import MlflowClient

    client = MlflowClient(home.tracking_uri)
    found = client.search_runs([client.get_experiment_by_name("modelmill").experiment_id])
    assert len(found) == 5
    assert {each.info.status for each in found} == {"FINISHED"}
    assert [each.data.metrics["loss"] for each in found if "loss" in each.data.metrics] == [4.75]


def test_steps_start_by_themselves_where_no_fork_server_can_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    result = run(count__behaviour="killed")
    assert "forkclient" not in (result.run.folder / "bin" / "python3").read_text()
    assert "was killed by SIGKILL" in result.view.steps["count_words"].message
    assert result.view.steps["write_words"].state == "finished"


def test_the_fork_server_gives_every_step_a_process_and_an_environment_of_its_own(tmp_path: Path) -> None:
    """The server speaks to the client as in a run; the modules it starts only report what they see."""
    module = tmp_path / "seen.py"
    module.write_text(
        "import json, os, random, sys, pathlib\n"
        "facts = [os.getpid(), os.getcwd(), os.environ.get('ONLY'), random.random(), sys.argv[1:], __name__]\n"
        "pathlib.Path(sys.argv[1]).write_text(json.dumps(facts))\n"
        "sys.exit(int(sys.argv[2]))\n"
    )
    exits = tmp_path / "exits"
    code = (
        "import sys; sys.path.insert(0, sys.argv.pop())\n"
        "from modelmill.pipelines.launch import backlog, forkserver\n"
        "forkserver._PRELOADED = ('seen_nothing', 'random')\n"
        "sys.modules['seen_nothing'] = sys.modules['seen'] = sys\n"
        "forkserver.main()\n"
    )
    with tempfile.TemporaryDirectory() as short, socket.socket(socket.AF_UNIX) as listener:
        address = Path(short) / "fork"
        listener.bind(str(address))
        listener.listen()
        command = [sys.executable, "-c", code, str(listener.fileno()), str(exits), str(os.getpid()), str(tmp_path)]
        server = subprocess.Popen(command, pass_fds=(listener.fileno(),))
        client = [sys.executable, "-I", "-S", str(Path(forkserver.__file__).with_name("forkclient.py"))]
        codes = []
        for number in (0, 7):
            words = ["-m", "seen", str(tmp_path / f"facts{number}"), str(number), "--function_to_execute", "a"]
            environment = {"PATH": "/usr/bin:/bin", "ONLY": f"for {number}"}
            done = subprocess.run(
                [*client, str(address), sys.executable, *words], env=environment, cwd=short, timeout=30
            )
            codes.append(done.returncode)
        server.kill()
        server.wait()
        first, second = (json.loads((tmp_path / f"facts{number}").read_text()) for number in (0, 7))
        assert codes == [0, 7]
        assert exits.read_text() == "0 a\n7 a\n"
        assert first[0] != second[0]
        assert first[1] == short
        assert (first[2], second[2]) == ("for 0", "for 7")
        assert first[3] != second[3]
        assert first[5] == "__main__"
        # The socket is still there but nobody listens: the client becomes the interpreter itself.
        listener.close()
        script = [*client, str(address), sys.executable, "-c", "import os; print(os.getppid())"]
        alone = subprocess.run(script, capture_output=True, text=True, timeout=30)
        assert int(alone.stdout) == os.getpid()


def test_a_server_that_is_down_costs_no_run_and_no_point(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        dead = f"http://127.0.0.1:{probe.getsockname()[1]}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", dead)
    done = modelmill("run", "words")
    assert done.returncode == 0, done.stderr
    assert f"{dead} cannot be used" in done.stdout
    assert backlog.waiting(home) == [all_runs(home)[0].id]


@pytest.mark.slow
def test_the_next_run_delivers_what_an_earlier_one_left(home: Home) -> None:
    left = run()
    assert backlog.waiting(home) == [left.run.id]
    assert modelmill("run", "words").returncode == 0
    wait_for(lambda: not backlog.waiting(home))


def on_small_disk(tmp_path: Path, kibibytes: int, script: str) -> subprocess.CompletedProcess[str]:
    """Run a shell script with MODELMILL_HOME on a file system of its own, which `$DISK` names."""
    disk = tmp_path / "disk"
    disk.mkdir(exist_ok=True)
    mount = f"mount -t tmpfs -o size={kibibytes}k tmpfs {disk} || exit 77; export MODELMILL_HOME={disk}/home; {script}"
    command = ["unshare", "--user", "--map-root-user", "--mount", "bash", "-c", mount]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    except FileNotFoundError:
        pytest.skip("no unshare on this machine")
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip("this machine lets nobody mount a file system")
    return done


@pytest.mark.parametrize(
    ("trouble", "words"),
    [
        ("head -c 1M /dev/zero > {disk}/fill", "the disk is full"),
        ("mount -o remount,ro {disk}", "the file system is read-only"),
    ],
    ids=["full", "read-only"],
)
def test_a_disk_that_refuses_is_one_line_before_anything_starts(tmp_path: Path, trouble: str, words: str) -> None:
    disk = tmp_path / "disk"
    script = (
        f"{trouble.format(disk=disk)} 2>/dev/null; {' '.join(COMMAND)} run words; code=$?; ls -A {disk}; exit $code"
    )
    done = on_small_disk(tmp_path, 64, script)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert f"MODELMILL_HOME: cannot write {disk}/home" in done.stderr
    assert words in done.stderr
    assert "runs" not in done.stdout


def test_a_disk_that_fills_up_during_a_step_is_the_users_to_mend(tmp_path: Path) -> None:
    script = (
        f"{' '.join(COMMAND)} run words --set count.behaviour=fill; code=$?; find $MODELMILL_HOME/store; exit $code"
    )
    done = on_small_disk(tmp_path, 4096, script)
    assert done.returncode == 2
    assert "count_words: MODELMILL_HOME: cannot write" in done.stderr
    assert "the disk is full" in done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert "write_words/" in done.stdout
    assert not any("count_words" in line and line.endswith("count.txt") for line in done.stdout.splitlines())
