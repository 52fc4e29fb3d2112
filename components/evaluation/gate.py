"""The gate: is a candidate better than the reference, example by example, and does it keep what must not fall?

One component for every comparison. It needs nothing but `scores.jsonl` of both sides (see `records`), so whatever
gives examples scores can be gated: generated text, losses of held-out rows, retrieval.

The decision is one-sided at the stated confidence. The candidate is *better* where the hypothesis that it gains no
more than the margin is rejected, *worse* where the hypothesis that it gains at least the margin is, else it is a
*tie*, which the recipe decides. A guard holds where the hypothesis that the candidate loses more than it may is
rejected, or where no single example lost more: a guard that too few examples were given for does not hold. All guards
must hold, so their number needs no correction. A failing gate is a result; only scores that cannot be compared are an
error.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from modelmill.components.core import tracking
from modelmill.components.core.errors import UserError
from modelmill.components.core.manifest import Manifest
from modelmill.components.core.recipe import suggest
from modelmill.components.core.step import StepResult
from modelmill.components.evaluation.config import GateConfig
from modelmill.components.evaluation.gate_report import html_report, markdown_report
from modelmill.components.evaluation.records import ExampleScores, check_joined, check_scored_alike, read_scores
from modelmill.components.evaluation.resampling import bootstrap_interval, compare_paired

logger = logging.getLogger("modelmill")
_FEWEST_RESAMPLED = 10  # below, resamples of so few examples say nothing about others

Outcome = Literal["better", "tie", "worse", "held", "broken"]


@dataclass(frozen=True)
class MetricTest:
    """What was found of one metric that decides.

    Attributes:
        metric: its name.
        examples: `same` or `other`, see `GuardConfig`.
        direction: which values are better.
        reference: mean over the examples.
        candidate: mean over the examples.
        gain: how much better the candidate is, negative where it is worse.
        lower: what the gain exceeds with the stated confidence.
        upper: what it stays below with the same confidence.
        threshold: what the gain is tested against: the margin, or the accepted loss below 0.
        p_value: of the hypothesis that the gain is at most the threshold.
        outcome: `better`, `tie` or `worse` of the gate's metric, `held` or `broken` of a guard.
        reason: the finding in words.
    """

    metric: str
    examples: str
    direction: str
    reference: float
    candidate: float
    gain: float
    lower: float
    upper: float
    threshold: float
    p_value: float
    outcome: Outcome
    reason: str


@dataclass(frozen=True)
class Row:
    """One metric that both sides have, whether or not it decides; differences are candidate minus reference."""

    metric: str
    reference: float
    candidate: float
    difference: float
    lower: float
    upper: float


@dataclass(frozen=True)
class Decision:
    """What the gate decided and why."""

    passed: bool
    examples: int
    test: MetricTest
    guards: tuple[MetricTest, ...]
    table: tuple[Row, ...]

    @property
    def reasons(self) -> list[str]:
        return [self.test.reason, *(guard.reason for guard in self.guards)]


@dataclass(frozen=True)
class Sides:
    """Scores of candidate and reference on the same examples."""

    candidate: ExampleScores
    reference: ExampleScores

    @property
    def metrics(self) -> list[str]:
        return [name for name in self.reference.values if name in self.candidate.values]


def gate(
    config: GateConfig,
    output: Path,
    *,
    candidate: Manifest,
    reference: Manifest,
    guard_candidate: Manifest | None = None,
    guard_reference: Manifest | None = None,
) -> StepResult:
    """Decide whether the candidate passes.

    Writes `gate.json`, `report.md` and `report.html`. The manifest's metadata says `passed`, `outcome`, `metric`,
    `reasons`, and where the scores state it `candidate_weights_digest` and `reference_weights_digest`, so that a
    promotion can check that it promotes what was judged.

    Args:
        config: what to compare and how surely.
        output: an empty folder.
        candidate: manifest of an artifact with `scores.jsonl`.
        reference: the same of what the candidate must beat.
        guard_candidate: the candidate's scores for guards on `other` examples.
        guard_reference: the reference's.

    Raises:
        UserError: a metric that a side lacks, scores that are not finite, examples or rules of scoring that differ, or
            no example at all.
    """
    main = _sides(candidate, reference, ("candidate", "reference"))
    other = None
    if guard_candidate is not None and guard_reference is not None:
        other = _sides(guard_candidate, guard_reference, ("guard_candidate", "guard_reference"))
    elif guard_candidate is not None or guard_reference is not None:
        missing = "guard_candidate" if guard_candidate is None else "guard_reference"
        raise UserError(f"{missing}: is missing; a guard compares the scores of both sides")
    decision = decide(config, main, other)
    record = {"passed": decision.passed, "examples": decision.examples, "config": config.model_dump(mode="json")}
    record |= {"test": asdict(decision.test), "guards": [asdict(guard) for guard in decision.guards]}
    record |= {"table": [asdict(row) for row in decision.table]}
    (output / "gate.json").write_text(
        json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n", "utf-8"
    )
    (output / "report.md").write_text(markdown_report(config, decision), encoding="utf-8")
    (output / "report.html").write_text(html_report(config, decision), encoding="utf-8")
    metrics = _metrics(decision)
    tracking.log_metrics(metrics)
    tracking.set_tags({"modelmill.gate": "passed" if decision.passed else "failed"})
    for file in sorted(output.iterdir()):
        tracking.log_artifact(file, "gate")
    logger.log(
        logging.INFO if decision.passed else logging.WARNING,
        "the gate %s: %s",
        "passed" if decision.passed else "failed",
        "; ".join(decision.reasons),
    )
    metadata: dict[str, Any] = {
        "passed": decision.passed,
        "outcome": decision.test.outcome,
        "metric": config.metric,
        "reasons": decision.reasons,
    }
    for name, manifest in (("candidate", candidate), ("reference", reference)):
        metadata[f"{name}_scores_digest"] = manifest.digest
        if "weights_digest" in manifest.metadata:
            metadata[f"{name}_weights_digest"] = manifest.metadata["weights_digest"]
    return StepResult("gate", {"examples": decision.examples, "passed": int(decision.passed)}, metrics, metadata)


def decide(config: GateConfig, main: Sides, other: Sides | None = None) -> Decision:
    """The decision itself, without files.

    Args:
        config: what to compare and how surely.
        main: scores of both sides.
        other: those for guards on `other` examples.

    Raises:
        UserError: a metric that a side lacks, or too few examples for the bootstrap.
    """
    if other is not None and not any(guard.examples == "other" for guard in config.guards):
        raise UserError("guards: none looks at the scores given for guards; set examples: other, or leave them out")
    gains = _gains(main, config.metric, config.direction, "metric")
    test = _tested(config, main, gains)
    guards = tuple(_guarded(config, place, main, other) for place in range(len(config.guards)))
    passed = test.outcome == "better" or (test.outcome == "tie" and config.tie == "pass")
    passed = passed and all(guard.outcome == "held" for guard in guards)
    return Decision(passed, len(main.reference.ids), test, guards, _table(config, main))


def _sides(candidate: Manifest, reference: Manifest, names: tuple[str, str]) -> Sides:
    check_scored_alike(candidate, reference, names)
    sides = Sides(read_scores(candidate, names[0]), read_scores(reference, names[1]))
    check_joined(sides.candidate, sides.reference, names)
    return sides


def _gains(sides: Sides, metric: str, direction: str, parameter: str) -> NDArray[np.float64]:
    """By how much the candidate is better on each example."""
    for name, scores in (("candidate", sides.candidate), ("reference", sides.reference)):
        if metric not in scores.values:
            raise UserError(f"{parameter}: the {name} has no score {metric!r}; {suggest(metric, list(scores.values))}")
    difference = sides.candidate.values[metric] - sides.reference.values[metric]
    return difference if direction == "higher" else -difference


def _compared(config: GateConfig, gains: NDArray[np.float64], threshold: float) -> dict[str, float]:
    if config.test == "bootstrap" and len(gains) < _FEWEST_RESAMPLED:
        raise UserError(
            f"test: the bootstrap needs {_FEWEST_RESAMPLED} examples, here are {len(gains)};"
            " set test: permutation or give more"
        )
    found = compare_paired(
        gains,
        against=threshold,
        test=config.test,
        confidence=config.confidence,
        resamples=config.resamples,
        seed=config.seed,
    )
    return {
        "gain": found.difference,
        "lower": found.lower,
        "upper": found.upper,
        "p_value": found.p_above,
        "p_below": found.p_below,
    }


def _means(sides: Sides, metric: str) -> dict[str, float]:
    return {
        "reference": float(sides.reference.values[metric].mean()),
        "candidate": float(sides.candidate.values[metric].mean()),
    }


def _tested(config: GateConfig, sides: Sides, gains: NDArray[np.float64]) -> MetricTest:
    found = _compared(config, gains, config.margin)
    alpha = 1 - config.confidence
    better, worse = found["p_value"] <= alpha, found.pop("p_below") <= alpha
    outcome: Outcome = "better" if better else "worse" if worse else "tie"
    means = _means(sides, config.metric)
    reason = f"{config.metric}: {config.candidate_name} {means['candidate']:.5g} against {config.reference_name}"
    reason += f" {means['reference']:.5g}, {_said(config, found)}: "
    over = f" by more than {config.margin:g}" if config.margin else ""
    if outcome == "better":
        reason += f"better{over}"
    elif outcome == "worse":
        reason += f"not better{over}" if config.margin else "worse"
    else:
        short = "to fall short of that" if config.margin else "worse"
        reason += f"shown neither to be better{over} nor {short}; a tie is set to {config.tie}"
        if config.test == "permutation" and 2.0 ** -len(gains) > alpha:
            reason += f"; {len(gains)} examples cannot show anything, give at least {_fewest(alpha)}"
    return MetricTest(
        metric=config.metric,
        examples="same",
        direction=config.direction,
        threshold=config.margin,
        outcome=outcome,
        reason=reason,
        **means,
        **found,
    )


def _guarded(config: GateConfig, place: int, main: Sides, other: Sides | None) -> MetricTest:
    guard = config.guards[place]
    sides = main if guard.examples == "same" else other
    if sides is None:
        raise UserError(
            f"guards.{place}.examples: other examples need the scores guard_candidate and guard_reference; give them"
        )
    gains = _gains(sides, guard.metric, guard.direction, f"guards.{place}.metric")
    found = _compared(config, gains, -guard.max_drop)
    del found["p_below"]
    held = found["p_value"] <= 1 - config.confidence or bool((gains >= -guard.max_drop).all())
    reason = f"guard {guard.metric}, {_said(config, found)}: "
    if held:
        reason += f"loses no more than {guard.max_drop:g}"
    elif found["gain"] < -guard.max_drop:
        reason += f"loses more than {guard.max_drop:g}"
    else:
        reason += f"not shown to lose no more than {guard.max_drop:g}; more examples may show it"
    return MetricTest(
        metric=guard.metric,
        examples=guard.examples,
        direction=guard.direction,
        threshold=-guard.max_drop,
        outcome="held" if held else "broken",
        reason=reason,
        **_means(sides, guard.metric),
        **found,
    )


def _said(config: GateConfig, found: dict[str, float]) -> str:
    bounds = f"at least {found['lower']:+.4g} and at most {found['upper']:+.4g}"
    return f"gain {found['gain']:+.4g} ({bounds}, {100 * config.confidence:g} % each; p = {found['p_value']:.2g})"


def _fewest(alpha: float) -> int:
    """Examples from which on random signs can reach a p-value of alpha."""
    return math.ceil(-math.log2(alpha))


def _table(config: GateConfig, sides: Sides) -> tuple[Row, ...]:
    """Every metric of both sides, bounds like those of the decision."""
    names: Sequence[str] = sides.metrics
    differences = np.stack([sides.candidate.values[name] - sides.reference.values[name] for name in names], axis=1)
    lower, upper = bootstrap_interval(
        differences, confidence=2 * config.confidence - 1, resamples=config.resamples, seed=config.seed
    )
    return tuple(
        Row(name, **_means(sides, name), difference=float(mean), lower=float(low), upper=float(high))
        for name, mean, low, high in zip(names, differences.mean(axis=0), lower, upper, strict=True)
    )


def _metrics(decision: Decision) -> dict[str, float]:
    test = decision.test
    metrics = {
        "passed": float(decision.passed),
        "candidate": test.candidate,
        "reference": test.reference,
        "gain": test.gain,
        "gain_lower": test.lower,
        "gain_upper": test.upper,
        "p_value": test.p_value,
    }
    for guard in decision.guards:
        name = f"guard_{guard.metric}" if guard.examples == "same" else f"guard_other_{guard.metric}"
        metrics |= {f"{name}_gain": guard.gain, f"{name}_p_value": guard.p_value}
    return metrics
