"""Which local files a source or a tokenizer path names, and their state. Cheap: nothing is opened."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from modelmill.components.core.errors import UserError
from modelmill.components.core.uri import local_path

_COMPRESSIONS = (".gz", ".zst")


@dataclass(frozen=True)
class Formats:
    """Formats that a reader takes.

    Attributes:
        kinds: ending of a file's name, without compression, to the `kind` of its format.
        readable: the same for people.
    """

    kinds: Mapping[str, str]
    readable: str


_TEXTS = {".txt": "plain", ".md": "plain", ".jsonl": "jsonl", ".parquet": "parquet"}
TEXT_FORMATS = Formats(_TEXTS, "txt, md, jsonl and parquet, each also as .gz or .zst")
TABLE_FORMATS = Formats({".csv": "csv", ".parquet": "parquet"}, "csv and parquet, each also as .gz or .zst")


@dataclass(frozen=True)
class DocumentFormat:
    """Format of a file: `plain`, `jsonl`, `parquet` or `csv`, and its compression (`""`, `.gz` or `.zst`)."""

    kind: str
    compression: str


@dataclass(frozen=True)
class SourceFile:
    """A file to read.

    Attributes:
        path: where it lies.
        name: its path relative to what the user named, the same on every machine.
        format: how to read it.
    """

    path: Path
    name: str
    format: DocumentFormat


def document_format(name: str, formats: Formats = TEXT_FORMATS) -> DocumentFormat | None:
    """Format told by a file's name, or None when it is not one we read."""
    stem, compression = name.lower(), ""
    for suffix in _COMPRESSIONS:
        if stem.endswith(suffix):
            stem, compression = stem.removesuffix(suffix), suffix
    kind = formats.kinds.get(os.path.splitext(stem)[1])
    return DocumentFormat(kind, compression) if kind else None


def list_files(
    paths: Sequence[str], *, parameter: str = "corpus.source.paths", formats: Formats = TEXT_FORMATS
) -> list[SourceFile]:
    """Files named by files and folders, in an order that only names decide.

    Folders are searched recursively; hidden entries, other formats and linked folders are passed over.

    Raises:
        UserError: a path does not exist or cannot be listed, a file has another format, or a folder holds nothing
            readable.
    """
    found: list[SourceFile] = []
    for given in paths:
        path = local_path(given, parameter=parameter)
        if path.is_dir():
            inside = list(_walk(path, parameter, formats))
            if not inside:
                raise UserError(
                    f"{parameter}: {given} holds no file that can be read ({formats.readable}); name another folder"
                )
            found.extend(inside)
        elif path.is_file():
            kind = document_format(path.name, formats)
            if kind is None:
                raise UserError(
                    f"{parameter}: {given} has a format that is not read; convert it to {formats.readable}"
                )
            found.append(SourceFile(path, path.name, kind))
        else:
            raise UserError(f"{parameter}: {given} does not exist; give an existing file or folder")
    return found


def _walk(folder: Path, parameter: str, formats: Formats) -> Iterable[SourceFile]:
    def refuse(error: OSError) -> None:
        raise UserError(f"{parameter}: {error.filename} cannot be listed ({error.strerror}); make it readable")

    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            kind = document_format(name, formats)
            path = Path(parent, name)
            if kind is None or name.startswith("."):
                continue
            if path.is_symlink() and not path.exists():
                raise UserError(f"{parameter}: {path} is a link to nothing; mend or remove it")
            if path.is_file():
                yield SourceFile(path, path.relative_to(folder).as_posix(), kind)


def state(entries: Iterable[tuple[str, Path]]) -> str:
    """Number, total size and a digest of names, sizes and modification times."""
    digest, count, size = hashlib.sha256(), 0, 0
    for name, path in entries:
        status = path.stat()
        digest.update(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
        count, size = count + 1, size + status.st_size
    return f"{count} files, {size} bytes, {digest.hexdigest()[:24]}"


def fingerprint_files(paths: Sequence[str], *, parameter: str, formats: Formats) -> str:
    """State of every file that `list_files` finds; see there for the errors."""
    return state((entry.name, entry.path) for entry in list_files(paths, parameter=parameter, formats=formats))


def folder_state(folder: Path) -> str:
    """State of every file below a folder, whatever its format."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return state((path.relative_to(folder).as_posix(), path) for path in files)


def tokenizer_path(path: str) -> Path:
    """Path of an existing tokenizer: a folder, a `.json` or a `.model` file.

    Raises:
        UserError: it does not exist or is something else.
    """
    place = local_path(path, parameter="tokenizer.path")
    if place.is_dir():
        return place
    if not place.exists():
        raise UserError(
            f"tokenizer.path: {path} does not exist; give a tokenizer folder, tokenizer.json or .model file"
        )
    if place.suffix not in (".json", ".model"):
        raise UserError(f"tokenizer.path: {path} is no tokenizer; give a folder, a tokenizer.json or a .model file")
    return place


def fingerprint_tokenizer(path: str) -> str:
    """State of a tokenizer's files; see `tokenizer_path` for the errors."""
    place = tokenizer_path(path)
    return folder_state(place) if place.is_dir() else state([(place.name, place)])


def template_path(path: str) -> Path:
    """Path of a chat template's file.

    Raises:
        UserError: it does not exist or is no file.
    """
    place = local_path(path, parameter="instructions.template.path")
    if not place.is_file():
        raise UserError(f"instructions.template.path: {path} is not a file; give the file of a Jinja template")
    return place
