"""What nothing names is found and deleted, on a real server; what is named, young, in the making or unclear stays."""

from __future__ import annotations

import dataclasses
import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from modelmill.components.core import s3
from modelmill.components.core.errors import UserError
from modelmill.components.core.home import Home
from modelmill.components.core.manifest import Manifest
from modelmill.components.core.step import finished_manifest
from modelmill.components.core.store import S3Store, open_store
from modelmill.components.core.store_leftovers import Kept, Leftover, in_home, in_s3
from tests.components.core.stored_steps import Bucket, Config, register, run, train, write
from tests.fakes.s3_server import READER

DAY = 86_400


def look(*, delete: bool = False, days: float = 30) -> list[Leftover | Kept]:
    """What is 30 days old after so many days in which nothing is written."""
    store = open_store(Home.current().store)
    assert isinstance(store, S3Store)
    return list(in_s3(store, time.time() - 30 * DAY + days * DAY + 60, delete=delete))


def killed_upload(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the files of an output without a manifest."""

    def die(*_: Any) -> None:
        raise RuntimeError("killed")

    with monkeypatch.context() as patched:
        patched.setattr(S3Store, "_commit", die)
        with pytest.raises(SystemExit):
            run(write, config)


@pytest.fixture
def aged(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], None]:
    """Let the server say that objects are 40 days older than they are."""
    old: set[str] = set()
    real = s3.iter_objects

    def listed(*given: Any) -> Iterator[s3.DatedObject]:
        for entry in real(*given):
            by = 40 * DAY if entry.key.removeprefix("deep/prefix/") in old else 0
            yield dataclasses.replace(entry, modified=entry.modified - by)

    monkeypatch.setattr(s3, "iter_objects", listed)
    return lambda names: old.update(names)


def test_what_no_manifest_names_goes_and_nothing_else(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = run(write)
    numbers = [run(register) for _ in range(3)]
    before = set(bucket.objects())
    killed_upload(Config(text="unfinished"), monkeypatch)
    [unfinished] = {name.split("/data/")[0] for name in set(bucket.objects()) - before if "/data/" in name}
    strangers = ["notes.txt", "write/notes", f"{kept.key}/{kept.digest[:16]}/x", f"a/b/{'0' * 24}/{'0' * 16}/x"]
    for name in strangers:
        bucket.put(name, b"mine")
    beside = f"deep/prefix2/write/{'0' * 24}/{'0' * 16}/data/x"
    bucket.server.client().put_object(Bucket=bucket.name, Key=beside, Body=b"another store's")
    replaced = [f"register/{each.key}/{each.digest[:16]}" for each in numbers[:2]]
    all_of_them = bucket.objects()

    found = look()
    assert {(each.place, each.reason) for each in found} == {
        *((f"{bucket.uri}/{name}", "replaced") for name in replaced),
        (f"{bucket.uri}/{unfinished}", "without a manifest"),
    }
    sizes = {(each.files, each.bytes) for each in found if isinstance(each, Leftover)}
    assert sizes == {(1, 1), (2, 12)}
    assert bucket.objects() == all_of_them, "a look deletes nothing"

    assert look(delete=True) == found
    gone = tuple(f"{name}/" for name in [*replaced, unfinished])
    assert bucket.objects() == [name for name in all_of_them if not name.startswith(gone)]
    assert look() == []
    bucket.use("elsewhere")
    assert kept.path("deep/text.txt").read_text() == "hello"
    assert numbers[2].path("number").read_text() == "4"
    assert finished_manifest(Home.current().store, "write", kept.key) == kept


def test_age_counts_from_the_day_it_was_replaced(bucket: Bucket, aged: Callable[[list[str]], None]) -> None:
    """A run that began before may still read it, however old its files are."""
    first = run(register)
    aged([name for name in bucket.objects() if f"/{first.digest[:16]}/" in name])
    run(register)
    assert look(delete=True, days=0) == []
    aged([name for name in bucket.objects() if name.endswith("manifest.json")])
    assert [each.reason for each in look(delete=True, days=0)] == ["replaced"]


def test_an_upload_with_one_young_file_stays(
    bucket: Bucket, aged: Callable[[list[str]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    killed_upload(Config(), monkeypatch)
    files = [name for name in bucket.objects() if "/data/" in name]
    assert len(files) == 2
    aged(files[:1])
    assert look(delete=True, days=0) == []
    aged(files)
    [found] = look(delete=True, days=0)
    assert isinstance(found, Leftover)
    assert found.files == 2


def test_an_upload_of_this_home_is_told_by_its_lock(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    real, seen = s3.upload, []

    def upload(*given: Any) -> None:
        real(*given)
        seen.append(look(delete=True))

    monkeypatch.setattr(s3, "upload", upload)
    made = run(write)
    assert seen == [[Kept(f"{bucket.uri}/write/{made.key}", "a step is making it")]] * 2
    bucket.use("elsewhere")
    assert made.folder("deep").joinpath("text.txt").read_text() == "hello"


def test_an_upload_of_another_home_is_told_by_its_age(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    real, seen = s3.upload, []

    def upload(*given: Any) -> None:
        real(*given)
        with monkeypatch.context() as patched:
            patched.setenv("MODELMILL_HOME", os.environ["MODELMILL_HOME"] + "-of-the-team")
            seen.append(look(delete=True, days=29))

    monkeypatch.setattr(s3, "upload", upload)
    made = run(write)
    assert seen == [[], []]
    bucket.use("elsewhere")
    assert made.folder("deep").joinpath("text.txt").read_text() == "hello"


def test_parts_of_an_upload_under_way_are_not_objects(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    killed_upload(Config(), monkeypatch)
    client, name = bucket.server.client(), next(name for name in bucket.objects() if "/data/deep" in name)
    key = {"Bucket": bucket.name, "Key": f"deep/prefix/{name.replace('text.txt', 'large')}"}
    upload = client.create_multipart_upload(**key)["UploadId"]
    part = client.upload_part(**key, UploadId=upload, PartNumber=1, Body=b"x" * 100)
    assert [each.reason for each in look(delete=True)] == ["without a manifest"]
    parts = {"Parts": [{"PartNumber": 1, "ETag": part["ETag"]}]}
    client.complete_multipart_upload(**key, UploadId=upload, MultipartUpload=parts)
    assert client.get_object(**key)["Body"].read() == b"x" * 100


@pytest.mark.parametrize(
    ("manifest", "words"),
    [
        (b'{"kind":', "its manifest cannot be read (manifest: s3://"),
        (b'{"schema_version": 99, "kind": "x", "owner": "y"}', "has schema version 99; this is 1"),
        (b'{"kind": "registration", "uri": "s3://bucket/register/k/0/data", "files": []}', "manifest names are gone"),
    ],
    ids=["broken", "of a later version", "of other files"],
)
def test_an_output_whose_manifest_says_nothing_stays(bucket: Bucket, manifest: bytes, words: str) -> None:
    run(register)
    made = run(register)
    bucket.put(f"register/{made.key}/manifest.json", manifest)
    objects = bucket.objects()
    [found] = look(delete=True)
    assert isinstance(found, Kept)
    assert words in found.reason
    assert bucket.objects() == objects


@pytest.mark.parametrize("had_one", [True, False], ids=["replaced", "finished"])
def test_a_manifest_that_is_written_meanwhile(
    bucket: Bucket, aged: Callable[[list[str]], None], monkeypatch: pytest.MonkeyPatch, had_one: bool
) -> None:
    """By another home: between two looks an old output takes the place, or an old upload is finished."""
    run(register)
    made = run(register)
    name = f"register/{made.key}/manifest.json"
    committed = bucket.read(name)
    other = committed.replace(made.digest[:16].encode(), b"0" * 16).replace(b'"bytes": 1', b'"bytes": 2')
    if not had_one:
        bucket.server.client().delete_object(Bucket=bucket.name, Key=f"deep/prefix/{name}")
    aged([each for each in bucket.objects() if had_one or "manifest" not in each])
    listed = s3.iter_objects

    def meanwhile(uri: str, *given: Any) -> Iterator[s3.DatedObject]:
        if made.key in uri:
            bucket.put(name, other if had_one else committed)
            for entry in listed(uri, *given):
                young = entry.key.endswith("manifest.json")
                yield dataclasses.replace(entry, modified=time.time()) if young else entry
        else:
            yield from listed(uri, *given)

    monkeypatch.setattr(s3, "iter_objects", meanwhile)
    found = look(delete=True, days=0)
    assert not [each for each in found if isinstance(each, Leftover)]
    assert bucket.objects().count(name) == 1
    assert len([each for each in bucket.objects() if "/data/" in each]) == 2


def test_who_may_only_read_may_look(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    run(register)
    run(register)
    objects = bucket.objects()
    bucket.server.enter(monkeypatch, READER)
    assert [each.reason for each in look()] == ["replaced"]
    with pytest.raises(
        UserError, match=r"^MODELMILL_STORE: s3://\S+/number: access is denied; allow s3:DeleteObject$"
    ):
        look(delete=True)
    assert bucket.objects() == objects
    bucket.server.enter(monkeypatch, ("nobody", "x"))
    with pytest.raises(UserError, match=r"^MODELMILL_STORE: s3://\S+ the credentials are refused"):
        look()


def test_many_objects_go_in_batches(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "_BATCH", 2)
    for number in range(5):
        bucket.put(f"{number}", b"x")
    keys = [f"deep/prefix/{number}" for number in range(4)]
    s3.delete_objects(bucket.name, [*keys, "deep/prefix/absent"], None, "test")
    assert bucket.objects() == ["4"]


def test_unfinished_folders_of_a_home(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    made = run(write)
    with pytest.raises(SystemExit):
        run(train)
    [partial] = (home.store / "train").glob("*.partial")
    size = sum(path.stat().st_size for path in partial.rglob("*") if path.is_file())
    now = time.time()
    assert list(in_home(home.store, now - 60, delete=True)) == [], "too young"

    [found] = in_home(home.store, now + 60, delete=False)
    assert isinstance(found, Leftover)
    assert (found.place, found.reason, found.files, found.bytes) == (str(partial), "unfinished", 1, size)
    assert partial.exists()

    for path in (partial / "data", partial):
        os.utime(path, (0, 0))
    assert list(in_home(home.store, now - 60, delete=True)) == [], "a file inside is young"

    with partial.with_suffix(".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert list(in_home(home.store, now + 60, delete=True)) == [Kept(str(partial), "a step is making it")]
    assert partial.exists()

    with monkeypatch.context() as patched:

        def refuse(path: Path) -> None:
            raise PermissionError(13, "Permission denied", str(path))

        patched.setattr(shutil, "rmtree", refuse)
        with pytest.raises(UserError, match=r"^MODELMILL_HOME: \S+\.partial cannot be changed \(Permission denied\)"):
            list(in_home(home.store, now + 60, delete=True))

    assert len(list(in_home(home.store, now + 60, delete=True))) == 1
    assert not partial.exists()
    assert finished_manifest(home.store, "write", made.key) == made
    assert Manifest.read(home.store / "write" / made.key / "manifest.json") == made
