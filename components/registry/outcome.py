"""Step `report_outcome`: what a retraining came to, told however it ended.

It runs last, also after a failure, and so takes nothing from the steps before it: what became of the champion stands
in the registry, and how the run ended comes from the engine.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modelmill.components.core import events, tracking
from modelmill.components.core.errors import UserError
from modelmill.components.core.step import StepResult, step_options
from modelmill.components.registry.moves import CHAMPION, read_aliases
from modelmill.components.registry.retrain_config import OutcomeConfig
from modelmill.components.registry.store import all_versions, open_registry

FAILED, UNCHANGED = "failed", "unchanged"
logger = logging.getLogger("modelmill")
_LONGEST = 2000  # characters of an error


@step_options(reuse=False)
def report_outcome(config: OutcomeConfig, output: Path, *, status: Mapping[str, Any]) -> StepResult:
    """Say in one line, in a report and in the run's tags whether the champion changed and why.

    Writes `outcome.json` and `report.md`. A registry that cannot be reached is said so and is no failure: a report
    that fails tells nobody anything.

    Args:
        config: the registered model.
        output: an empty folder.
        status: `state` (`SUCCEEDED` or another) and `error` of the steps before.

    Returns:
        kind `outcome`; metadata `outcome`: `promoted`, `challenger` or `kept` as this run's own version was,
        `unchanged` without new data or where the same was decided before, `failed`, or `unknown` without a registry.
    """
    found: dict[str, str] = {}
    trouble = ""
    try:
        found = _found(config.name)
    except UserError as problem:
        trouble = str(problem)
    state, error = str(status.get("state", "")), str(status.get("error", ""))[:_LONGEST]
    outcome = found.get("outcome") or UNCHANGED
    if state != "SUCCEEDED":
        outcome = FAILED
    elif trouble:
        outcome = "unknown"
    record = {**found, "outcome": outcome, "state": state, "error": error, "registry": trouble, "name": config.name}
    (output / "outcome.json").write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    (output / "report.md").write_text(_report(record), encoding="utf-8")
    level = logging.ERROR if outcome == FAILED else logging.INFO
    logger.log(level, "%s: %s%s", config.name, outcome, f" ({error or trouble})" if error or trouble else "")
    tracking.set_tags({"modelmill.outcome": outcome})
    tracking.log_artifact(output / "report.md")
    return StepResult("outcome", metadata={"outcome": outcome})


def _found(name: str) -> dict[str, str]:
    """The champion, and what this run made of its own version: `outcome`, `version`, `reason`; {} of a new model."""
    run = events.run_directory()
    with open_registry() as client:
        versions = all_versions(client, f"name = '{name}'")
        champion = read_aliases(client, name).get(CHAMPION, "") if versions else ""
        mine = [v for v in versions if run is not None and v.tags.get("promotion_run") == run.name]
    found = {"champion": champion}
    if mine:
        version = max(mine, key=lambda v: int(v.version))
        found |= {"version": str(version.version), "outcome": version.tags.get("promotion", "")}
        found["reason"] = version.tags.get("promotion_reason", "")
    return found


def _report(record: Mapping[str, str]) -> str:
    rows = [("outcome", f"**{record['outcome']}**"), ("champion", record.get("champion") or "none")]
    rows += [(key, record[key]) for key in ("version", "reason", "state", "error", "registry") if record.get(key)]
    lines = "\n".join(f"| {key} | {value.replace('|', chr(92) + '|').replace(chr(10), ' ')} |" for key, value in rows)
    return f"# Retraining of {record['name']}: {record['outcome']}\n\n| | |\n| --- | --- |\n{lines}\n"
