"""Recipes: one YAML file decides a run. Reading, `extends:`, `--set` overrides, checking, hashing.

Every domain owns the typed model of its section (`components/<domain>/config.py`); a pipeline's recipe type
puts sections together (`pipelines/recipes/`). Here is what they share.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from modelmill.components.core.errors import UserError
from modelmill.components.core.manifest import json_digest


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
    """

    name: str
    config: BaseModel
    function: str
    needs: Mapping[str, str] = field(default_factory=dict)


RecipeType = TypeVar("RecipeType", bound=Recipe)


def suggest(word: str, known: Sequence[str]) -> str:
    """`; did you mean ...?` for a word close to a known one, else the known ones."""
    close = difflib.get_close_matches(word, known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"choose from {', '.join(sorted(known))}"


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
    values = _read(find_recipe(reference, folder), folder, seen=())
    for override in overrides:
        _apply(values, override)
    pipeline = values.get("pipeline")
    if not isinstance(pipeline, str) or pipeline not in types:
        hint = suggest(str(pipeline), list(types))
        raise UserError(f"pipeline: {pipeline!r} in {reference} is not a pipeline; {hint}")
    return validate(types[pipeline], values)


def validate(model: type[RecipeType], values: Mapping[str, Any]) -> RecipeType:
    """Check values against a recipe type, turning pydantic's report into one line a field.

    Raises:
        UserError: every wrong field with its value and what is expected.
    """
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        raise UserError("; ".join(_sentence(detail, model) for detail in error.errors())) from None


def find_recipe(reference: str, folder: Path) -> Path:
    """Path of a recipe named by file or by its name among the shipped ones.

    Raises:
        UserError: there is none; similar names are suggested.
    """
    path = Path(reference)
    if path.suffix in (".yaml", ".yml"):
        if path.is_file():
            return path
        raise UserError(f"recipe: {reference} does not exist; give a file, or a name that `modelmill list` shows")
    shipped = folder / f"{reference}.yaml"
    if shipped.is_file() and shipped.resolve().is_relative_to(folder.resolve()):
        return shipped
    raise UserError(f"recipe: no recipe is called {reference!r}; {suggest(reference, shipped_recipes(folder))}")


def shipped_recipes(folder: Path) -> list[str]:
    """Names of the recipes in a folder, such as `laptop/llama-demo`."""
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))


def _read(path: Path, folder: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in seen:
        raise UserError(f"extends: {path} extends itself; remove one of the two `extends:` lines")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        raise UserError(f"recipe: {path}{where} is not YAML ({getattr(error, 'problem', error)})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"recipe: {path} is not UTF-8 (byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"recipe: {path} cannot be read ({error.strerror}); check its permissions") from None
    if not isinstance(values, dict):
        raise UserError(f"recipe: {path} holds no mapping; start from `modelmill list` and a shipped recipe")
    base = values.pop("extends", None)
    if base is None:
        return values
    sibling = path.parent / str(base)
    parent = sibling if sibling.is_file() else find_recipe(str(base), folder)
    return _merge(_read(parent, folder, (*seen, path.resolve())), values)


def _merge(base: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, Mapping) else value
    return merged


def _apply(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"--set: {override!r} is not key=value; write for example --set training.steps=200")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"--set: the value {text!r} of {key} is not YAML; quote it") from None
    *parents, last = key.split(".")
    for parent in parents:
        child = values.get(parent)
        if child is None:  # absent, or a section left empty in the file
            child = values[parent] = {}
        if not isinstance(child, dict):
            raise UserError(f"--set: {key} goes through {parent}, which is a value, not a section")
        values = child
    values[last] = value


def _sentence(detail: Any, model: type[BaseModel]) -> str:
    place = ".".join(str(part) for part in detail["loc"]) or "recipe"
    kind, value = detail["type"], detail["input"]
    if kind == "extra_forbidden":
        return f"{place}: no such parameter; {suggest(str(detail['loc'][-1]), _fields(model, detail['loc'][:-1]))}"
    if kind == "missing":
        return f"{place}: is missing; add it to the recipe"
    message = detail["msg"].removeprefix("Value error, ")
    if not detail["loc"]:  # sections that do not fit together: the message names both
        return message
    shown = "" if isinstance(value, (dict, BaseModel)) or repr(value) in message else f"{value!r}: "
    return f"{place}: {shown}{message}"


def _fields(model: type[BaseModel], path: Sequence[Any]) -> list[str]:
    """Field names of the section at a path, through optional sections, lists and alternatives told apart by a tag."""
    sections = [model]
    for part in path:
        if isinstance(part, int):
            continue  # an item has the fields of its list's annotation
        tagged = [s for s in sections if part in _tags(s)]
        inner = [_sections(s.model_fields[part].annotation) for s in sections if part in s.model_fields]
        sections = tagged or [nested for found in inner for nested in found]
    return sorted({name for section in sections for name in section.model_fields})


def _sections(annotation: Any) -> list[type[BaseModel]]:
    """Models named anywhere in an annotation."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [nested for option in getattr(annotation, "__args__", ()) for nested in _sections(option)]


def _tags(section: type[BaseModel]) -> tuple[Any, ...]:
    """Values of a section's `type` field, which pydantic puts into the place of an error."""
    kind = section.model_fields.get("type")
    return getattr(kind.annotation, "__args__", ()) if kind else ()
