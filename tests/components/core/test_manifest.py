"""Manifests: a digest of content only, verified files, and clear words about broken ones."""

from __future__ import annotations

import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from modelmill.components.core.errors import UserError
from modelmill.components.core.home import Home
from modelmill.components.core.manifest import FileEntry, Manifest, canonical_json, file_digest


def artifact(folder: Path, **fields: Any) -> Manifest:
    (folder / "deep").mkdir(parents=True)
    (folder / "a.txt").write_text("alpha")
    (folder / "deep" / "b.bin").write_bytes(b"\0\1\2")
    return Manifest.describe(folder, kind="test", **fields)


def test_describe_lists_every_file_with_its_digest(tmp_path: Path) -> None:
    manifest = artifact(tmp_path / "data")
    assert [(entry.path, entry.bytes) for entry in manifest.files] == [("a.txt", 5), ("deep/b.bin", 3)]
    assert manifest.files[0].sha256 == hashlib.sha256(b"alpha").hexdigest() == file_digest(tmp_path / "data" / "a.txt")
    assert manifest.total_bytes == 8


def test_digest_is_of_the_content_alone(tmp_path: Path) -> None:
    one = artifact(tmp_path / "one", counts={"rows": 1}, metadata={"x": [1]}, metrics={"loss": 1.0}, step="s", key="k")
    two = artifact(tmp_path / "two", counts={"rows": 1}, metadata={"x": [1]}, created=1.0, code="c", recipe="r")
    assert one.digest == two.digest
    assert one.digest != artifact(tmp_path / "three", counts={"rows": 2}, metadata={"x": [1]}).digest
    assert one.digest != artifact(tmp_path / "four", counts={"rows": 1}, metadata={"x": [2]}).digest
    (tmp_path / "two" / "a.txt").write_text("alphA")
    assert (
        Manifest.describe(tmp_path / "two", kind="test", counts={"rows": 1}, metadata={"x": [1]}).digest != one.digest
    )


def test_it_reads_what_it_wrote(tmp_path: Path) -> None:
    manifest = artifact(
        tmp_path / "data", metrics={"loss": math.inf, "best": 0.1}, metadata={"note": "ü", "none": None}
    )
    manifest.write(tmp_path / "out" / "manifest.json")
    assert Manifest.read(tmp_path / "out" / "manifest.json") == manifest
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["manifest.json"]


def test_a_diverged_loss_can_be_read_back(tmp_path: Path) -> None:
    artifact(tmp_path / "data", metrics={"loss": math.nan}).write(tmp_path / "m.json")
    assert math.isnan(Manifest.read(tmp_path / "m.json").metrics["loss"])


@pytest.mark.parametrize("path", ["/etc/passwd", "../x", "a/../../x", "", ".", "a\0b"])
def test_entries_stay_inside_the_folder(path: str) -> None:
    with pytest.raises(ValidationError):
        FileEntry(path=path, bytes=0, sha256="0" * 64)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist; run the step that makes it"),
        ("", "is not JSON"),
        ("{", "is not JSON"),
        ("[]", "is not a manifest"),
        ("{}", r"is not a manifest \(kind: Field required\)"),
        ('{"kind":"x","uri":"/","files":[{"path":"../x","bytes":1,"sha256":"00"}]}', r"\(files\.0\.path: "),
        ('{"schema_version":99,"something":"new"}', "has schema version 99; this is 1"),
    ],
)
def test_a_broken_manifest_is_one_line(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "m.json").write_text(content)
    with pytest.raises(UserError, match=message):
        Manifest.read(tmp_path / "m.json")


def test_files_are_verified_when_opened(home: Home, tmp_path: Path) -> None:
    manifest = artifact(tmp_path / "data")
    path = manifest.path("a.txt")
    assert path.read_text() == "alpha"
    assert manifest.folder() == tmp_path / "data"
    with pytest.raises(UserError, match=r"test: no file 'c.txt' in .*; it holds a.txt, deep/b.bin"):
        manifest.path("c.txt")
    path.write_text("alphA")
    with pytest.raises(UserError, match="is corrupt"):
        manifest.path("a.txt")
    path.write_text("alph")
    with pytest.raises(UserError, match="has 4 bytes, 5 were written"):
        manifest.path("a.txt")
    path.unlink()
    with pytest.raises(UserError, match="is missing"):
        manifest.folder()


def test_a_file_is_hashed_once_a_state(home: Home, tmp_path: Path) -> None:
    manifest = artifact(tmp_path / "data")
    path = manifest.path("a.txt")
    stamp = path.stat()
    path.write_text("alphA")  # same size; the same inode and time, as no honest change would leave it
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert manifest.path("a.txt") == path, "the second look trusts inode, time and size"
    path.write_text("alphA")
    with pytest.raises(UserError, match="corrupt"):
        manifest.path("a.txt")


def test_canonical_json_does_not_depend_on_order() -> None:
    assert canonical_json({"b": 1, "a": {"d": "ü", "c": None}}) == '{"a":{"c":null,"d":"ü"},"b":1}'
    assert json.loads(canonical_json({"x": 1e-5})) == {"x": 1e-5}
