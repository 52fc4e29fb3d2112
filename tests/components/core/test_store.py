"""Outputs of steps in S3, on a real server: publication, reuse, other machines, races, damage and refusals."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from modelmill.components.core import code, step, tracking
from modelmill.components.core.errors import UserError
from modelmill.components.core.events import read_lines
from modelmill.components.core.home import Home
from modelmill.components.core.manifest import Manifest
from modelmill.components.core.recipe import Section
from modelmill.components.core.step import StepResult, finished_manifest, run_step, section, step_options
from modelmill.components.core.store import S3Store, local_copy, noted_folder, open_store
from modelmill.components.core.store_cache import Cache, release
from tests.components.conftest import RunFolder
from tests.fakes.s3_server import FULL, READER, WRITER, S3Server

CALLS: list[str] = []


class Config(Section):
    """A step's section."""

    text: str = "hello"
    wait: str = ""


def write(config: Config, output: Path, **upstream: Manifest) -> StepResult:
    """Writes its text and what it read, beside a checkpoint; no two attempts are equal when `wait` is set."""
    CALLS.append(config.text)
    (output / "deep").mkdir(exist_ok=True)
    (output / "deep" / "text.txt").write_text(config.text)
    read = {name: each.path("deep/text.txt").read_text() for name, each in upstream.items()}
    (output / "read.json").write_text(json.dumps(read))
    (output.parent / "checkpoint").write_text("1")
    tracking.log_metrics({"letters": len(config.text)})
    tracking.log_artifact(output / "read.json")
    if config.wait:  # until another process is as far
        (output / "who").write_text(str(os.getpid()))
        Path(config.wait, str(os.getpid())).touch()
        while len(list(Path(config.wait).iterdir())) < 2:
            pass
    return StepResult("text", counts={"letters": len(config.text)})


@step_options(resumable=True)
def train(config: Config, output: Path) -> StepResult:
    """Goes on from its checkpoint."""
    steps = output.parent / "steps"
    before = steps.read_text() if steps.exists() else ""
    steps.write_text(before + "x")
    if len(before) < 1:
        raise RuntimeError("killed")
    (output / "steps").write_text(steps.read_text())
    return StepResult("model")


@step_options(reuse=False)
def register(config: Config, output: Path) -> StepResult:
    """A side effect; every time another output."""
    CALLS.append("register")
    (output / "number").write_text(str(len(CALLS)))
    return StepResult("registration")


@dataclass
class Bucket:
    """A store of its own on the session's server."""

    server: S3Server
    name: str
    use: Callable[[str], Home]
    uri: str = ""

    def objects(self) -> list[str]:
        listed = self.server.client().list_objects_v2(Bucket=self.name).get("Contents", [])
        return [entry["Key"].removeprefix("deep/prefix/") for entry in listed]

    def read(self, key: str) -> bytes:
        return self.server.client().get_object(Bucket=self.name, Key=f"deep/prefix/{key}")["Body"].read()

    def put(self, key: str, content: bytes) -> None:
        self.server.client().put_object(Bucket=self.name, Key=f"deep/prefix/{key}", Body=content)


@pytest.fixture
def bucket(s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: Home) -> Bucket:
    """A new bucket as this process's store, a home of its own; `use` changes to the home of another machine."""
    CALLS.clear()
    release()

    def use(name: str) -> Home:
        release()
        monkeypatch.setenv("MODELMILL_HOME", str(tmp_path / name))
        return Home.current()

    s3_server.enter(monkeypatch)
    made = Bucket(s3_server, s3_server.bucket(), use)
    made.uri = f"s3://{made.name}/deep/prefix"
    monkeypatch.setenv("MODELMILL_STORE", f"{made.uri}/")
    return made


def run(function: Any, config: Config | None = None, inputs: dict[str, str] | None = None, **outputs: str) -> Manifest:
    name = function.__name__
    return run_step(function, section(name, config or Config(), function), inputs or {}, outputs)


def refused(capsys: pytest.CaptureFixture[str], function: Any = write, config: Config | None = None) -> str:
    """The one line a step ends with."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as failure:
        run(function, config)
    assert failure.value.code == 2
    return [line for line in capsys.readouterr().err.splitlines() if "ERROR" in line][-1].partition("ERROR ")[2]


def test_files_first_and_the_manifest_last(bucket: Bucket, home: Home, tmp_path: Path) -> None:
    target = tmp_path / "kfp" / "manifest"
    made = run(write, manifest=str(target), **{"deep/text.txt": str(tmp_path / "kfp" / "text")})
    place = f"write/{made.key}/{made.digest[:16]}"
    assert made.uri == f"{bucket.uri}/{place}/data"
    assert Manifest.read(target) == made
    assert bucket.objects() == [
        "write/.writable",
        f"{place}/data/deep/text.txt",
        f"{place}/data/read.json",
        f"write/{made.key}/manifest.json",
    ]
    assert Manifest.parse(bucket.read(f"write/{made.key}/manifest.json"), "") == made
    assert (tmp_path / "kfp" / "text").read_text() == "hello"
    noted = noted_folder(made.uri)
    assert noted == home.store / "write" / made.key
    assert [path.name for path in noted.iterdir()] == ["manifest.json"], "no data and no checkpoint stay in the home"
    assert sorted(path.name for path in (home.store / "write").iterdir()) == [made.key, f"{made.key}.lock"]


def test_what_was_published_is_not_downloaded_again(bucket: Bucket) -> None:
    made = run(write)
    for key in bucket.objects():
        if "/data/" in key:
            bucket.put(key, b"x")  # who reads it now would say so
    assert made.path("deep/text.txt").read_text() == "hello"
    assert made.folder("deep") == Cache.current().folder(made.uri) / "deep"


def test_another_machine_reuses_it_and_fetches_what_it_opens(
    bucket: Bucket, home: Home, tmp_path: Path, make_run: Any
) -> None:
    first: RunFolder = make_run(home, "first")
    first.enter()
    made = run(write)
    other = bucket.use("elsewhere")
    second: RunFolder = make_run(other, "second")
    second.enter()
    assert run(write) == made
    assert CALLS == ["hello"]
    assert not (other.root / "cache").exists(), "nothing is fetched before it is opened"
    made.write(tmp_path / "m.json")
    chained = run(write, Config(text="second"), {"corpus": str(tmp_path / "m.json")})
    assert json.loads(chained.path("read.json").read_text()) == {"corpus": "hello"}
    fetched = [path for path in Cache.current().folder(made.uri).rglob("*") if path.is_file()]
    assert [path.name for path in fetched] == ["text.txt"]
    records = [record for _, record in read_lines(second.path / "spool" / "write.jsonl")]
    assert next(record["values"] for record in records if record["type"] == "metrics") == {"letters": 5}
    artifact = next(record["path"] for record in records if record["type"] == "artifact")
    assert artifact == str(other.store / "write" / made.key / "data" / "read.json")
    assert local_copy(Path(artifact)).read_text() == "{}"
    assert local_copy(Path(artifact).parent / "deep").name == "deep", "a folder of figures is fetched whole"


def test_the_key_holds_image_and_code(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = run(write)
    monkeypatch.setenv(step.IMAGE_VARIABLE, "registry/modelmill-cpu@sha256:1")
    one = run(write)
    assert run(write).key == one.key
    monkeypatch.setenv(step.IMAGE_VARIABLE, "registry/modelmill-cpu@sha256:2")
    two = run(write)
    monkeypatch.setattr(step, "code_digest", lambda module: code.code_digest(module)[::-1])
    edited = run(write)
    assert len({plain.key, one.key, two.key, edited.key}) == 4
    assert len(CALLS) == 4
    assert plain.digest == edited.digest


def test_side_effects_and_fresh_runs_replace(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = run(register), run(register)
    assert (first.key, CALLS) == (second.key, ["register", "register"])
    assert [each.path("number").read_text() for each in (first, second)] == ["1", "2"], (
        "who holds the old one reads it"
    )
    assert finished_manifest(Home.current().store, "register", first.key) == second
    made = run(write)
    monkeypatch.setenv("MODELMILL_FRESH", "1")
    again = run(write)
    assert (again.digest, CALLS[2:]) == (made.digest, ["hello", "hello"])
    assert finished_manifest(Home.current().store, "write", made.key) == again


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


def test_the_home_alone_does_not_count_an_output_in_s3(
    bucket: Bucket, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = run(write)
    monkeypatch.delenv("MODELMILL_STORE")
    assert finished_manifest(home.store, "write", made.key) is None
    local = run(write)
    assert local.uri == str(home.store / "write" / made.key / "data")
    assert local.digest == made.digest


def test_a_copied_bucket_is_read_where_it_lies(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    made = run(write)
    client, copy = bucket.server.client(), bucket.server.bucket()
    for key in bucket.objects():
        source = {"Bucket": bucket.name, "Key": f"deep/prefix/{key}"}
        client.copy_object(Bucket=copy, Key=f"restored/{key}", CopySource=source)
    bucket.use("elsewhere")
    monkeypatch.setenv("MODELMILL_STORE", f"s3://{copy}/restored")
    found = run(write)
    assert found.uri.startswith(f"s3://{copy}/restored/write/")
    assert (found.digest, CALLS) == (made.digest, ["hello"])
    assert found.path("deep/text.txt").read_text() == "hello"


@pytest.mark.parametrize(
    ("identity", "store", "words"),
    [
        (WRITER, "s3://modelmill-absent/x", r"MODELMILL_STORE: s3://modelmill-absent/x/\S+: there is no such bucket"),
        (READER, "", r"MODELMILL_STORE: s3://\S+/write/\.writable: access is denied; allow s3:PutObject"),
        (("nobody", "x"), "", r"MODELMILL_STORE: s3://\S+: the credentials are refused \(InvalidAccessKeyId\)"),
        ((FULL[0], "x"), "", r"MODELMILL_STORE: s3://\S+: the credentials are refused \(SignatureDoesNotMatch\)"),
        (FULL, "s3:/x", r"MODELMILL_STORE: 's3:/x' is not an S3 URI; write s3://bucket/key"),
        (FULL, "/somewhere", r"MODELMILL_STORE: '/somewhere' is not an S3 URI"),
    ],
    ids=["no-bucket", "read-only", "unknown-key", "wrong-secret", "no-uri", "a-path"],
)
def test_a_store_that_cannot_be_used_is_named_before_anything_is_computed(
    bucket: Bucket,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    identity: tuple[str, str],
    store: str,
    words: str,
) -> None:
    bucket.server.enter(monkeypatch, identity)
    if store:
        monkeypatch.setenv("MODELMILL_STORE", store)
    assert re.match(words, refused(capsys))
    assert CALLS == []


def test_a_reader_reuses_what_others_made(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    made = run(write)
    bucket.server.enter(monkeypatch, READER)
    bucket.use("elsewhere")
    assert run(write) == made
    assert made.path("deep/text.txt").read_text() == "hello"


def test_no_credentials_at_all(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    assert "needs AWS credentials (Unable to locate credentials); set AWS_PROFILE" in refused(capsys)


def test_the_stores_own_endpoint(
    bucket: Bucket, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An S3-compatible store beside AWS: the variable counts for outputs, also for reading them."""
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    assert "cannot be reached at http://127.0.0.1:9" in refused(capsys)
    monkeypatch.setenv("MODELMILL_STORE_ENDPOINT", s3_server.endpoint)
    made = run(write)
    bucket.use("elsewhere")
    assert made.path("deep/text.txt").read_text() == "hello"


def test_nothing_that_is_stored_names_a_machine(bucket: Bucket, tmp_path: Path) -> None:
    made = run(write)
    assert str(tmp_path).encode() not in bucket.read(f"write/{made.key}/manifest.json")


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


def test_open_store_follows_the_variable(bucket: Bucket, home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(open_store(home.store), S3Store)
    monkeypatch.delenv("MODELMILL_STORE")
    assert not isinstance(open_store(home.store), S3Store)
