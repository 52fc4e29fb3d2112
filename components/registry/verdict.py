"""What a gate decided, read strictly: nothing is registered or promoted on a decision that is not one."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

from modelmill.components.core.errors import UserError
from modelmill.components.core.manifest import Manifest

GATE_FILE, REPORT_FILE = "gate.json", "report.md"


@dataclass(frozen=True)
class Verdict:
    """The decision of a gate.

    Attributes:
        passed: whether the candidate passed.
        reasons: why, in words.
        metric: what was compared.
        gain: by how much the candidate is better.
        digest: of the gate's artifact.
        candidate: digest of the weights that were judged.
        reference: digest of those it was compared with, empty where the scores did not say.
        report: the gate's report as Markdown, without its title.
    """

    passed: bool
    reasons: tuple[str, ...]
    metric: str
    gain: float
    digest: str
    candidate: str
    reference: str
    report: str

    @property
    def word(self) -> str:
        return "passed" if self.passed else "failed"


def is_gate(manifest: Manifest) -> bool:
    return manifest.kind == "gate"


def read_verdict(gate: Manifest, weights: str) -> Verdict:
    """The decision about a model.

    Args:
        gate: manifest of the gate.
        weights: digest of the model's weights.

    Raises:
        UserError: it is no gate, contradicts itself, holds a number that is none, or judged other weights.
    """
    if not is_gate(gate):
        raise UserError(f"gate: {gate.uri} is of kind {gate.kind}; give the output of the step gate")
    record, told = _record(gate), gate.metadata
    passed = record.get("passed")
    if not isinstance(passed, bool) or told.get("passed") is not passed:
        raise UserError(
            f"gate: its file says passed {passed!r} and its manifest {told.get('passed')!r}; run the gate again"
        )
    for name, value in [*gate.metrics.items(), *record["test"].items()]:
        if _is_number(value) and not math.isfinite(value):
            raise UserError(f"gate: its {name} is {value}, which decides nothing; mend the scores and run it again")
    candidate = str(told.get("candidate_weights_digest", ""))
    if candidate != weights:
        judged = f"{candidate[:16]}" if candidate else "weights its scores do not name"
        raise UserError(f"gate: it judged other weights ({judged}) than the model's {weights[:16]}; judge this model")
    title, _, report = gate.path(REPORT_FILE).read_text(encoding="utf-8").partition("\n")
    return Verdict(
        passed=passed is True,
        reasons=tuple(str(reason) for reason in told.get("reasons", ())),
        metric=str(told.get("metric", "")),
        gain=float(record["test"].get("gain", 0.0)),
        digest=gate.digest,
        candidate=candidate,
        reference=str(told.get("reference_weights_digest", "")),
        report=report.strip() if title.startswith("#") else f"{title}\n{report}".strip(),
    )


def _record(gate: Manifest) -> dict[str, Any]:
    path = gate.path(GATE_FILE)
    try:
        record = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"gate: {path} is no JSON ({error}); run the gate again") from None
    if not isinstance(record, dict) or not isinstance(record.get("test"), dict):
        raise UserError(f"gate: {path} holds no decision; run the gate again")
    return record


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
