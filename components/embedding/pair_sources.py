"""Every source of pairs as a stream of records with their places, and what a record must hold."""

from __future__ import annotations

import json
import math
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelmill.components.core.errors import UserError
from modelmill.components.core.uri import local_path
from modelmill.components.data.cleaning import normalize
from modelmill.components.data.conversations import BadRecord, read_conversation
from modelmill.components.data.files import DocumentFormat, SourceFile, list_files
from modelmill.components.data.formats import read_records
from modelmill.components.data.huggingface import read_rows
from modelmill.components.data.instruction_config import CompletionRecords
from modelmill.components.data.sources import open_files
from modelmill.components.embedding.config import PARAMETER, PairDataset, PairFields, PairFiles, RecordSource

_LIST = DocumentFormat("json", "")


@dataclass(frozen=True)
class Pair:
    """Two texts that belong together, or a score from 0 to 1 of how similar they are."""

    question: str
    positive: str
    score: float = 1.0


def pair_files(paths: list[str]) -> list[SourceFile]:
    """Files that hold records: what `list_files` finds, and `.json` files that are named themselves.

    Raises:
        UserError: a path does not exist, has another format, or holds text only.
    """
    found: list[SourceFile] = []
    for given in paths:
        path = local_path(given, parameter=f"{PARAMETER}.paths")
        if path.suffix.lower() == ".json" and path.is_file():
            found.append(SourceFile(path, path.name, _LIST))
            continue
        listed = list_files([given], parameter=f"{PARAMETER}.paths")
        records = [entry for entry in listed if entry.format.kind != "plain"]  # a README beside them is passed over
        if not records:
            raise UserError(f"{PARAMETER}.paths: {given} holds text but no records; give json, jsonl or parquet")
        found.extend(records)
    return found


def read_pair_records(source: RecordSource, scratch: Path) -> Generator[tuple[str, Any], None, None]:
    """Records of a source in its order, lazily, each with its place: `file:line`, `file item n` or `file row n`.

    Args:
        source: where the records are.
        scratch: folder for temporary files.

    Raises:
        UserError: something cannot be found or read; the message names the file and the place in it.
    """
    if isinstance(source, PairDataset):
        yield from read_rows(source)
        return
    if isinstance(source, PairFiles):
        files = [(entry.path, str(entry.path), entry.format) for entry in pair_files(source.paths)]
    else:
        files = (entry for entry in open_files(source, scratch) if entry[2].kind != "plain")  # type: ignore[assignment]
    for path, name, kind in files:
        if kind.kind == "json":
            yield from _listed(path, name)
        else:
            yield from read_records(path, name, kind, scratch=scratch, parameter=PARAMETER)


def _listed(path: Path, name: str) -> Iterator[tuple[str, Any]]:
    """Items of a JSON file that holds one list."""
    try:
        items = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{PARAMETER}: {name} is not JSON ({error}); mend it") from None
    if not isinstance(items, list):
        kind = type(items).__name__
        raise UserError(f"{PARAMETER}: {name} holds a {kind}, not a list of records; one record a line is .jsonl")
    for number, item in enumerate(items, start=1):
        yield f"{name} item {number}", item


def read_pair(value: Any, fields: PairFields) -> Pair:
    """The pair of a record, its texts in one form for equal texts.

    Args:
        value: the record, or the `ValueError` of a line that is no JSON.
        fields: which of its fields make the pair.

    Raises:
        BadRecord: a field is missing, empty or of another type, or the score is not in [0, 1].
    """
    completion = CompletionRecords(format="completion", prompt=fields.question, completion=fields.positive)
    question, positive = read_conversation(value, completion, None)
    score = 1.0
    if fields.score is not None:
        if fields.score not in value:
            raise BadRecord("missing_field", f"has no field {fields.score!r} but {', '.join(map(repr, value))}")
        score = value[fields.score]
        if isinstance(score, bool) or not isinstance(score, (int, float)) or not math.isfinite(score):
            raise BadRecord("wrong_type", f"{fields.score} is {score!r}, not a number")
        if not 0 <= score <= 1:
            raise BadRecord("score_range", f"{fields.score} is {score}, not from 0 to 1; scale it")
    return Pair(normalize(question.content).strip(), normalize(positive.content).strip(), float(score))
