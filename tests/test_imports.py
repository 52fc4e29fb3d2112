"""The shape of the house: imports point one way, and the core stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED = {"core", "data", "training"}  # what every domain may import
ALSO = {
    "training": {"data"},  # the engine reads rows through the loader
    "evaluation": {"llama"},  # a judge must be able to run the model
    "finetuning": {"llama"},  # what it exports has the files of our own export
    "embedding": {"evaluation"},  # its scores go through the gate
    "forecasting": {"evaluation"},  # the same, and its reports are pages of the evaluation
}


def modules() -> list[Path]:
    return sorted([*(ROOT / "components").rglob("*.py"), *(ROOT / "pipelines").rglob("*.py")])


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def domain(path: Path) -> str:
    parts = path.relative_to(ROOT).parts
    return parts[1] if parts[0] == "components" and len(parts) > 2 else parts[0]


@pytest.mark.parametrize("path", modules(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_point_one_way(path: Path) -> None:
    if path.is_relative_to(ROOT / "pipelines"):
        return
    home = domain(path)
    reached = {name.split(".")[2] for name in imported(path) if name.startswith("modelmill.components.")}
    assert not any(name.startswith("modelmill.pipelines") for name in imported(path)), "components import no pipeline"
    allowed = {"core"} if home == "core" else {"core", home} if home in ("data", "training") else SHARED | {home}
    allowed |= ALSO.get(home, set())
    assert reached <= allowed, f"{home} may import {sorted(allowed)}, not {sorted(reached - allowed)}"


@pytest.mark.parametrize("path", modules(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_nobody_imports_another_domains_shell(path: Path) -> None:
    if path.is_relative_to(ROOT / "components"):
        assert not any(".component" in name.removeprefix("modelmill.components") for name in imported(path))


def loaded_by(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {name.split(".")[0] for name in done.stdout.split()}


def test_core_imports_neither_torch_nor_kfp_nor_mlflow() -> None:
    names = [path.stem for path in (ROOT / "components" / "core").glob("*.py") if path.stem != "__init__"]
    statement = "; ".join(f"import modelmill.components.core.{name}" for name in sorted(names))
    assert not loaded_by(statement) & {"torch", "kfp", "mlflow", "transformers", "numpy", "pyarrow"}


def test_the_process_of_a_fine_tuning_step_imports_no_torch() -> None:
    heavy = {"torch", "kfp", "mlflow", "transformers"}
    assert not loaded_by("import modelmill.components.finetuning.finetune") & heavy


def test_recipe_types_import_neither_torch_nor_kfp_nor_mlflow() -> None:
    heavy = {"torch", "kfp", "mlflow", "transformers", "pyarrow", "datasets"}
    assert not loaded_by("import modelmill.pipelines.recipes.llama_pretrain") & heavy


def test_files_stay_short_enough_to_read() -> None:
    long = {path.name: count for path in modules() if (count := len(path.read_text().splitlines())) > 450}
    assert not long
