"""The code digest changes with what a step can reach and with nothing else."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from modelmill.components.core import code

FILES = {
    "core/__init__.py": "",
    "core/base.py": "VALUE = 1\n",
    "core/late.py": "VALUE = 2\n",
    "domain/__init__.py": "",
    "domain/step.py": "from modelmill.components.core.base import VALUE\n\n\ndef run():\n"
    "    import modelmill.components.domain.inner\n    return 'modelmill.components.domain.worker:main'\n",
    "domain/inner.py": "from modelmill.components.core import late\n",
    "domain/worker.py": "import modelmill.components.domain.step\n",
    "domain/report.py": "import modelmill.components.domain.step\n",
    "other/__init__.py": "",
    "other/step.py": "",
}


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(code, "_root", lambda: tmp_path)
    code.code_digest.cache_clear()
    yield tmp_path
    code.code_digest.cache_clear()


def digest() -> str:
    code.code_digest.cache_clear()
    return code.code_digest("modelmill.components.domain.step")


def test_reachable_modules(tree: Path) -> None:
    found = code.reachable_modules("modelmill.components.domain.step")
    names = {"core", "core.base", "core.late", "domain", "domain.step", "domain.inner", "domain.worker"}
    assert set(found) == {f"modelmill.components.{name}" for name in names}
    assert code.reachable_modules("modelmill.components.nothing") == {}


@pytest.mark.parametrize(
    ("name", "matters"),
    [
        ("core/base.py", True),
        ("core/late.py", True),  # imported by what a function imports
        ("domain/worker.py", True),  # started by name
        ("domain/__init__.py", True),  # runs when anything in the package is imported
        ("core/__init__.py", True),
        ("domain/report.py", False),
        ("other/step.py", False),
        ("other/__init__.py", False),
    ],
)
def test_an_edit_changes_the_digest_where_it_matters(tree: Path, name: str, matters: bool) -> None:
    before = digest()
    assert digest() == before
    (tree / name).write_text(FILES[name] + "# edited\n")
    assert (digest() != before) == matters


def test_a_library_version_changes_the_digest(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = digest()
    real: Callable[[str], str] = code.importlib.metadata.version
    monkeypatch.setattr(code.importlib.metadata, "version", lambda name: "0" if name == "torch" else real(name))
    assert digest() != before


def test_place_and_time_do_not_matter(
    tree: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = digest()
    copy = tmp_path_factory.mktemp("elsewhere") / "components"
    shutil.copytree(tree, copy)
    monkeypatch.setattr(code, "_root", lambda: copy)
    assert digest() == before


def test_real_steps_reach_what_they_use() -> None:
    found = code.reachable_modules("modelmill.components.evaluation.heldout")
    for name in (
        "evaluation.baselines",
        "evaluation.report",
        "llama.model",
        "training.loss",
        "data.loader",
        "core.step",
    ):
        assert f"modelmill.components.{name}" in found
    for name in ("core.delivery", "core.mlflow_writer", "registry.register", "llama.pretrain"):
        assert f"modelmill.components.{name}" not in found, "tracking and other steps do not decide its bytes"
