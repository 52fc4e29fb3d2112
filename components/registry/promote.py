"""Step `promote`: a version that passed its gate becomes the champion, and everything else stays as it is.

The champion moves only where the gate compared the version with this very champion. A version that passed against
something else becomes the challenger; one that failed is kept. All of them are results.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelmill.components.core import events, tracking
from modelmill.components.core.errors import UserError
from modelmill.components.core.manifest import Manifest
from modelmill.components.core.step import StepResult, step_options
from modelmill.components.registry.config import PromoteConfig
from modelmill.components.registry.moves import CHALLENGER, CHAMPION, PREVIOUS, Move, carry_out, read_aliases, settle
from modelmill.components.registry.store import (
    WEIGHTS_TAG,
    check_files,
    exclusive,
    find_version,
    open_registry,
    whoever,
)
from modelmill.components.registry.verdict import Verdict, read_verdict

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

PROMOTED, KEPT, CHALLENGING, ALREADY = "promoted", "kept", "challenger", "already"
_LONGEST = 2000  # characters of a reason in a tag
logger = logging.getLogger("modelmill")


@dataclass(frozen=True)
class _Decision:
    """What becomes of the version.

    Attributes:
        outcome: `promoted`, `challenger`, `kept` or `already`.
        reason: in words.
        champion: version that is the champion before it, None where there is none.
        previous: version that `previous` points to before it.
        settled: nothing is to be written, as an earlier call has written it.
    """

    outcome: str
    reason: str
    champion: str | None
    previous: str | None
    settled: bool = False


@step_options(reuse=False)
def promote(config: PromoteConfig, output: Path, *, registration: Manifest, gate: Manifest) -> StepResult:
    """Make a registered version the champion if its gate says so; repeating it changes nothing.

    Writes `promotion.json` and `report.md`; the version's tags say who promoted it, when, and why.

    Args:
        config: a note to keep.
        output: an empty folder.
        registration: manifest of `register_model`.
        gate: manifest of the gate that judged these weights.

    Returns:
        kind `promotion`; metadata `outcome` (`promoted`, `challenger`, `kept`, or `already` where the version is the
        champion), `name`, `version`, `champion` (version afterwards, empty where there is none), `reason`,
        `weights_digest`; counts `promoted`.

    Raises:
        UserError: the gate judged other weights or decides nothing, the version or its files are not what was
            registered, or the registry cannot be used.
    """
    name, number, weights = _registered(registration)
    verdict = read_verdict(gate, weights)
    with open_registry() as client, exclusive():
        version = find_version(client, name, number)
        if version is None:
            raise UserError(
                f"registration: {name} version {number} is not in the registry any more; register it again"
            )
        if version.tags.get(WEIGHTS_TAG) != weights:
            told = str(version.tags.get(WEIGHTS_TAG))[:16]
            raise UserError(
                f"registration: {name} version {number} has the weights {told} in the registry, the gate judged "
                f"{weights[:16]}; register this model again"
            )
        finished = settle(client, name)
        decision = _decide(client, version, verdict)
        if decision.outcome in (PROMOTED, CHALLENGING) and not decision.settled:
            check_files(client, version, output.parent)
            # Digesting a large model takes minutes; the champion may be another one by now.
            decision = _decide(client, version, verdict)
        if finished is not None and finished.action == "promote" and decision.outcome == ALREADY:
            decision = _Decision(PROMOTED, "; ".join(verdict.reasons), finished.replaced, finished.previous, True)
        _write(client, version, decision, verdict, config)
        aliases = read_aliases(client, name)
    record = _record(registration, decision, verdict, config, aliases)
    (output / "promotion.json").write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (output / "report.md").write_text(_report(record), encoding="utf-8")
    level = logging.WARNING if decision.outcome == KEPT else logging.INFO
    logger.log(level, "%s version %s: %s: %s", name, number, decision.outcome, decision.reason)
    tracking.set_tags({"modelmill.promotion": decision.outcome, "model": f"models:/{name}/{number}"})
    tracking.log_artifact(output / "report.md", "promotion")
    kept = ("outcome", "name", "version", "champion", "reason", WEIGHTS_TAG)
    promoted = int(decision.outcome == PROMOTED)
    return StepResult("promotion", {"promoted": promoted}, {}, {key: record[key] for key in kept})


def _registered(registration: Manifest) -> tuple[str, str, str]:
    """Name, version and weights of what was registered."""
    facts = registration.metadata
    if registration.kind != "registration" or not {"name", "version", WEIGHTS_TAG} <= facts.keys():
        raise UserError(
            f"registration: {registration.uri} is of kind {registration.kind}; give that of register_model"
        )
    return str(facts["name"]), str(facts["version"]), str(facts[WEIGHTS_TAG])


def _decide(client: MlflowClient, version: ModelVersion, verdict: Verdict) -> _Decision:
    """What the gate's decision means in the registry as it is now."""
    name, number, tags = version.name, str(version.version), version.tags
    aliases = read_aliases(client, name)
    champion, previous = aliases.get(CHAMPION), aliases.get(PREVIOUS)
    judged_before = tags.get("promotion_gate") == verdict.digest

    def decided(outcome: str, reason: str, *, settled: bool = False) -> _Decision:
        return _Decision(outcome, reason, champion, previous, settled)

    if champion == number:
        return decided(ALREADY, f"version {number} is the champion; the gate {verdict.word}", settled=True)
    if "rolled_back" in tags:
        return decided(
            KEPT,
            f"version {number} was rolled back ({tags['rolled_back']}); to allow it again, delete its tag rolled_back",
            settled=True,
        )
    if not verdict.passed:
        reason = f"the gate failed: {'; '.join(verdict.reasons)}"
        return decided(KEPT, reason, settled=judged_before and tags.get("promotion") == KEPT)
    if judged_before and tags.get("promotion") == PROMOTED:
        reason = f"version {number} was promoted by this gate before, and version {champion} is the champion since"
        return decided(KEPT, reason, settled=True)
    if champion is None:
        return decided(PROMOTED, "; ".join(verdict.reasons))
    reigning = find_version(client, name, champion)
    weights = str(reigning.tags.get(WEIGHTS_TAG, "")) if reigning is not None else ""
    if verdict.reference and verdict.reference == weights:
        return decided(PROMOTED, "; ".join(verdict.reasons))
    against = f"the weights {verdict.reference[:16]}" if verdict.reference else "weights that its scores do not name"
    reason = (
        f"the gate passed against {against}, and the champion is version {champion} with {weights[:16] or 'unknown'}; "
        "compare with that one to promote it"
    )
    settled = judged_before and tags.get("promotion") == CHALLENGING
    return decided(CHALLENGING, reason, settled=settled)


def _write(
    client: MlflowClient, version: ModelVersion, decision: _Decision, verdict: Verdict, config: PromoteConfig
) -> None:
    """Aliases first of the challenger, then what the version says about itself."""
    if decision.settled:
        return
    name, number = version.name, str(version.version)
    tags = {
        "promotion": decision.outcome,
        "promotion_reason": decision.reason[:_LONGEST],
        "promotion_gate": verdict.digest,
        "promotion_by": whoever(),
        "promotion_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    if config.note:
        tags["promotion_note"] = config.note
    if run := events.run_directory():
        tags["promotion_run"] = run.name
    if decision.outcome == PROMOTED:
        tags["promotion_replaced"] = decision.champion or ""
        move = Move("promote", number, decision.champion, decision.champion, decision.previous, number, tags)
        carry_out(client, name, move)
        return
    if decision.outcome == CHALLENGING:
        client.set_registered_model_alias(name, CHALLENGER, number)
    elif read_aliases(client, name).get(CHALLENGER) == number:
        client.delete_registered_model_alias(name, CHALLENGER)  # a later gate found against it
    for tag, value in tags.items():
        client.set_model_version_tag(name, number, tag, value)


def _record(
    registration: Manifest, decision: _Decision, verdict: Verdict, config: PromoteConfig, aliases: dict[str, str]
) -> dict[str, Any]:
    name, number, weights = _registered(registration)
    judged = asdict(verdict)
    del judged["report"]
    return {
        "outcome": decision.outcome,
        "reason": decision.reason,
        "name": name,
        "version": number,
        WEIGHTS_TAG: weights,
        "champion": aliases.get(CHAMPION, ""),
        "previous": aliases.get(PREVIOUS, ""),
        "by": whoever(),
        "note": config.note,
        "gate": judged,
    }


def _report(record: dict[str, Any]) -> str:
    gate = record["gate"]
    rows = {
        "outcome": f"**{record['outcome']}**",
        "model": f"{record['name']} version {record['version']}",
        "champion now": f"version {record['champion']}" if record["champion"] else "none",
        "previous": f"version {record['previous']}" if record["previous"] else "none",
        "weights": f"`{record[WEIGHTS_TAG]}`",
        "gate": f"{'passed' if gate['passed'] else 'failed'} on {gate['metric']}, `{gate['digest'][:16]}`",
        "compared with": f"weights `{gate['reference'][:16]}`" if gate["reference"] else "not named by its scores",
        "by": record["by"].replace("|", "\\|"),
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    note = f"\n{record['note']}\n" if record["note"] else ""
    reasons = "".join(f"- {reason}\n" for reason in gate["reasons"])
    return (
        f"# {record['name']} version {record['version']}: {record['outcome']}\n\n{record['reason']}\n{note}\n"
        f"| | |\n| --- | --- |\n{table}\n\n{reasons}"
    )
