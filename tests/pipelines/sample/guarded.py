"""A pipeline that goes on only under a condition and reports however it ended."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from modelmill.components.core.manifest import Manifest
from modelmill.components.core.recipe import PlannedStep, Recipe, Section
from modelmill.components.core.step import StepResult, step_options
from tests.pipelines.sample.steps import CountConfig, WordsConfig


class LongConfig(Section):
    """What is worth counting."""

    at_least: int = Field(1, description="Words.")


class ReportConfig(Section):
    """Nothing to choose."""


class GuardedRecipe(Recipe):
    """Write words; count them if they are many; report."""

    pipeline: Literal["guarded"]
    words: WordsConfig = WordsConfig()
    many: LongConfig = LongConfig()
    count: CountConfig = CountConfig()

    def steps(self) -> list[PlannedStep]:
        source = "tests.pipelines.sample.steps"
        return [
            PlannedStep("write_words", self.words, f"{source}:write_words"),
            PlannedStep("is_long", self.many, f"{__name__}:is_long", {"words": "write_words"}),
            PlannedStep("count_words", self.count, f"{source}:count_words", {"words": "write_words"}),
            PlannedStep("report", ReportConfig(), f"{__name__}:report"),
        ]


def is_long(config: LongConfig, output: Path, *, words: Manifest) -> StepResult:
    """Whether there are enough words."""
    (output / "answer.txt").write_text("an artifact needs a file")
    return StepResult("answer", metadata={"found": words.counts["words"] >= config.at_least})


@step_options(reuse=False)
def report(config: ReportConfig, output: Path, *, status: Mapping[str, Any]) -> StepResult:
    """Keep what the engine said."""
    (output / "status.json").write_text(json.dumps(dict(status)))
    return StepResult("report", metadata={"state": status["state"]})
