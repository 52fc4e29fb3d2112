"""`modelmill prune`: a look unless it is told to delete, what it says, and mistakes."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from modelmill.components.core.errors import UserError
from modelmill.components.core.home import Home
from modelmill.pipelines.commands import pruning
from modelmill.pipelines.commands.pruning import prune_command
from tests.fakes.s3_server import READER, S3Server
from tests.pipelines.conftest import modelmill

DAY = 86_400
KEY, OLD = f"store/train/{'a' * 24}", "b" * 16


@pytest.fixture
def unfinished(home: Home, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a step that was killed 40 days ago."""
    monkeypatch.delenv("MODELMILL_STORE", raising=False)
    folder = home.store / "train" / f"{'a' * 24}.partial"
    folder.mkdir(parents=True)
    (folder / "checkpoint").write_bytes(b"x" * (3 << 20))
    for path in (folder / "checkpoint", folder):
        os.utime(path, (time.time() - 40 * DAY,) * 2)
    return folder


@pytest.fixture
def bucket(s3_server: S3Server, home: Home, monkeypatch: pytest.MonkeyPatch) -> str:
    """A bucket with an upload without a manifest, and a clock that is 31 days ahead."""
    s3_server.enter(monkeypatch)
    name = s3_server.bucket()
    s3_server.client().put_object(Bucket=name, Key=f"{KEY}/{OLD}/data/file", Body=b"12345")
    monkeypatch.setenv("MODELMILL_STORE", f"s3://{name}/store")
    monkeypatch.setattr(pruning, "time", SimpleNamespace(time=lambda: time.time() + 31 * DAY))
    return name


def prune(*arguments: str) -> str:
    done = CliRunner().invoke(prune_command, list(arguments), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_it_looks_unless_it_is_told_to_delete(unfinished: Path) -> None:
    line = f"{unfinished}  1 files, 3 MiB, unfinished, 40 days old\n"
    assert modelmill("prune").stdout == f"{line}1 files, 3 MiB: --yes deletes them\n"
    assert prune("--older-than", "6w") == "nothing to delete is older than 42 days\n"
    assert unfinished.exists()
    assert prune("--yes") == f"{line}1 files, 3 MiB: deleted\n"
    assert not unfinished.exists()
    assert prune("--yes") == "nothing to delete is older than 30 days\n"


def test_programs_read_it(unfinished: Path) -> None:
    found = json.loads(prune("--json"))
    [leftover] = found.pop("leftovers")
    assert found == {"deleted": False, "files": 1, "bytes": 3 << 20, "kept": []}
    assert (leftover["place"], leftover["reason"]) == (str(unfinished), "unfinished")


def test_the_store_in_s3(s3_server: S3Server, bucket: str) -> None:
    line = f"s3://{bucket}/{KEY}/{OLD}  1 files, 5 bytes, without a manifest, 31 days old\n"
    assert prune().startswith(line)
    assert prune("--older-than", "32d") == "nothing to delete is older than 32 days\n"
    s3_server.client().put_object(Bucket=bucket, Key=f"{KEY}/{'c' * 16}/data/file", Body=b"1")
    s3_server.client().put_object(Bucket=bucket, Key=f"{KEY}/manifest.json", Body=b"{")
    assert "stays: its manifest cannot be read" in prune("--yes")
    s3_server.client().delete_object(Bucket=bucket, Key=f"{KEY}/manifest.json")
    prune("--yes")
    assert "Contents" not in s3_server.client().list_objects_v2(Bucket=bucket)


def test_the_store_of_a_profile(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELMILL_STORE", "s3://modelmill-absent/x")
    profile = tmp_path / "team.yaml"
    profile.write_text(f"extends: kind\nname: team\nstore: s3://{bucket}/store\n")
    assert f"s3://{bucket}/{KEY}/{OLD}" in prune("--profile", str(profile))


def test_who_may_not_delete_is_told(
    s3_server: S3Server, bucket: str, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3_server.enter(monkeypatch, READER)
    assert "--yes deletes them" in prune()
    with pytest.raises(UserError, match="access is denied; allow s3:DeleteObject"):
        prune("--yes")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--older-than", "5h"], "'5h' is no age of at least one day; write 30d or 8w"),
        (["--older-than", "0d"], "'0d' is no age of at least one day"),
        (["--profile", "laptop"], "--profile: laptop keeps outputs in its home; run this where that is mounted"),
        (["--profile", "eks-cup"], "eks-cup"),
    ],
    ids=["hours", "nothing", "home", "mistyped"],
)
def test_mistakes(home: Home, arguments: list[str], words: str) -> None:
    done = modelmill("prune", *arguments)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert words in done.stderr
    assert not home.root.exists()
