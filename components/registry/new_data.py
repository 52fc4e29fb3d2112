"""Step `find_new_data`: is there enough that the champion has not been trained on?

A schedule starts a retraining whether or not anything happened since the last one. This step is its first question,
and the pipeline goes on only where the answer is yes.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

from modelmill.components.core import tracking
from modelmill.components.core.errors import UserError
from modelmill.components.core.manifest import Manifest
from modelmill.components.core.step import StepResult
from modelmill.components.data.record_ids import known_records, record_ids
from modelmill.components.registry.retrain_config import NewDataConfig

logger = logging.getLogger("modelmill")


def find_new_data(config: NewDataConfig, output: Path, *, data: Manifest, champion: Manifest) -> StepResult:
    """Compare prepared records with those the champion was trained on.

    Writes `new_data.json`. A champion without a list of its records, such as a base model before the first
    promotion, has seen none of them.

    Args:
        config: how many new records are worth a training.
        output: an empty folder.
        data: manifest of `prepare_instructions` or `ingest_corpus`.
        champion: manifest of `fetch_model`.

    Returns:
        kind `new_data`; metadata `found`; counts `records`, `known`, `new`.

    Raises:
        UserError: the prepared data has no training record.
    """
    records = set(record_ids(data))
    if not records:
        raise UserError("data: the training split is empty; give records, or lower the other fractions")
    known = records & known_records(champion)
    counts = {"records": len(records), "known": len(known), "new": len(records) - len(known)}
    found = counts["new"] >= config.min_records
    record = {**counts, "found": found, "min_records": config.min_records}
    (output / "new_data.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    what = "goes on" if found else f"ends here, as new_data.min_records is {config.min_records}"
    logger.info("%d of %d training records are new to the champion: the run %s", counts["new"], len(records), what)
    tracking.set_tags({"modelmill.new_records": str(counts["new"])})
    return StepResult("new_data", counts=counts, metadata={"found": found})
