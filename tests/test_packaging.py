"""The wheel a platform team installs: our names inside `modelmill`, recipes included, nobody shadowed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import venv
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the files git knows or would add, so that no stale build folder leaks in."""
    source = tmp_path_factory.mktemp("source")
    command = ["git", "ls-files", "-zco", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.split(b"\0")
    for name in filter(None, map(os.fsdecode, listed)):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    target = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(target), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    return next(target.glob("modelmill-*.whl"))


@pytest.mark.slow
def test_wheel_holds_every_module_and_recipe(wheel: Path) -> None:
    held = set(zipfile.ZipFile(wheel).namelist())
    sources = [*(ROOT / "components").rglob("*.py"), *(ROOT / "pipelines").rglob("*.py")]
    sources += (ROOT / "pipelines" / "recipes").rglob("*.yaml")
    missing = {f"modelmill/{path.relative_to(ROOT).as_posix()}" for path in sources} - held
    assert not missing, "add the package to setup.cfg"
    assert not any(name.startswith(("components/", "pipelines/", "tests/")) for name in held)


@pytest.mark.slow
def test_users_own_pipelines_folder_shadows_nothing(wheel: Path, tmp_path: Path) -> None:
    """Run the wheel, not the checkout, from a folder that holds a `pipelines` package of the user's own."""
    environment = tmp_path / "venv"
    venv.create(environment, with_pip=False)
    python = environment / "bin" / "python"
    site = next((environment / "lib").glob("python*/site-packages"))
    zipfile.ZipFile(wheel).extractall(site)
    # The dependencies come from the environment the tests run in, minus its editable modelmill.
    host = next(path for path in sys.path if path.endswith("site-packages"))
    (site / "dependencies.pth").write_text(f"import sys; sys.path.append({host!r})\n")
    work = tmp_path / "work"
    (work / "pipelines").mkdir(parents=True)
    (work / "pipelines" / "__init__.py").write_text("raise RuntimeError('the user's own package was imported')\n")
    (work / "components").mkdir()
    (work / "components" / "__init__.py").write_text("raise RuntimeError('the user's own package was imported')\n")
    code = "from modelmill.pipelines.cli import main; import sys; sys.argv = ['modelmill', 'list', '--json']; main()"
    done = subprocess.run([python, "-c", code], cwd=work, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "laptop/llama-demo" in done.stdout
    where = "import modelmill.pipelines.cli as m; print(m.__file__)"
    place = subprocess.run([python, "-c", where], cwd=work, capture_output=True, text=True, check=True)
    assert Path(place.stdout.strip()).is_relative_to(site)


def locked() -> dict[str, str]:
    lines = [line.strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in pairs}


def extras() -> dict[str, list[str]]:
    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    found = dict(config["options.extras_require"])
    found["install_requires"] = config["options"]["install_requires"]
    return {name: [line for line in text.split("\n") if line] for name, text in found.items()}


@pytest.mark.parametrize("extra", ["core", "train", "kfp", "track", "forecast", "eval", "aws", "dev"])
def test_every_extra_exists_and_is_locked(extra: str) -> None:
    pins = locked()
    for requirement in extras()[extra]:
        name = re.match(r"[A-Za-z0-9_.-]+", requirement)
        assert name
        assert re.sub(r"[-_.]+", "-", name.group()).lower() in pins, f"{requirement} has no pin in constraints.txt"


@pytest.mark.slow
def test_all_extras_install_together_under_the_lock() -> None:
    names = ",".join(name for name in extras() if name != "install_requires")
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "-q"]
    command += ["-c", "constraints.txt", f".[{names}]"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
