"""Which engine builds: one that works, not one whose command merely exists."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from images.build import engine_of
from modelmill.components.core.errors import UserError


def install(folder: Path, name: str, code: int) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\nexit {code}\n")
    path.chmod(0o755)


def test_a_command_without_its_daemon_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/bin")
    install(tmp_path, "docker", 1)
    install(tmp_path, "podman", 0)
    assert engine_of(None) == "podman"
    assert engine_of("docker") == "docker", "who names one hears from it what is wrong"


def test_no_engine_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="install one of docker, podman, buildah"):
        engine_of(None)
