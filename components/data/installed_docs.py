"""Documentation of installed Python distributions: real text that needs no download.

One document a module (its documentation strings, each under its qualified signature) and one a distribution (the
description a package index shows). Modules are read by their syntax tree and never imported, so nothing is run.
"""

from __future__ import annotations

import ast
import csv
import email
import hashlib
import heapq
import importlib.metadata
import inspect
import warnings
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import Distribution
from pathlib import Path, PurePosixPath

from modelmill.components.core.errors import UserError

_PARAMETER = "corpus.source.distributions"
_TEST_FOLDERS = {"test", "tests"}  # no documentation, and slim installations leave them out
_Node = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def find_distributions(names: Sequence[str]) -> list[Distribution]:
    """The named distributions.

    Raises:
        UserError: one is not installed.
    """
    found = []
    for name in names:
        try:
            found.append(importlib.metadata.distribution(name))
        except (importlib.metadata.PackageNotFoundError, ValueError):
            raise UserError(f"{_PARAMETER}: {name!r} is not installed; install it or take it off the list") from None
    return found


def installed_versions(names: Sequence[str]) -> list[str]:
    """`name==version` of each distribution; see `find_distributions` for the error.

    A local version such as torch's `+cpu` is left out: it says how the wheel was built; the documentation is the same.
    """
    found = zip(names, find_distributions(names), strict=True)
    return [f"{name}=={distribution.version.partition('+')[0]}" for name, distribution in found]


def read_installed_docs(names: Sequence[str], shortest: int, skipped: Counter[str]) -> Generator[str, None, None]:
    """Documents of the distributions, always one of whichever has given the fewest bytes so far.

    So a cap is shared evenly, whatever the sizes. Within a distribution the order is that of the digests of the file
    names: a cut leaves a sample of the whole, not the packages early in the alphabet.

    Args:
        names: distributions.
        shortest: modules with fewer bytes of documentation (an estimate from the quotes) are not parsed.
        skipped: counts modules without documentation and those that are not Python, by reason.

    Raises:
        UserError: a distribution is not installed, or its files are not those that were installed.
    """
    for document in read_documentation(names, shortest, skipped):
        yield document.text


@dataclass(frozen=True)
class Documented:
    """Something with documentation: a module, a class or a function.

    Attributes:
        kind: `module`, `class` or `function`.
        name: qualified within the module, such as `Solver.solve`; empty for the module.
        signature: as in the text of the document; empty for the module.
        text: the documentation string.
    """

    kind: str
    name: str
    signature: str
    text: str


@dataclass(frozen=True)
class Documentation:
    """A document: its text, and for a module its name and what is documented in it."""

    text: str
    module: str = ""
    entries: tuple[Documented, ...] = ()


def read_documentation(
    names: Sequence[str], shortest: int, skipped: Counter[str]
) -> Generator[Documentation, None, None]:
    """The documents of `read_installed_docs`, in the same order, with what their texts were made of."""
    queue = [
        (0, order, _documents_of(found, shortest, skipped)) for order, found in enumerate(find_distributions(names))
    ]
    while queue:
        given, order, documents = queue[0]
        document = next(documents, None)
        if document is None:
            heapq.heappop(queue)
            continue
        heapq.heapreplace(queue, (given + len(document.text.encode("utf-8", "surrogatepass")), order, documents))
        yield document


def _documents_of(found: Distribution, shortest: int, skipped: Counter[str]) -> Iterator[Documentation]:
    # The body of METADATA, or its header in the oldest format; read as it is, because the parser's type varies.
    metadata = email.message_from_string(found.read_text("METADATA") or found.read_text("PKG-INFO") or "")
    description = str(metadata.get_payload()) or metadata.get("Description", "")
    if description.strip():
        yield Documentation(description)
    for file in _modules(found):
        try:
            source = Path(str(found.locate_file(file))).read_bytes()
        except FileNotFoundError:
            name = found.metadata["Name"]
            raise UserError(f"{_PARAMETER}: {name} is installed without its file {file}; reinstall {name}") from None
        if _quoted_bytes(source) < shortest:
            skipped["undocumented"] += 1
            continue
        module = _module_name(file)
        entries = _entries(source)
        if entries is None:
            skipped["not_python"] += 1
        else:
            yield Documentation(_text(module, entries), module, entries)


def _modules(found: Distribution) -> list[PurePosixPath]:
    # RECORD itself: once the importlib_metadata backport is loaded (MLflow does), `files` leaves missing ones out.
    record = found.read_text("RECORD")
    rows = csv.reader((record or "").splitlines())
    names = [row[0] for row in rows if row] if record else [file.as_posix() for file in found.files or []]
    files = [
        file
        for file in map(PurePosixPath, names)
        if file.suffix == ".py" and ".." not in file.parts and not _TEST_FOLDERS.intersection(file.parts)
    ]
    return sorted(files, key=lambda file: hashlib.sha256(file.as_posix().encode()).digest())


def _module_name(file: PurePosixPath) -> str:
    parts = file.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def _quoted_bytes(source: bytes) -> int:
    """Bytes between triple quotes: far cheaper than parsing, and an upper bound for nearly every module."""
    return sum(sum(map(len, source.split(quotes)[1::2])) for quotes in (b'"""', b"'''"))


def module_document(source: bytes, name: str) -> str | None:
    """Documentation of a module as one text, or None when the source is not Python of this version.

    Args:
        source: the file's bytes; the encoding is the one Python would use.
        name: qualified name, which becomes the title.
    """
    entries = _entries(source)
    return None if entries is None else _text(name, entries)


def _entries(source: bytes) -> tuple[Documented, ...] | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            return tuple(_documented(ast.parse(source), ""))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _text(module: str, entries: Sequence[Documented]) -> str:
    sections = [module]
    for entry in entries:
        sections.extend([entry.signature, entry.text] if entry.signature else [entry.text])
    return "\n\n".join(sections) + "\n"


def _documented(node: _Node, prefix: str) -> Iterator[Documented]:
    """What is documented of a node and of what it defines, in source order."""
    text = ast.get_docstring(node, clean=False)
    if text and text.strip():
        kind = "module" if isinstance(node, ast.Module) else "class" if isinstance(node, ast.ClassDef) else "function"
        name = "" if isinstance(node, ast.Module) else f"{prefix}{node.name}"
        yield Documented(kind, name, _signature(node, prefix), inspect.cleandoc(text))
    inner = prefix if isinstance(node, ast.Module) else f"{prefix}{node.name}."
    if isinstance(node, ast.Module | ast.ClassDef):
        for child in _definitions(node.body):
            yield from _documented(child, inner)


def _definitions(body: Sequence[ast.stmt]) -> Iterator[ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    """Classes and functions of a body, also those under `if` and `try`."""
    for statement in body:
        if isinstance(statement, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield statement
        elif isinstance(statement, ast.If):
            yield from _definitions([*statement.body, *statement.orelse])
        elif isinstance(statement, ast.Try):
            handled = [inner for handler in statement.handlers for inner in handler.body]
            yield from _definitions([*statement.body, *handled, *statement.orelse, *statement.finalbody])


def _signature(node: _Node, prefix: str) -> str:
    if isinstance(node, ast.Module):
        return ""
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        return f"class {prefix}{node.name}({bases})" if bases else f"class {prefix}{node.name}"
    keyword = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"{keyword} {prefix}{node.name}({ast.unparse(node.args)}){returns}"
