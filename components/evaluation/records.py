"""The two files that the comparison of models runs on: what each wrote, and how each example scored.

`generations.jsonl`, in an artifact of kind `generations`, has one object a line:

    {"id": "doc-7", "prompt": "...", "references": ["..."], "prediction": "..."}

`id` is a string that is the same for every model that answered the question, and unique. `references` holds one or
more texts with something in them; `"reference": "..."` stands for a list of one. `prediction` may be empty: a model
may have nothing to say. Other keys are left alone. The artifact's metadata may hold `weights_digest` and
`dataset_digest`, which are handed on, and `decoding`, a mapping of how the answers were chosen, which becomes part of
`scoring`.

`scores.jsonl`, in any artifact, has one object a line:

    {"id": "doc-7", "references_digest": "1f3a...", "scores": {"rougeL": 0.25, "exact_match": 0.0}}

Every line has the same scores, all finite. `references_digest` may be missing; where both sides of a comparison have
one, they must agree, for scores against different references cannot be compared. The artifact's metadata may hold
`scoring`, a mapping of what else the numbers depend on, which must agree too, and `weights_digest` of the model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modelmill.components.core.errors import UserError
from modelmill.components.core.manifest import Manifest, json_digest

GENERATIONS_FILE, SCORES_FILE = "generations.jsonl", "scores.jsonl"


@dataclass(frozen=True)
class Generation:
    """One example that a model has answered; see the module for the file."""

    id: str
    prompt: str
    references: tuple[str, ...]
    prediction: str

    @property
    def references_digest(self) -> str:
        """16 hex digits that are the same for the same references in the same order."""
        return json_digest(self.references)[:16]


@dataclass(frozen=True)
class ExampleScores:
    """Scores of examples, in the order of their ids.

    Attributes:
        ids: unique, sorted.
        references_digests: of each example, empty where the file has none.
        values: metric to scores, [n] each.
    """

    ids: tuple[str, ...]
    references_digests: tuple[str, ...]
    values: Mapping[str, NDArray[np.float64]]


def write_generations(path: Path, generations: Iterable[Generation]) -> None:
    """Write `generations.jsonl`, in the order given."""
    _write(path, ({**vars(generation), "references": list(generation.references)} for generation in generations))


def read_generations(manifest: Manifest, parameter: str = "generations") -> list[Generation]:
    """Read and check the generations of an artifact, in the order of the file.

    Raises:
        UserError: naming file and line: no JSON, a field missing or no text, no reference, an id that came before; or
            there is no example at all.
    """
    path = manifest.path(GENERATIONS_FILE)
    found: list[Generation] = []
    lines: dict[str, int] = {}
    for number, record, where in _objects(path, parameter):
        generation = Generation(
            id=_string(record, "id", where),
            prompt=_string(record, "prompt", where),
            references=_references(record, where),
            prediction=_string(record, "prediction", where),
        )
        _once(generation.id, number, lines, where)
        found.append(generation)
    if not found:
        raise UserError(f"{parameter}: {path} has no example; generate for a set that is not empty")
    return found


def write_scores(
    path: Path,
    ids: Sequence[str],
    values: Mapping[str, NDArray[np.float64]],
    references_digests: Sequence[str] | None = None,
) -> None:
    """Write `scores.jsonl`, one line an example in the order given.

    Args:
        path: of the file.
        ids: unique, [n].
        values: metric to scores, [n] each.
        references_digests: [n]; None where scores do not depend on references, such as losses.
    """
    records: list[dict[str, Any]] = []
    for place, identity in enumerate(ids):
        digest = {} if references_digests is None else {"references_digest": references_digests[place]}
        scores = {name: float(column[place]) for name, column in values.items()}
        records.append({"id": identity, **digest, "scores": scores})
    _write(path, records)


def read_scores(manifest: Manifest, parameter: str) -> ExampleScores:
    """Read and check the scores of an artifact.

    Args:
        manifest: of an artifact that holds `scores.jsonl`.
        parameter: what to call it in an error.

    Raises:
        UserError: naming file and line: no JSON, a score that is no finite number, other metrics than in the first
            line, an id that came before; or there is no example at all.
    """
    path = manifest.path(SCORES_FILE)
    rows: list[tuple[str, str, dict[str, float]]] = []
    lines: dict[str, int] = {}
    for number, record, where in _objects(path, parameter):
        identity = _string(record, "id", where)
        _once(identity, number, lines, where)
        scores = record.get("scores")
        if not isinstance(scores, dict) or not scores:
            raise UserError(f"{where}: scores is {_shown(scores)}; it must map metrics to numbers")
        for name, value in scores.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise UserError(
                    f"{where}: {name} of example {identity!r} is {_shown(value)}; it must be a finite number"
                )
        if rows and scores.keys() != rows[0][2].keys():
            raise UserError(
                f"{where}: example {identity!r} has the scores {', '.join(sorted(scores))}, the first example"
                f" {', '.join(sorted(rows[0][2]))}; score every example with the same metrics"
            )
        digest = record.get("references_digest", "")
        rows.append((identity, digest if isinstance(digest, str) else "", scores))
    if not rows:
        raise UserError(f"{parameter}: {path} has no example; score a set that is not empty")
    rows.sort(key=lambda row: row[0])
    ids, digests, scores_by_row = zip(*rows, strict=True)
    values = {name: np.array([row[name] for row in scores_by_row], dtype=np.float64) for name in rows[0][2]}
    return ExampleScores(ids, digests, values)


def check_joined(candidate: ExampleScores, reference: ExampleScores, names: tuple[str, str]) -> None:
    """Refuse to compare scores that do not belong to the same examples.

    Args:
        candidate: one side.
        reference: the other.
        names: what to call the two in an error.

    Raises:
        UserError: an example is on one side only, or was scored against other references.
    """
    for (one, held), (other, wanted) in (
        ((names[0], candidate), (names[1], reference)),
        ((names[1], reference), (names[0], candidate)),
    ):
        if missing := sorted(set(wanted.ids) - set(held.ids)):
            raise UserError(
                f"{one}: {len(missing)} of the {len(wanted.ids)} examples of {other} are missing, the first is"
                f" {missing[0]!r}; score both on the same examples"
            )
    pairs = zip(candidate.ids, candidate.references_digests, reference.references_digests, strict=True)
    for identity, ours, theirs in pairs:
        if ours and theirs and ours != theirs:
            raise UserError(
                f"{names[0]}: example {identity!r} was scored against other references than in {names[1]};"
                " generate and score both on the same data"
            )


def check_scored_alike(candidate: Manifest, reference: Manifest, names: tuple[str, str]) -> None:
    """Refuse to compare scores that were made by different rules, as far as the artifacts state them.

    Raises:
        UserError: their `scoring` differs.
    """
    ours, theirs = candidate.metadata.get("scoring"), reference.metadata.get("scoring")
    if not isinstance(ours, dict) or not isinstance(theirs, dict):
        return
    for rule in sorted(ours.keys() | theirs.keys()):
        if ours.get(rule) != theirs.get(rule):
            raise UserError(
                f"{names[0]}: was scored with {rule} {json.dumps(ours.get(rule))}, {names[1]} with"
                f" {json.dumps(theirs.get(rule))}; score both alike"
            )


def _write(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")


def _objects(path: Path, parameter: str) -> Iterator[tuple[int, dict[str, Any], str]]:
    """Number, content and name of every line that is not blank."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{parameter}: {path} line {number}"
            try:
                record = json.loads(line)
            except ValueError as error:
                raise UserError(f"{where}: is not JSON ({error}); write one object a line") from None
            if not isinstance(record, dict):
                raise UserError(f"{where}: is {_shown(record)}; write one object a line")
            yield number, record, where


def _string(record: Mapping[str, Any], field: str, where: str) -> str:
    if field not in record:
        raise UserError(f"{where}: {field} is missing; every line needs it")
    return _checked(record[field], field, where)


def _references(record: Mapping[str, Any], where: str) -> tuple[str, ...]:
    if "reference" in record and "references" in record:
        raise UserError(f"{where}: has both reference and references; keep one of them")
    if "reference" not in record and "references" not in record:
        raise UserError(f"{where}: reference is missing; a prediction can only be scored against one")
    given = record["references"] if "references" in record else [record["reference"]]
    if not isinstance(given, list) or not given:
        raise UserError(f"{where}: references is {_shown(given)}; it must be a list of one or more texts")
    texts = tuple(_checked(text, "reference", where) for text in given)
    if not all(text.strip() for text in texts):
        raise UserError(f"{where}: a reference is empty; leave the example out, nothing can be compared with it")
    return texts


def _checked(value: object, field: str, where: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where}: {field} is {_shown(value)}; it must be a text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UserError(f"{where}: {field} holds half of a surrogate pair; write it as UTF-8") from None
    return value


def _once(identity: str, number: int, lines: dict[str, int], where: str) -> None:
    if identity in lines:
        raise UserError(f"{where}: id {identity!r} was used in line {lines[identity]}; give each example its own")
    lines[identity] = number


def _shown(value: object) -> str:
    known = {dict: "an object", list: "a list", type(None): "null"}
    return known.get(type(value)) or (str(value) if isinstance(value, (int, float)) else repr(value)[:60])
