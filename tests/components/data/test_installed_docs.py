"""Installed documentation: the same text on any machine, read without running anything."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from modelmill.components.core.errors import UserError
from modelmill.components.data.installed_docs import module_document, read_installed_docs

SOURCE = b'''# -*- coding: latin-1 -*-
"""Module text, caf\xe9.

    Indented.
"""
import missing_module
raise SystemExit("this must never run")

class Solver(Base, metaclass=Meta):
    """A solver."""

    if missing_module.FAST:
        async def solve(self, a: int, *, tol: float = 1e-5) -> "Result":
            """Solve it."""
            def inner():
                """Not public."""
    class Nested:
        "Nested."

try:
    from fast import helper
except ImportError:
    def helper(x, /, *args):
        r"""Help \\with it."""

def silent(): pass
'''


def docs(*names: str, shortest: int = 100) -> tuple[list[str], Counter[str]]:
    skipped: Counter[str] = Counter()
    return list(read_installed_docs(names, shortest, skipped)), skipped


def test_document_of_a_module() -> None:
    assert module_document(SOURCE, "pkg.solver") == (
        "pkg.solver\n\nModule text, café.\n\nIndented.\n\n"
        "class Solver(Base)\n\nA solver.\n\n"
        "async def Solver.solve(self, a: int, *, tol: float=1e-05) -> 'Result'\n\nSolve it.\n\n"
        "class Solver.Nested\n\nNested.\n\n"
        "def helper(x, /, *args)\n\nHelp \\with it.\n"
    )


@pytest.mark.parametrize("source", [b"def broken(:", b"\x00", b"\xff\xfe", b"(" * 5000])
def test_what_is_not_python_is_no_document(source: bytes) -> None:
    assert module_document(source, "m") is None


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A distribution as pip lays it out, with a module that must not be imported."""
    site = tmp_path / "site"
    (site / "demo" / "tests").mkdir(parents=True)
    (site / "demo" / "__init__.py").write_text('"""Top."""\nraise SystemExit\n')
    (site / "demo" / "solver.py").write_bytes(SOURCE)
    (site / "demo" / "old.py").write_text(f'"""{"Written for Python 2. " * 10}"""\nprint "hello"\n')
    (site / "demo" / "tests" / "test_it.py").write_text(f'"""{"Test text. " * 50}"""')
    info = site / "demo-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: demo\nVersion: 1.0\n\n# Demo\n\nWhat it is for: ünïcode.\n"
    )
    names = ["demo/__init__.py", "demo/solver.py", "demo/old.py", "demo/tests/test_it.py", "../../bin/demo.py"]
    (info / "RECORD").write_text("".join(f"{name},,\n" for name in names))
    monkeypatch.syspath_prepend(str(site))
    return site


def test_description_and_modules_of_a_distribution(installed: Path) -> None:
    texts, skipped = docs("demo", shortest=30)
    assert texts[0] == "# Demo\n\nWhat it is for: ünïcode.\n"
    assert texts[1:] == [module_document(SOURCE, "demo.solver")]
    assert skipped == {"undocumented": 1, "not_python": 1}
    assert not any(name.split(".")[0] == "demo" for name in sys.modules)


def test_a_file_that_was_installed_and_is_gone_is_an_error(installed: Path) -> None:
    (installed / "demo" / "solver.py").unlink()
    with pytest.raises(UserError, match=r"demo is installed without its file demo/solver\.py; reinstall demo"):
        docs("demo")


def test_same_text_in_another_process_with_another_hash_seed() -> None:
    names = ["click", "Flask"]
    code = (
        "import sys, hashlib; from collections import Counter\n"
        "from modelmill.components.data.installed_docs import read_installed_docs\n"
        f"texts = read_installed_docs({names}, 100, Counter())\n"
        "print(hashlib.sha256('\\0'.join(texts).encode()).hexdigest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout.strip()
        for seed in ("1", "2")
    }
    assert digests == {hashlib.sha256("\0".join(docs(*names)[0]).encode()).hexdigest()}


def test_a_cut_leaves_every_distribution_its_share() -> None:
    """Wherever the stream is cut, no two distributions with text left differ by more than one document."""
    names = ["click", "Flask", "docker"]
    owners = {text: name for name in names for text in docs(name)[0]}
    given: Counter[str] = Counter()
    largest = max(len(text.encode()) for text in owners)
    for text in docs(*names)[0]:
        given[owners[text]] += len(text.encode())
        if sum(given.values()) > 100_000:
            break
    assert set(given) == set(names)
    assert max(given.values()) - min(given.values()) <= largest


def test_nothing_names_a_place_of_this_machine() -> None:
    texts, _ = docs("click", "Flask", "docker", "fsspec")
    assert not any(sys.prefix in text for text in texts)
    assert sum(map(len, texts)) > 200_000
