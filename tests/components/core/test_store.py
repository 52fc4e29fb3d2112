"""Outputs of steps in S3, on a real server: publication, reuse, other machines, other homes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from modelmill.components.core import code, step
from modelmill.components.core.events import read_lines
from modelmill.components.core.home import Home
from modelmill.components.core.manifest import Manifest
from modelmill.components.core.step import finished_manifest
from modelmill.components.core.store import S3Store, local_copy, noted_folder, open_store
from modelmill.components.core.store_cache import Cache
from tests.components.conftest import RunFolder
from tests.components.core.stored_steps import CALLS, Bucket, Config, register, run, write


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


def test_nothing_that_is_stored_names_a_machine(bucket: Bucket, tmp_path: Path) -> None:
    made = run(write)
    assert str(tmp_path).encode() not in bucket.read(f"write/{made.key}/manifest.json")


def test_open_store_follows_the_variable(bucket: Bucket, home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(open_store(home.store), S3Store)
    monkeypatch.delenv("MODELMILL_STORE")
    assert not isinstance(open_store(home.store), S3Store)
