"""A pipeline with a loop: several tasks run one step."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from modelmill.components.core import tracking
from modelmill.components.core.errors import UserError
from modelmill.components.core.manifest import Manifest
from modelmill.components.core.recipe import PlannedStep, Recipe, Section
from modelmill.components.core.step import StepResult, step_options

TASKS = 3


class DrawConfig(Section):
    """What the tasks of the loop do."""

    ledger: str = Field("", description="File that gets a line every time a task runs.")
    fail_while: str = Field("", description="The second task fails as long as this file exists.")


class SumConfig(Section):
    """Nothing to choose."""


class FannedRecipe(Recipe):
    """Draw numbers at once, and add them."""

    pipeline: Literal["fanned", "fanned_unimportable"]
    draw: DrawConfig = DrawConfig()

    def steps(self) -> list[PlannedStep]:
        return [
            PlannedStep("draw_number", self.draw, f"{__name__}:draw_number", parallel=TASKS),
            PlannedStep("add_numbers", SumConfig(), f"{__name__}:add_numbers", {"numbers": "draw_number"}),
        ]


@step_options(reuse=False)
def draw_number(config: DrawConfig, output: Path, *, number: int) -> StepResult:
    """Draw the task's own number."""
    print(f"task {number}", flush=True)
    if number == 1 and config.fail_while and Path(config.fail_while).exists():
        raise UserError("draw.fail_while: it exists; remove it")
    if config.ledger:
        with Path(config.ledger).open("a") as ledger:
            ledger.write(f"{number}\n")
    (output / "number.txt").write_text(str(number))
    with tracking.child("part"):
        tracking.log_metrics({"drawn": number})
    tracking.log_metrics({"number": number})
    return StepResult("number", metrics={"number": number})


def add_numbers(config: SumConfig, output: Path, **numbers: Manifest) -> StepResult:
    """Add what was drawn."""
    total = sum(int(each.path("number.txt").read_text()) for each in numbers.values())
    (output / "sum.txt").write_text(str(total))
    return StepResult("sum", counts={"sum": total})
