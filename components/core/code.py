"""Which code made a result: a digest over exactly the modules a step can reach.

A step's outputs are reused only when the code that made them is the same. Hashing the whole package
would throw a trained model away after an edit to the report, so the digest follows the imports of the
step's module (also those inside functions) through `modelmill.components`.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import sys
from functools import cache
from pathlib import Path

_PACKAGE = "modelmill.components"
# Libraries whose version can change a step's bytes; the rest of the lock cannot.
_LIBRARIES = (
    "torch",
    "numpy",
    "pyarrow",
    "tokenizers",
    "transformers",
    "sentencepiece",
    "safetensors",
    "peft",
    "bitsandbytes",
    "sentence-transformers",
    "chronos-forecasting",
    "pandas",
    "statsforecast",
    "lightgbm",
)


def package_version() -> str:
    """Version of the installed modelmill distribution."""
    try:
        return importlib.metadata.version("modelmill")
    except importlib.metadata.PackageNotFoundError:
        return "0+unknown"


@cache
def _root() -> Path:
    return Path(__file__).resolve().parent.parent


def _file(module: str) -> Path | None:
    """Source file of a dotted name inside the package, or None when it names no module."""
    path = _root().joinpath(*module.split(".")[2:])
    for candidate in (path.with_suffix(".py"), path / "__init__.py"):
        if candidate.is_file():
            return candidate
    return None


def _imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith(_PACKAGE):
            names.add(node.value.partition(":")[0])  # a module started by name, as torchrun does
    return {name for name in names if name.startswith(_PACKAGE + ".")}


def _packages(module: str) -> list[str]:
    """The packages around a module: importing it runs their `__init__` too."""
    parts = module.split(".")
    return [".".join(parts[:length]) for length in range(3, len(parts))]


def reachable_modules(module: str) -> dict[str, Path]:
    """Modules of the package that `module` imports, directly or not, with their files."""
    found: dict[str, Path] = {}
    waiting = [module]
    while waiting:
        name = waiting.pop()
        path = _file(name)
        if path is None or name in found:
            continue
        found[name] = path
        waiting.extend(_imports(path))
        waiting.extend(_packages(name))
    return found


@cache
def source_digest(module: str) -> str:
    """Digest (16 hex digits) of the sources a step's module reaches: the same on every machine that holds them.

    For runs elsewhere, where the image and not this machine decides what runs the sources.
    """
    return _sources(module, hashlib.sha256()).hexdigest()[:16]


def _sources(module: str, digest: hashlib._Hash) -> hashlib._Hash:
    for name, path in sorted(reachable_modules(module).items()):
        digest.update(name.encode())
        digest.update(path.read_bytes())
    return digest


@cache
def code_digest(module: str) -> str:
    """Digest (16 hex digits) of the sources a step's module reaches and of what runs them."""
    # The interpreter too: its syntax tree and its Unicode tables decide the bytes of a corpus.
    digest = hashlib.sha256(f"python=={sys.version_info.major}.{sys.version_info.minor}".encode())
    _sources(module, digest)
    for library in _LIBRARIES:
        try:
            digest.update(f"{library}=={importlib.metadata.version(library)}".encode())
        except importlib.metadata.PackageNotFoundError:
            continue
    return digest.hexdigest()[:16]
