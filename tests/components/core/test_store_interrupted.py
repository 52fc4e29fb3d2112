"""Outputs that are not finished at once: damage, kills, races, a store that goes away."""

from __future__ import annotations

import json
import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest

from modelmill.components.core.errors import UserError
from modelmill.components.core.home import Home
from modelmill.components.core.step import finished_manifest
from modelmill.components.core.store import S3Store, noted_folder
from modelmill.components.core.store_cache import Cache
from tests.components.conftest import RunFolder
from tests.components.core.stored_steps import CALLS, Bucket, Config, refused, run, train, write


@pytest.mark.parametrize("damage", ["missing object", "truncated object", "broken manifest", "no manifest"])
def test_a_damaged_output_is_made_again(bucket: Bucket, damage: str) -> None:
    made = run(write)
    data, manifest = f"write/{made.key}/{made.digest[:16]}/data/deep/text.txt", f"write/{made.key}/manifest.json"
    if damage == "truncated object":
        bucket.put(data, b"hell")
    elif damage == "broken manifest":
        bucket.put(manifest, b'{"kind":')
    else:
        key = data if damage == "missing object" else manifest
        bucket.server.client().delete_object(Bucket=bucket.name, Key=f"deep/prefix/{key}")
    bucket.use("elsewhere")
    assert finished_manifest(Home.current().store, "write", made.key) is None
    again = run(write)
    assert (again.digest, len(CALLS)) == (made.digest, 2)
    bucket.use("a third")
    assert again.path("deep/text.txt").read_text() == "hello"
    assert run(write) == again


@pytest.mark.parametrize("damage", ["gone", "truncated", "other bytes"])
def test_bytes_that_were_not_written_are_never_read(bucket: Bucket, damage: str) -> None:
    made = run(write)
    key = f"write/{made.key}/{made.digest[:16]}/data/deep/text.txt"
    if damage == "gone":
        bucket.server.client().delete_object(Bucket=bucket.name, Key=f"deep/prefix/{key}")
    else:
        bucket.put(key, b"hell" if damage == "truncated" else b"hellO")
    bucket.use("elsewhere")
    words = {
        "gone": "the object is gone",
        "truncated": "has 4 bytes, 5 were written; delete the manifest.json",
        "other bytes": "holds other bytes than were written .*; delete the manifest.json",
    }
    for _ in range(2):
        with pytest.raises(UserError, match=f"^text: {bucket.uri}/{key}:? {words[damage]}"):
            made.path("deep/text.txt")
    assert not [path for path in Cache.current().root.rglob("*") if path.name in ("text.txt", "part")]
    bucket.put(key, b"hello")
    assert made.path("deep/text.txt").read_text() == "hello"


def test_a_checkpoint_survives_in_the_home(bucket: Bucket, home: Home) -> None:
    with pytest.raises(SystemExit):
        run(train)
    assert [path.suffix for path in sorted((home.store / "train").iterdir())] == [".lock", ".partial"]
    assert run(train).path("steps").read_text() == "xx"
    assert [path.suffix for path in sorted((home.store / "train").iterdir())] == ["", ".lock"]


def test_a_killed_upload_is_finished_by_the_next_attempt(
    bucket: Bucket, home: Home, make_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the files and the manifest nothing is finished; what was computed is not computed again."""

    class Killed(BaseException):
        pass

    def die(*_: Any) -> None:
        raise Killed

    folder: RunFolder = make_run(home)
    folder.enter()
    with monkeypatch.context() as patched:
        patched.setattr(S3Store, "_commit", die)
        with pytest.raises(SystemExit):
            run(write)
    [key] = {name.split("/")[1] for name in bucket.objects() if name.count("/") > 1}
    assert finished_manifest(home.store, "write", key) is None
    assert not [name for name in bucket.objects() if name.endswith("manifest.json")]
    made = run(write)
    assert (made.key, CALLS) == (key, ["hello"])
    assert finished_manifest(home.store, "write", key) == made
    kept = bucket.read(f"write/{key}/{made.digest[:16]}/tracking.jsonl").decode()
    assert '"letters": 5' in kept.replace('":', '": ').replace("  ", " ")
    text = json.loads((noted_folder(made.uri) / "manifest.json").read_text())
    assert text["uri"] == made.uri


def test_what_a_killed_attempt_left_in_the_home_is_published_only_if_it_is_whole(
    bucket: Bucket, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(S3Store, "_upload", lambda *_: (_ for _ in ()).throw(RuntimeError("killed")))
        with pytest.raises(SystemExit):
            run(write)
    [partial] = (home.store / "write").glob("*.partial")
    (partial / "data" / "deep" / "text.txt").write_text("hellO")
    made = run(write)
    assert (made.path("deep/text.txt").read_text(), CALLS) == ("hello", ["hello", "hello"])


def test_killed_after_the_commit_leaves_nothing_behind(
    bucket: Bucket, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(Cache, "adopt", lambda *_: (_ for _ in ()).throw(RuntimeError("killed")))
        with pytest.raises(SystemExit):
            run(write)
    assert list((home.store / "write").glob("*.partial"))
    made = run(write)
    assert CALLS == ["hello"]
    assert not list((home.store / "write").glob("*.partial"))
    assert made.path("deep/text.txt").read_text() == "hello"


def _in_home(home: Path, wait: str, queue: Any) -> None:
    os.environ["MODELMILL_HOME"] = str(home)
    made = run(write, Config(wait=wait))
    queue.put((os.getpid(), made.digest, made.path("who").read_text()))


def test_two_pods_without_a_common_lock_agree_on_one_output(bucket: Bucket, tmp_path: Path) -> None:
    """Each computes, with other bytes; the first manifest stays, and both go on with it."""
    (tmp_path / "wait").mkdir()
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    homes = [tmp_path / "one", tmp_path / "two"]
    processes = [context.Process(target=_in_home, args=(each, str(tmp_path / "wait"), queue)) for each in homes]
    for process in processes:
        process.start()
    answers = [queue.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert len({pid for pid, _, _ in answers}) == 2
    assert len({digest for _, digest, _ in answers}) == 1
    assert len({who for _, _, who in answers}) == 1, "both read the winner's bytes"
    manifests = [key for key in bucket.objects() if key.endswith("manifest.json")]
    assert len(manifests) == 1
    assert len({key.split("/")[2] for key in bucket.objects() if "/data/" in key}) == 1, (
        "the loser's files are removed"
    )
    assert not [path for each in homes for path in (each / "store" / "write").glob("*.partial")]


def test_an_answer_that_was_lost_does_not_make_two(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client tries a write again whose answer it did not see, and is told that there is one already: its own."""
    put = S3Store._put

    def twice(self: S3Store, name: str, text: bytes, **condition: str) -> bool:
        put(self, name, text, **condition)
        return put(self, name, text, **condition)

    monkeypatch.setattr(S3Store, "_put", twice)
    made = run(write)
    assert made.path("deep/text.txt").read_text() == "hello"
    assert run(write) == made


def test_a_store_that_goes_away_while_a_step_computes(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The upload fails in one line, the work is kept, and the next attempt only uploads."""
    checked = S3Store.check

    def check(self: S3Store, step: str) -> None:
        checked(self, step)
        os.environ["AWS_ENDPOINT_URL_S3"] = "http://127.0.0.1:9"

    with monkeypatch.context() as patched:
        patched.setenv("AWS_ENDPOINT_URL_S3", bucket.server.endpoint)
        patched.setattr(S3Store, "check", check)
        line = refused(capsys)
    assert line.startswith(f"MODELMILL_STORE: {bucket.uri}/write/")
    assert "cannot be reached at http://127.0.0.1:9" in line
    made = run(write)
    assert (made.path("deep/text.txt").read_text(), CALLS) == ("hello", ["hello"])
