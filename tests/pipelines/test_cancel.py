"""A cancelled run leaves no process, whatever its steps did and whoever is killed."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from modelmill.components.core.errors import UserError
from modelmill.components.core.events import read_lines
from modelmill.components.core.home import Home
from modelmill.pipelines.launch.runs import all_runs
from tests.pipelines.conftest import COMMAND, leftovers, living, noted, resume, states, wait_for


def start(scratch: Path, behaviour: str = "family", grace: str = "0.5") -> subprocess.Popen[str]:
    """Start the command and wait until its step has made its processes."""
    settings = ["--set", f"count.behaviour={behaviour}", "--set", f"count.scratch={scratch}", "--grace", grace]
    command = [*COMMAND, "run", "words", *settings]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: (scratch / "pids").exists())
    return process


def driver_of(command: subprocess.Popen[str]) -> psutil.Process:
    children = psutil.Process(command.pid).children()
    return next(child for child in children if "modelmill.pipelines.launch.driver" in child.cmdline())


def test_a_step_that_ends_by_itself_when_told_to_counts_as_cancelled(home: Home, tmp_path: Path) -> None:
    """As training does: on SIGTERM it saves a checkpoint and says that it was stopped."""
    process = start(tmp_path, behaviour="graceful", grace="10")
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 143
    assert "count_words  cancelled" in out
    assert "stopped after saving, told 1 times" in out
    assert all_runs(home)[-1].state == "cancelled"


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGTERM, 143),
        pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, 129, marks=pytest.mark.slow),
    ],
)
def test_a_signal_ends_every_process(home: Home, tmp_path: Path, number: int, code: int) -> None:
    process = start(tmp_path)
    pids = noted(tmp_path)
    assert len(living(pids)) == 5
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert not living(pids)
    assert not leftovers(home)
    name = signal.Signals(number).name
    assert f"cancelled by {name}" in err
    assert "count_words  cancelled" in out
    run = all_runs(home)[-1]
    assert (run.state, run.record.exit_code) == ("cancelled", code)
    assert [record for _, record in read_lines(run.folder / "spool" / "count_words.jsonl")][-1]["status"] == "KILLED"


def test_a_second_signal_ends_the_grace(home: Home, tmp_path: Path) -> None:
    process = start(tmp_path, grace="600")
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 130
    assert not living(noted(tmp_path))


def test_the_driver_cleans_up_after_a_killed_command(home: Home, tmp_path: Path) -> None:
    process = start(tmp_path)
    driver = driver_of(process)
    process.kill()
    process.wait()
    with pytest.raises(UserError, match="still running"):
        resume(all_runs(home)[-1])
    wait_for(lambda: not driver.is_running())
    assert not living(noted(tmp_path))
    assert not leftovers(home)
    run = all_runs(home)[-1]
    assert run.state == "cancelled"
    assert "command was killed" in run.record.message


def test_a_command_killed_while_it_cancels_still_leaves_nothing(home: Home, tmp_path: Path) -> None:
    """At that moment the driver is frozen; the death of its parent must wake it up."""
    process = start(tmp_path, grace="1.5")
    driver = driver_of(process)
    process.send_signal(signal.SIGTERM)
    wait_for(lambda: driver.status() == psutil.STATUS_STOPPED)
    process.kill()
    process.wait()
    wait_for(lambda: not driver.is_running())
    assert not living(noted(tmp_path))
    assert not leftovers(home)


def test_a_killed_driver_fails_the_run_and_leaves_nothing(home: Home, tmp_path: Path) -> None:
    process = start(tmp_path)
    driver_of(process).kill()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    # The orphan without the run's environment had only the driver to be found by; it is beyond reach now.
    *tagged, orphan = noted(tmp_path)
    assert not living(tagged)
    os.kill(orphan, signal.SIGKILL)
    assert "count_words" in err


def test_a_power_cut_shows_as_interrupted_and_can_be_resumed(home: Home, tmp_path: Path) -> None:
    process = start(tmp_path, behaviour="sleep")
    driver = driver_of(process)
    for victim in (process, driver):
        victim.kill()
    process.communicate()
    wait_for(lambda: not driver.is_running() and not living(noted(tmp_path)) and not leftovers(home))
    run = all_runs(home)[-1]
    assert run.state == "interrupted"
    assert run.seconds is None
    assert Path(run.record.temporary).is_dir()
    (tmp_path / "wake").touch()
    done = resume(run)
    assert done.exit_code == 0
    assert states(done)["write_words"] == "reused"
    assert not Path(run.record.temporary).exists()


def test_ctrl_c_on_a_terminal_shows_the_table_and_ends_the_run(home: Home, tmp_path: Path) -> None:
    """The real thing: a terminal, its foreground process group, and the character Ctrl-C."""
    settings = ["--set", "count.behaviour=sleep", "--set", f"count.scratch={tmp_path}", "--grace", "0.5"]
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ["TERM"] = "xterm"
        os.execv(COMMAND[0], [*COMMAND, "run", "words", *settings])
    os.set_blocking(terminal, False)
    shown = b""

    def read() -> bytes:
        nonlocal shown
        with suppress(OSError):  # nothing to read yet, or the other end is closed
            shown += os.read(terminal, 65536)
        return shown

    wait_for(lambda: (tmp_path / "pids").exists() and b"sleeping" in read())
    os.write(terminal, b"\x03")
    wait_for(lambda: (read(), not living([pid]))[1])
    read()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 130
    assert b"\x1b[" in shown
    assert b"count_words" in shown
    assert b"SIGINT" in shown
    assert not living(noted(tmp_path))
    os.close(terminal)
