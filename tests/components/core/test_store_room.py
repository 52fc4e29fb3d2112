"""The count of what a cache holds: what it spares, and its truth beside other processes, failures and kills."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from modelmill.components.core import s3, store_room
from modelmill.components.core.errors import UserError
from modelmill.components.core.home import Home
from modelmill.components.core.store_cache import Cache, RemoteFile, release
from modelmill.components.core.store_room import Room


def artifact(number: int, size: int = 1000) -> tuple[str, RemoteFile]:
    """An artifact of one file; `downloads` makes its bytes."""
    content = b"%d" % (number % 10) * size
    return f"s3://bucket/{number}/data", RemoteFile("deep/file", size, hashlib.sha256(content).hexdigest())


@pytest.fixture(autouse=True)
def downloads(home: Home, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Downloads without a server."""

    def download(client: Any, bucket: str, key: str, target: Path) -> None:
        size = int(target.parent.name)
        target.write_bytes(b"%d" % (int(key.split("/")[0]) % 10) * size)

    monkeypatch.setattr(s3, "s3_client", lambda *_: None)
    monkeypatch.setattr(s3, "download", download)
    release()
    yield
    release()


def counted(cache: Cache) -> int:
    return int((cache.root / "count").read_text().split()[0])


def stored(cache: Cache) -> int:
    return sum(path.stat().st_size for path in cache.root.glob("*/data/**/*") if path.is_file())


def forget_measuring(cache: Cache, measured: int = 0) -> None:
    used, patience, _ = (cache.root / "count").read_text().split()
    (cache.root / "count").write_text(f"{used} {patience} {measured:019d}\n")


def fetch_and_release(cache: Cache, number: int, size: int = 1000) -> None:
    cache.fetch(*artifact(number, size), "test")
    release()


@contextmanager
def looks(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Every look at the file system by its name: folders listed, files asked for their state."""
    seen: list[str] = []
    with monkeypatch.context() as patched:
        for real in (os.scandir, os.listdir, os.stat, os.lstat):

            def look(*given: Any, real: Any = real, **options: Any) -> Any:
                seen.append(real.__name__)
                return real(*given, **options)

            patched.setattr(os, real.__name__, look)
        yield seen


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Artifacts whose size was taken."""
    taken: list[Path] = []
    real = store_room._size
    monkeypatch.setattr(store_room, "_size", lambda entry: (taken.append(entry), real(entry))[1])
    return taken


def test_a_file_more_costs_the_same_however_many_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spent = []
    for others in (2, 60):
        cache = Cache(tmp_path / f"cache{others}", limit=10**9)
        for number in range(others):
            fetch_and_release(cache, number)
        with looks(monkeypatch) as seen:
            fetch_and_release(cache, 1000)
        spent.append(sorted(seen))
        forget_measuring(cache)
        with looks(monkeypatch) as seen:
            fetch_and_release(cache, 2000)
        assert len(seen) > others, "the looks of a measurement are seen"
    assert spent[0] == spent[1]


def test_a_full_cache_is_measured_once_for_a_tenth_of_it(tmp_path: Path, measured: list[Path]) -> None:
    cache = Cache(tmp_path / "cache", limit=50_000)
    for number in range(50):
        fetch_and_release(cache, number)
    assert len(measured) == 0, "nothing was there when it was first measured"
    for number in range(50, 100):
        fetch_and_release(cache, number)
        assert stored(cache) <= 50_000
    assert counted(cache) == stored(cache) >= 40_000
    assert 0 < len(measured) <= 50 * (50_000 // 5000)
    assert not cache.folder(artifact(0)[0]).exists()


def test_a_limit_that_gave_way_is_not_tried_with_every_file(tmp_path: Path, measured: list[Path]) -> None:
    cache = Cache(tmp_path / "cache", limit=400)
    for number in range(80):
        cache.fetch(*artifact(number, 10), "test")
    assert counted(cache) == stored(cache) == 800
    measurements = measured.count(cache.folder(artifact(0)[0]).parent)
    assert 0 < measurements <= 400 // 20, "40 files came while it was full"
    release()
    cache.fetch(*artifact(1000, 30), "test")
    assert stored(cache) <= 400


def _fetch_many(cache: Cache, first: int, start: Any) -> None:
    start.wait(60)
    for number in range(first, first + 40):
        fetch_and_release(cache, number % 60)


def test_processes_that_fetch_and_drop_at_once_count_together(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", limit=20_000)
    context = multiprocessing.get_context("fork")
    start = context.Event()
    processes = [context.Process(target=_fetch_many, args=(cache, first, start)) for first in (0, 10, 20, 30)]
    for process in processes:
        process.start()
    start.set()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert 10_000 <= stored(cache) <= counted(cache) <= 20_000
    forget_measuring(cache)
    fetch_and_release(cache, 100)
    assert counted(cache) == stored(cache)


def test_a_download_that_fails_gives_its_room_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Cache(tmp_path / "cache", limit=10**9)
    fetch_and_release(cache, 1)
    uri, file = artifact(2)
    with pytest.raises(UserError, match="holds other bytes"):
        cache.fetch(uri, RemoteFile(file.path, file.bytes, "0" * 64), "test")
    assert counted(cache) == stored(cache) == 1000
    assert not list(cache.root.glob("*/part"))


def test_what_a_killed_process_left_counts_until_the_cache_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Cache(tmp_path / "cache", limit=10**9)
    fetch_and_release(cache, 1)

    def dies() -> None:
        s3.download = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        fetch_and_release(cache, 2)

    process = multiprocessing.get_context("fork").Process(target=dies)
    process.start()
    process.join()
    assert (stored(cache), counted(cache)) == (1000, 2000)
    fetch_and_release(cache, 2)
    assert (stored(cache), counted(cache)) == (2000, 3000), "too much, never too little"
    forget_measuring(cache)
    fetch_and_release(cache, 3)
    assert counted(cache) == stored(cache) == 3000


def test_a_file_on_its_way_is_measured_whole(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", limit=10**9)
    fetch_and_release(cache, 1)
    with Room(cache.root, cache.limit).reserved(cache.root / "other", 5000, needed=0):
        forget_measuring(cache)
        fetch_and_release(cache, 2)
        assert counted(cache) == 7000


@pytest.mark.parametrize("damage", ["gone", "empty", "words", "old", "of the future"])
def test_a_count_that_cannot_be_trusted_is_made_again(tmp_path: Path, damage: str, measured: list[Path]) -> None:
    cache = Cache(tmp_path / "cache", limit=10**9)
    fetch_and_release(cache, 1)
    count = cache.root / "count"
    now = int(count.read_text().split()[2])
    if damage == "gone":
        count.unlink()
    elif damage in ("old", "of the future"):
        count.write_text(f"{7:019d} {0:019d} {now + (-86_500 if damage == 'old' else 90):019d}\n")
    else:
        count.write_text("" if damage == "empty" else "some words that are longer than the record is " * 3)
    fetch_and_release(cache, 2)
    assert measured == [cache.folder(artifact(1)[0]).parent]
    assert counted(cache) == stored(cache) == 2000
    fetch_and_release(cache, 3)
    assert len(measured) == 1, "and then trusted"


def test_a_disk_smaller_than_the_limit_is_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measured: list[Path]
) -> None:
    cache, real = Cache(tmp_path / "cache", limit=10**9), shutil.disk_usage(tmp_path)
    disk = store_room._SPARE + 20_000
    monkeypatch.setattr(store_room.shutil, "disk_usage", lambda _: real._replace(free=disk - stored(cache)))
    for number in range(60):
        fetch_and_release(cache, number)
        assert stored(cache) <= 20_000
    assert counted(cache) == stored(cache) >= 15_000
    assert 0 < len(measured) <= 20 * (40_000 // 2000 + 1), "not with every file"


def test_what_was_published_counts(tmp_path: Path) -> None:
    cache, (uri, file) = Cache(tmp_path / "cache", limit=10**9), artifact(1)
    (tmp_path / "made" / "deep").mkdir(parents=True)
    (tmp_path / "made" / "deep" / "file").write_bytes(b"1" * 1000)
    cache.adopt(uri, tmp_path / "made", [file])
    assert counted(cache) == stored(cache) == 1000
    assert not list(cache.root.glob("*/part"))
