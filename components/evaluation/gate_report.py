"""The gate's report: the decision in words, the table people publish, and every metric with its interval."""

from __future__ import annotations

from typing import TYPE_CHECKING

from modelmill.components.evaluation.config import GateConfig
from modelmill.components.evaluation.page import html_table, markdown_table, page, text

if TYPE_CHECKING:
    from modelmill.components.evaluation.gate import Decision

_Table = tuple[list[str], list[list[str]]]
_KINDS = {"better": "better", "held": "better", "tie": "", "worse": "worse", "broken": "worse"}


def relative_change(reference: float, candidate: float) -> float | None:
    """Change in percent of the reference, or None where that is 0."""
    return 100 * (candidate - reference) / abs(reference) if reference else None


def markdown_report(config: GateConfig, decision: Decision) -> str:
    """The report as Markdown."""
    parts = [
        f"# Gate {'passed' if decision.passed else 'failed'}",
        "".join(f"- {reason}\n" for reason in decision.reasons),
        markdown_table(*published_table(config, decision)),
        markdown_table(*_tests(config, decision)),
        markdown_table(*_metrics(config, decision)),
        _note(config, decision),
    ]
    return "\n".join(part.rstrip("\n") + "\n" for part in parts)


def html_report(config: GateConfig, decision: Decision) -> str:
    """The report as a page that needs nothing else."""
    state = "better" if decision.passed else "worse" if _broken(decision) else "unclear"
    sentences = "".join(f"<li>{text(reason)}</li>" for reason in decision.reasons)
    kinds = [_KINDS[test.outcome] for test in (decision.test, *decision.guards)]
    title = f"Gate {'passed' if decision.passed else 'failed'}"
    parts = [
        f'<div class="verdict {state}"><ul>{sentences}</ul></div>',
        html_table(*published_table(config, decision)),
        "<h2>What decided</h2>",
        html_table(*_tests(config, decision), kinds=kinds),
        "<h2>Every metric</h2>",
        html_table(*_metrics(config, decision)),
        f"<p class=note>{text(_note(config, decision))}</p>",
    ]
    return page(title, parts)


def published_table(config: GateConfig, decision: Decision) -> _Table:
    """One column a metric; rows reference, candidate, and the candidate's relative change in percent."""
    changes = [relative_change(row.reference, row.candidate) for row in decision.table]
    rows = [
        [config.reference_name, *(f"{row.reference:.5f}" for row in decision.table)],
        [config.candidate_name, *(f"{row.candidate:.5f}" for row in decision.table)],
        ["% difference (relative)", *("-" if change is None else f"{change:.5f}" for change in changes)],
    ]
    return ["model", *(row.metric for row in decision.table)], rows


def _broken(decision: Decision) -> bool:
    return any(test.outcome in ("worse", "broken") for test in (decision.test, *decision.guards))


def _tests(config: GateConfig, decision: Decision) -> _Table:
    head = ["decided by", config.reference_name, config.candidate_name, "better is", "gain", "at least", "at most"]
    rows = [
        [
            test.metric if test is decision.test else f"guard {test.metric}, {test.examples} examples",
            f"{test.reference:.5g}",
            f"{test.candidate:.5g}",
            test.direction,
            f"{test.gain:+.4g}",
            f"{test.lower:+.4g}",
            f"{test.upper:+.4g}",
            f"{test.threshold:+.4g}",
            f"{test.p_value:.2g}",
            test.outcome,
        ]
        for test in (decision.test, *decision.guards)
    ]
    return [*head, "tested against", "p", "outcome"], rows


def _metrics(config: GateConfig, decision: Decision) -> _Table:
    head = ["metric", config.reference_name, config.candidate_name, "difference", "at least", "at most"]
    rows = [
        [
            row.metric,
            f"{row.reference:.5f}",
            f"{row.candidate:.5f}",
            f"{row.difference:+.5f}",
            f"{row.lower:+.5f}",
            f"{row.upper:+.5f}",
        ]
        for row in decision.table
    ]
    return head, rows


def _note(config: GateConfig, decision: Decision) -> str:
    means = "random signs of the paired differences" if config.test == "permutation" else "resampled examples"
    return (
        f"{decision.examples:,} examples in pairs. Each bound alone holds with {100 * config.confidence:g} %"
        f" confidence (percentiles of {config.resamples:,} bootstrap resamples); p-values are one-sided, from"
        f" {config.resamples:,} draws of {means}. Metrics that do not decide are not corrected for their number."
    )
