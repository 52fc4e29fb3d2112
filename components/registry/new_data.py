"""Step `find_new_data`: is there enough that the champion has not been trained on?

A schedule starts a retraining whether or not anything happened since the last one. This step is its first question,
and the pipeline goes on only where the answer is yes.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

from modelmill.components.core import tracking
from modelmill.components.core.errors import UserError
from modelmill.components.core.manifest import Manifest
from modelmill.components.core.step import StepResult
from modelmill.components.registry.model_source import RECORDS_FILE
from modelmill.components.registry.retrain_config import NewDataConfig

logger = logging.getLogger("modelmill")


def find_new_data(config: NewDataConfig, output: Path, *, instructions: Manifest, champion: Manifest) -> StepResult:
    """Compare prepared records with those the champion was trained on.

    Writes `new_data.json`. A champion without a list of its records, such as a base model before the first
    promotion, has seen none of them.

    Args:
        config: how many new records are worth a training.
        output: an empty folder.
        instructions: manifest of `prepare_instructions`.
        champion: manifest of `fetch_model`.

    Returns:
        kind `new_data`; metadata `found`; counts `records`, `known`, `new`.

    Raises:
        UserError: the prepared data has no training record.
    """
    records = set(_ids(instructions))
    if not records:
        raise UserError("instructions: the training split is empty; give records, or lower the other fractions")
    known = records & _champions(champion)
    counts = {"records": len(records), "known": len(known), "new": len(records) - len(known)}
    found = counts["new"] >= config.min_records
    record = {**counts, "found": found, "min_records": config.min_records}
    (output / "new_data.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    what = "goes on" if found else f"ends here, as new_data.min_records is {config.min_records}"
    logger.info("%d of %d training records are new to the champion: the run %s", counts["new"], len(records), what)
    tracking.set_tags({"modelmill.new_records": str(counts["new"])})
    return StepResult("new_data", counts=counts, metadata={"found": found})


def _ids(instructions: Manifest) -> Iterator[str]:
    with instructions.path("train.jsonl").open(encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)["id"]


def _champions(champion: Manifest) -> set[str]:
    if not any(entry.path == RECORDS_FILE for entry in champion.files):
        return set()
    return set(champion.path(RECORDS_FILE).read_text(encoding="utf-8").split())
