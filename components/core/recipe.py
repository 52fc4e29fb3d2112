"""Recipes: one YAML file decides a run. Reading, `extends:`, `--set` overrides, checking, hashing.

Every domain owns the typed model of its section (`components/<domain>/config.py`); a pipeline's recipe type
puts sections together (`pipelines/recipes/`). Here is what they share.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field

from modelmill.components.core.errors import UserError
from modelmill.components.core.events import task_name
from modelmill.components.core.manifest import json_digest
from modelmill.components.core.presets import Presets, check, suggest


class Section(BaseModel):
    """Base of every section of a recipe: immutable, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class TrackingConfig(Section):
    """Where a run shows up in MLflow."""

    experiment: str = Field(default="modelmill", description="MLflow experiment of the pipeline run.")


class Recipe(Section):
    """What every pipeline's recipe has."""

    pipeline: str = Field(description="Name of the pipeline this recipe configures.")
    name: str = Field(description="Name shown in lists and in MLflow.")
    description: str = Field("", description="What the recipe is for, in one sentence.")
    tracking: TrackingConfig = TrackingConfig()

    def steps(self) -> list[PlannedStep]:
        """The pipeline's steps in the order they run; every recipe type lists its own."""
        raise NotImplementedError(f"{type(self).__name__} lists no steps")

    def tasks(self) -> list[str]:
        """Names under which the steps report: one a step, or one for each task of a loop."""
        return [task for step in self.steps() for task in step.tasks]

    def headline(self) -> list[str]:
        """`step.metric` names that sum up a run, best first; without any, every metric is shown."""
        return []

    def check_local(self) -> None:
        """Refuse what this machine cannot do before the first step starts, not hours later.

        Raises:
            UserError: one line naming the parameter, its value and the fix.
        """

    def resolved_yaml(self) -> str:
        """The recipe with every default filled in, as stored with a run."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)

    @property
    def hash(self) -> str:
        """Digest (16 hex digits) of everything that decides the run; name and description do not."""
        content = self.model_dump(mode="json", exclude={"name", "description"})
        return json_digest(content)[:16]


@dataclass(frozen=True)
class PlannedStep:
    """One step of a pipeline as its recipe sees it.

    Attributes:
        name: the step's name, which is also the name of its pipeline parameter.
        config: the step's own section.
        function: `module:name` of the step function, not imported until the step runs.
        needs: parameter of the function -> name of the upstream step whose manifest it receives.
        parallel: tasks of the loop that runs it, numbered from 0; None outside a loop.
    """

    name: str
    config: BaseModel
    function: str
    needs: Mapping[str, str] = field(default_factory=dict)
    parallel: int | None = None

    @property
    def tasks(self) -> list[str]:
        """Names of its tasks."""
        numbers: Iterable[int | None] = [None] if self.parallel is None else range(self.parallel)
        return [task_name(self.name, number) for number in numbers]


RecipeType = TypeVar("RecipeType", bound=Recipe)


def load_recipe(
    reference: str,
    *,
    folder: Path,
    types: Mapping[str, type[Recipe]],
    overrides: Sequence[str] = (),
) -> Recipe:
    """Read, extend, override and check a recipe.

    Args:
        reference: a shipped recipe (`laptop/llama-demo`) or the path of a YAML file.
        folder: where shipped recipes lie.
        types: recipe type of each pipeline by name.
        overrides: `dotted.key=value`, the value read as YAML.

    Raises:
        UserError: one line naming the recipe or the parameter, its value and the fix.
    """
    values = _presets(folder).read(reference, overrides)
    pipeline = values.get("pipeline")
    if not isinstance(pipeline, str) or pipeline not in types:
        hint = suggest(str(pipeline), list(types))
        raise UserError(f"pipeline: {pipeline!r} in {reference} is not a pipeline; {hint}")
    return validate(types[pipeline], values)


def validate(model: type[RecipeType], values: Mapping[str, Any]) -> RecipeType:
    """Check values against a recipe type: see `presets.check`."""
    return check(model, values, "recipe")


def shipped_recipes(folder: Path) -> list[str]:
    """Names of the recipes in a folder, such as `laptop/llama-demo`."""
    return _presets(folder).names()


def _presets(folder: Path) -> Presets:
    return Presets("recipe", (folder,), "--set", "training.steps=200", "modelmill list")
