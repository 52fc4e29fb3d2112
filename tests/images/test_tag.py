"""Tags follow the content: equal inputs make one tag, and each input changes it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from images import tag
from modelmill.components.core.errors import UserError

BASE = "docker.io/library/python@sha256:" + "a" * 64


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small checkout with the files that decide an image."""
    for name in ("images/install.sh", "images/sbom.py", "images/cpu/Dockerfile", "images/mlflow/Dockerfile"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(tag.ROOT / name, tmp_path / name)
    for name in ("setup.cfg", "pyproject.toml", "constraints.txt", ".gitignore"):
        shutil.copyfile(tag.ROOT / name, tmp_path / name)
    for name in ("components", "pipelines"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "code.py").write_text("x = 1\n")
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    monkeypatch.setattr(tag, "ROOT", tmp_path)
    return tmp_path


def test_equal_inputs_make_one_tag(checkout: Path) -> None:
    first = tag.content_tag("cpu", BASE)
    (checkout / "components" / "__pycache__").mkdir()
    (checkout / "components" / "__pycache__" / "code.pyc").write_bytes(b"ignored")
    (checkout / "docs.md").write_text("no part of an image\n")
    assert tag.content_tag("cpu", BASE) == first
    assert first.startswith(f"{tag.version()}-")
    assert tag.content_tag("cpu", BASE.replace("python", "mirror/python")) == first, "a mirror holds the same bytes"


@pytest.mark.parametrize(
    "name", ["components/code.py", "pipelines/code.py", "constraints.txt", "images/cpu/Dockerfile", "images/sbom.py"]
)
def test_every_input_changes_the_tag(checkout: Path, name: str) -> None:
    first = tag.content_tag("cpu", BASE)
    (checkout / name).write_text((checkout / name).read_text() + "# changed\n")
    assert tag.content_tag("cpu", BASE) != first


def test_renamed_file_and_other_base_change_the_tag(checkout: Path) -> None:
    first = tag.content_tag("cpu", BASE)
    assert tag.content_tag("cpu", BASE[:-1] + "b") != first
    (checkout / "components" / "code.py").rename(checkout / "components" / "other.py")
    assert tag.content_tag("cpu", BASE) != first


def test_code_does_not_change_the_server(checkout: Path) -> None:
    first = tag.content_tag("mlflow", BASE)
    (checkout / "components" / "code.py").write_text("x = 2\n")
    assert tag.content_tag("mlflow", BASE) == first


def test_base_needs_a_digest() -> None:
    with pytest.raises(UserError, match=r"python:3\.11' names no digest; write it as NAME@sha256"):
        tag.content_tag("cpu", "python:3.11")
