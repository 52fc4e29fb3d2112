"""Names of training records that stay the same when data is prepared again, so that two trainings can be compared."""

from __future__ import annotations

import json
from collections.abc import Iterator

from modelmill.components.core.errors import UserError
from modelmill.components.core.manifest import Manifest
from modelmill.components.data.cleaning import digest
from modelmill.components.data.documents import read_documents

RECORDS_FILE = "training_records.txt"  # beside a model: ids of what it was trained on, one a line


def record_ids(data: Manifest) -> Iterator[str]:
    """Ids of the records of a training split, as hex.

    Args:
        data: manifest of `prepare_instructions` or `prepare_preferences` (ids of its records), or of `ingest_corpus`
            (digests of its texts).

    Raises:
        UserError: it is neither.
    """
    if data.kind in ("instructions", "preferences"):
        with data.path("train.jsonl").open(encoding="utf-8") as lines:
            for line in lines:
                yield str(json.loads(line)["id"])
    elif data.kind == "corpus":
        for batch in read_documents(data.path("train.arrow")):
            yield from (digest(text).hex() for text in batch)
    else:
        raise UserError(f"data: {data.uri} is of kind {data.kind}; give instructions, preferences or a corpus")


def known_records(model: Manifest) -> set[str]:
    """Ids of what a model was trained on, as far as its artifact tells."""
    if not any(entry.path == RECORDS_FILE for entry in model.files):
        return set()
    return set(model.path(RECORDS_FILE).read_text(encoding="utf-8").split())
