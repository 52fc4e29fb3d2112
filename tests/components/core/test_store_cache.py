"""Copies of artifacts in S3 on one machine: room, use, several processes, broken transfers, a full disk."""

from __future__ import annotations

import errno
import hashlib
import multiprocessing
import os
import resource
import shutil
import signal
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from modelmill.components.core import s3, store_cache
from modelmill.components.core.errors import UserError
from modelmill.components.core.home import Home
from modelmill.components.core.store_cache import Cache, RemoteFile, release
from modelmill.components.training.launch import LAUNCHER_VARIABLE
from tests.fakes.s3_server import S3Server


class Artifacts:
    """Artifacts of one file each in a bucket of their own."""

    def __init__(self, server: S3Server) -> None:
        self.server, self.bucket = server, server.bucket()

    def make(self, name: str, content: bytes) -> tuple[str, RemoteFile]:
        self.server.client().put_object(Bucket=self.bucket, Key=f"{name}/data/file", Body=content)
        return f"s3://{self.bucket}/{name}/data", RemoteFile("file", len(content), hashlib.sha256(content).hexdigest())


@pytest.fixture
def artifacts(s3_server: S3Server, home: Home, monkeypatch: pytest.MonkeyPatch) -> Iterator[Artifacts]:
    s3_server.enter(monkeypatch)
    release()
    yield Artifacts(s3_server)
    release()


def held(cache: Cache) -> set[str]:
    return {path.read_text()[0] for path in cache.root.glob("*/data/file")}


def test_what_was_used_longest_ago_makes_room(artifacts: Artifacts, tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", limit=2500)
    made = {name: artifacts.make(name, name.encode() * 1000) for name in "abcd"}
    for age, name in enumerate("ab"):
        cache.fetch(*made[name], "test")
        os.utime(cache.folder(made[name][0]).parent.with_suffix(".lock"), (age, age))
    release()
    cache.fetch(*made["a"], "test")  # used again: b is the older one now
    release()
    cache.fetch(*made["c"], "test")
    assert held(cache) == {"a", "c"}
    release()
    cache.fetch(*made["d"], "test")
    assert len(held(cache)) == 2
    assert "d" in held(cache)
    assert cache.fetch(*made["a"], "test").read_text() == "a" * 1000, "what was dropped is fetched again"


def _use(cache: Cache, made: tuple[str, RemoteFile], ready: Any, done: Any) -> None:
    cache.fetch(*made, "test")
    ready.set()
    done.wait(60)


def test_what_a_process_uses_stays(artifacts: Artifacts, tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", limit=1500)
    made = {name: artifacts.make(name, name.encode() * 1000) for name in "abc"}
    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()
    user = context.Process(target=_use, args=(cache, made["a"], ready, done))
    user.start()
    assert ready.wait(60)
    cache.fetch(*made["b"], "test")
    release()
    cache.fetch(*made["c"], "test")
    assert held(cache) == {"a", "c"}, "a is in use elsewhere, and the limit gives way"
    done.set()
    user.join()
    release()
    cache.fetch(*made["b"], "test")
    assert held(cache) == {"b"}


def _fetch(cache: Cache, made: tuple[str, RemoteFile], start: Any) -> None:
    start.wait(60)
    downloads = []
    real = s3.download
    s3.download = lambda *given: (downloads.append(1), real(*given))  # type: ignore[assignment]
    assert cache.fetch(*made, "test").stat().st_size == made[1].bytes
    (cache.root / f"downloads-{os.getpid()}").write_text(str(len(downloads)))


def test_processes_that_want_the_same_file_download_it_once(artifacts: Artifacts, tmp_path: Path) -> None:
    cache, made = Cache(tmp_path / "cache", limit=10**9), artifacts.make("a", b"a" * 3_000_000)
    context = multiprocessing.get_context("fork")
    start = context.Event()
    processes = [context.Process(target=_fetch, args=(cache, made, start)) for _ in range(4)]
    for process in processes:
        process.start()
    start.set()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert sorted(path.read_text() for path in cache.root.glob("downloads-*")) == ["0", "0", "0", "1"]


def test_a_damaged_copy_is_fetched_again(artifacts: Artifacts, tmp_path: Path) -> None:
    cache, made = Cache(tmp_path / "cache", limit=10**9), artifacts.make("a", b"alpha")
    path = cache.fetch(*made, "test")
    for damage in (b"alphA", b"al"):
        path.write_bytes(damage)
        assert cache.fetch(*made, "test").read_bytes() == b"alpha"
    path.unlink()
    assert cache.fetch(*made, "test").read_bytes() == b"alpha"


def test_a_download_that_was_killed_leaves_nothing_to_mistake(artifacts: Artifacts, tmp_path: Path) -> None:
    cache, made = Cache(tmp_path / "cache", limit=10**9), artifacts.make("a", b"alpha")
    context = multiprocessing.get_context("fork")

    def dies() -> None:
        def download(client: Any, bucket: str, key: str, target: Path) -> None:
            target.write_bytes(b"alp")
            os.kill(os.getpid(), signal.SIGKILL)

        s3.download = download
        cache.fetch(*made, "test")

    process = context.Process(target=dies)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not list(cache.root.glob("*/data/*"))
    assert cache.fetch(*made, "test").read_bytes() == b"alpha"
    assert not list(cache.root.glob("*/part"))


def test_a_published_folder_becomes_the_copy(home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a rename, and by copying where the cache lies on another disk."""
    release()
    file = RemoteFile("deep/file", 5, hashlib.sha256(b"alpha").hexdigest())
    for number, other_disk in enumerate((False, True)):
        folder = tmp_path / f"made{number}"
        (folder / "deep").mkdir(parents=True)
        (folder / "deep" / "file").write_bytes(b"alpha")
        cache, uri = Cache(tmp_path / f"cache{number}", limit=10**9), "s3://bucket/a/data"
        with monkeypatch.context() as patched:
            if other_disk:
                rename = os.rename

                def across(source: Any, target: Any, rename: Any = rename, folder: Path = folder) -> None:
                    if Path(source) == folder:
                        raise OSError(errno.EXDEV, "Invalid cross-device link")
                    rename(source, target)

                patched.setattr(store_cache.os, "rename", across)
            cache.adopt(uri, folder, [file])
        assert cache.fetch(uri, file, "test").read_bytes() == b"alpha", "without a server"
        assert not folder.exists()
        release()


def _without_room(cache: Cache, made: tuple[str, RemoteFile], limit: int) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        cache.fetch(*made, "test")
    except UserError as error:
        os.write(1, str(error).encode())
        os._exit(2)


def test_a_disk_that_fills_up_is_one_line(
    artifacts: Artifacts, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    cache, made = Cache(tmp_path / "cache", limit=10**9), artifacts.make("a", b"a" * 100_000)
    process = multiprocessing.get_context("fork").Process(target=_without_room, args=(cache, made, 10_000))
    process.start()
    process.join()
    said = capfd.readouterr().out
    assert process.exitcode == 2
    assert said.startswith(f"MODELMILL_CACHE: {made[0]} cannot be kept in {cache.root}: the disk is full; free space")
    assert not list(cache.root.glob("*/data/*"))
    assert cache.fetch(*made, "test").stat().st_size == 100_000


def test_a_file_that_cannot_fit_is_refused_before_it_is_fetched(
    artifacts: Artifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, made = Cache(tmp_path / "cache", limit=10**9), artifacts.make("a", b"alpha")
    usage = shutil.disk_usage(tmp_path)._replace(free=3)
    monkeypatch.setattr(store_cache.shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(s3, "download", lambda *_: pytest.fail("nothing is fetched"))
    with pytest.raises(UserError, match=r"^MODELMILL_CACHE: s3://\S+ cannot be kept in .*: the disk is full"):
        cache.fetch(*made, "test")


class _Breaking(BaseHTTPRequestHandler):
    """An S3 server whose answers break off half way for the first few times."""

    content, left = b"x" * 200_000, 2

    def _head(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.content)))
        self.send_header("ETag", '"e"')
        self.end_headers()

    def do_HEAD(self) -> None:
        self._head()

    def do_GET(self) -> None:
        self._head()
        whole = type(self).left <= 0
        type(self).left -= 1
        self.wfile.write(self.content if whole else self.content[:1000])
        self.close_connection = True

    def log_message(self, *_: Any) -> None:
        pass


@pytest.mark.parametrize(("breaks", "arrives"), [(2, True), (1000, False)], ids=["twice", "always"])
def test_a_transfer_that_breaks_off_is_tried_again(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, breaks: int, arrives: bool
) -> None:
    release()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Breaking)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    _Breaking.left = breaks
    endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    for name, value in {
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_REGION": "us-east-1",
        "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
        store_cache.ENDPOINT_VARIABLE: endpoint,
    }.items():
        monkeypatch.setenv(name, value)
    file = RemoteFile("file", len(_Breaking.content), hashlib.sha256(_Breaking.content).hexdigest())
    cache = Cache(tmp_path / "cache", limit=10**9)
    try:
        if arrives:
            assert cache.fetch("s3://bucket/a/data", file, "test").read_bytes() == _Breaking.content
        else:
            with pytest.raises(UserError, match=rf"^test: s3://bucket/a/data/file .* {endpoint}"):
                cache.fetch("s3://bucket/a/data", file, "test")
            assert not list(cache.root.glob("*/data/*"))
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("text", ["0", "-1", "much", "nan", "inf"])
def test_a_limit_that_is_none_is_refused(home: Home, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv(store_cache.LIMIT_VARIABLE, text)
    with pytest.raises(UserError, match=rf"^MODELMILL_CACHE_GB: '{text}' is no positive number of gigabytes"):
        Cache.current()


def test_where_the_cache_lies(home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Cache.current() == Cache(home.root / "cache", 100 * 10**9)
    monkeypatch.setenv(store_cache.CACHE_VARIABLE, str(tmp_path / "disk"))
    monkeypatch.setenv(store_cache.LIMIT_VARIABLE, "0.5")
    assert Cache.current() == Cache(tmp_path / "disk", 5 * 10**8)
    monkeypatch.setenv(LAUNCHER_VARIABLE, "{}")
    assert Cache.current().root == home.root / "cache", "the pods of a training job see the home, not this disk"


@pytest.mark.slow
def test_a_server_that_is_killed_in_the_middle_of_a_download(
    own_s3_server: S3Server, home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own_s3_server.enter(monkeypatch)
    release()
    made = Artifacts(own_s3_server).make("a", os.urandom(96 << 20))
    cache, real = Cache(tmp_path / "cache", limit=10**9), s3.download

    def download(client: Any, bucket: str, key: str, target: Path) -> None:
        def watch() -> None:
            while not list(target.parent.glob("*")):
                pass
            own_s3_server.kill()

        threading.Thread(target=watch).start()
        real(client, bucket, key, target)

    with monkeypatch.context() as patched:
        patched.setattr(s3, "download", download)
        with pytest.raises(UserError, match=rf"^test: {made[0]}/file .* at {own_s3_server.endpoint}"):
            cache.fetch(*made, "test")
    assert not list(cache.root.glob("*/data/*"))
    own_s3_server.start()
    assert cache.fetch(*made, "test").stat().st_size == 96 << 20
