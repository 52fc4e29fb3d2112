"""Event and spool lines: whole or not at all, whatever the number of writers and whatever the disk did."""

from __future__ import annotations

import json
import multiprocessing
import resource
import signal
from pathlib import Path
from typing import Any

import pytest

from modelmill.components.core import events
from modelmill.components.core.events import append_line, read_lines
from modelmill.components.core.home import Home
from tests.components.conftest import RunFolder


def write_many(path: Path, writer: int, count: int) -> None:
    for number in range(count):
        append_line(path, {"writer": writer, "number": number, "filler": "x" * (number % 700)})


def test_lines_of_several_processes_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write_many, args=(path, writer, 300)) for writer in range(4)]
    for process in writers:
        process.start()
    for process in writers:
        process.join()
    records = [record for _, record in read_lines(path)]
    assert len(records) == 1200
    for writer in range(4):
        assert [record["number"] for record in records if record["writer"] == writer] == list(range(300))


def test_reading_goes_on_from_any_record(tmp_path: Path) -> None:
    path = tmp_path / "e.jsonl"
    assert list(read_lines(path)) == []
    write_many(path, 0, 5)
    everything = list(read_lines(path))
    assert everything[-1][0] == path.stat().st_size
    for index, (offset, _) in enumerate(everything):
        assert list(read_lines(path, offset)) == everything[index + 1 :]


def test_a_half_written_tail_is_read_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "e.jsonl"
    append_line(path, {"n": 1})
    line = json.dumps({"n": 2, "text": "ü"}).encode() + b"\n"
    for cut in range(len(line)):
        with path.open("r+b") as file:
            file.seek(0, 2)
            file.write(line[:cut])
        assert [record["n"] for _, record in read_lines(path)] == [1]
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size - cut)
    with path.open("ab") as file:
        file.write(line)
    assert [record["n"] for _, record in read_lines(path)] == [1, 2]


def test_a_torn_line_costs_itself_only(tmp_path: Path) -> None:
    path = tmp_path / "e.jsonl"
    append_line(path, {"n": 1})
    with path.open("ab") as file:
        file.write(b'{"n": 2, "te')
    append_line(path, {"n": 3})
    with path.open("ab") as file:
        file.write(b"\n7\n")
    append_line(path, {"n": 4})
    assert [record["n"] for _, record in read_lines(path)] == [1, 3, 4]


def fill(path: Path, limit: int) -> None:
    """Write until the file may grow no more, then once more with room: a disk that was full for a moment."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    refused = False
    for number in range(100):
        try:
            append_line(path, {"n": number})
        except OSError:
            refused = True
            break
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    append_line(path, {"n": -1, "refused": refused})


def test_a_full_disk_is_an_error_and_later_records_are_whole(tmp_path: Path) -> None:
    path = tmp_path / "e.jsonl"
    process = multiprocessing.get_context("fork").Process(target=fill, args=(path, 61))
    process.start()
    process.join()
    assert process.exitcode == 0
    records = [record for _, record in read_lines(path)]
    assert records[-1] == {"n": -1, "refused": True}
    assert [record["n"] for record in records[:-1]] == list(range(len(records) - 1))
    assert b"\n{" in path.read_bytes()


def test_outside_a_run_nothing_happens(home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    events.emit("started")
    events.progress("x", 1, 2)
    assert list(tmp_path.iterdir()) == []


def test_progress_is_thinned_but_its_end_is_not_lost(
    home: Home, make_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run: RunFolder = make_run(home)
    run.enter("train")
    clock = iter(range(100, 10_000))
    monkeypatch.setattr(events, "_last_progress", 0.0)
    monkeypatch.setattr(events.time, "monotonic", lambda: next(clock) / 16)  # a call every 62.5 ms
    for done in range(1, 21):
        events.progress("steps", done, 20)
    done = [record["done"] for _, record in read_lines(run.path / "events.jsonl")]
    assert done == [1, 5, 9, 13, 17, 20]
    events.emit("finished", step="other", seconds=1)
    *_, (_, last) = read_lines(run.path / "events.jsonl")
    assert (last["step"], last["event"], last["seconds"]) == ("other", "finished", 1)
