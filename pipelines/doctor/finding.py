"""One line of the doctor's report, and how checks make them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

Level = Literal["ok", "warn", "fail"]
Subject = TypeVar("Subject")


@dataclass(frozen=True)
class Finding:
    """One line of the report: what was looked at, what was seen, and how to mend it (a command where there is one)."""

    level: Level
    subject: str
    text: str
    fix: str = ""


def collect(checks: Sequence[Callable[[Subject], Iterator[Finding]]], subject: Subject) -> list[Finding]:
    """Look at everything; a check that breaks is a finding, not an end."""
    findings: list[Finding] = []
    for check in checks:
        try:
            findings.extend(check(subject))
        except Exception as error:
            name = check.__name__.strip("_")
            findings.append(Finding("fail", name, f"the check itself failed: {type(error).__name__}: {error}"))
    return findings
