"""What a run would do, worked out without doing it: sections, keys, and which outputs exist already."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

from modelmill.components.core.errors import UserError
from modelmill.components.core.manifest import Manifest
from modelmill.components.core.recipe import PlannedStep, Recipe
from modelmill.components.core.step import StepOptions, finished_manifest, output_key, section
from modelmill.pipelines import catalog as catalogs


@dataclass(frozen=True)
class StepPlan:
    """One step of a run that has not started.

    Attributes:
        action: `reuse` (the output exists), `resume` (an unfinished attempt goes on), `run`, `always` for a step with
            side effects, which runs every time, or `blocked` when its outside input cannot be read from here.
        key: the output's key, when everything upstream is known.
        manifest: the existing output.
        problem: why it is blocked.
    """

    step: PlannedStep
    section: str
    action: str
    key: str | None = None
    manifest: Manifest | None = None
    problem: str = ""


def sections(
    recipe: Recipe,
    *,
    keep: Mapping[str, str] | None = None,
    finished: Collection[str] = (),
    store: Path | None = None,
) -> dict[str, str]:
    """Section of every step, as the pipeline receives it.

    Args:
        recipe: the run's recipe.
        keep: sections of a run to go on from.
        finished: steps whose kept section stays, as long as the output it names still exists in `store`.
        store: where finished outputs lie.

    Raises:
        UserError: an outside input that a section fingerprints is missing.
    """
    made: dict[str, str] = {}
    digests: dict[str, str | None] = {}
    for step in recipe.steps():
        kept = (keep or {}).get(step.name)
        if kept is not None and store is not None and step.name in finished:
            manifest = _existing(store, step, kept, digests)[1]
            if manifest is not None:
                made[step.name], digests[step.name] = kept, manifest.digest
                continue
        made[step.name], digests[step.name] = _section(step), None
    return made


def portable_sections(recipe: Recipe) -> dict[str, tuple[str, str]]:
    """Section of every step for a run that may happen elsewhere, and why its outside input cannot be read from here.

    The second text is empty when the input can be read; otherwise the section has no fingerprint.
    """
    found: dict[str, tuple[str, str]] = {}
    for step in recipe.steps():
        try:
            found[step.name] = _section(step), ""
        except UserError as error:
            found[step.name] = section(step.name, step.config, step.function), str(error)
    return found


def _section(step: PlannedStep) -> str:
    fingerprint = getattr(step.config, "fingerprint", None)
    return section(step.name, step.config, step.function, fingerprint() if callable(fingerprint) else "")


def _existing(
    store: Path, step: PlannedStep, text: str, digests: Mapping[str, str | None]
) -> tuple[str | None, Manifest | None]:
    """Key of a step's output and the output itself, as far as upstream digests are known."""
    upstream = {parameter: digests.get(name) for parameter, name in step.needs.items()}
    known = {parameter: digest for parameter, digest in upstream.items() if digest is not None}
    if len(known) < len(upstream):
        return None, None
    key = output_key(text, known)
    return key, finished_manifest(store, step.name, key)


def trace(recipe: Recipe, store: Path) -> list[StepPlan]:
    """What each step of a run would do now, following the keys down the chain; reads the store, writes nothing."""
    plans = []
    digests: dict[str, str | None] = {}
    texts = portable_sections(recipe)
    for step in recipe.steps():
        text, problem = texts[step.name]
        key, manifest = (None, None) if problem else _existing(store, step, text, digests)
        action = _action(step, store, key, manifest, problem)
        kept = manifest if action == "reuse" else None
        digests[step.name] = kept.digest if kept else None
        plans.append(StepPlan(step, text, action, key, kept, problem))
    return plans


def _action(step: PlannedStep, store: Path, key: str | None, manifest: Manifest | None, problem: str) -> str:
    options = declared_options(step.function)
    if problem:
        return "blocked"
    if not options.reuse:
        return "always"
    if manifest is not None:
        return "reuse"
    unfinished = options.resumable and key is not None and (store / step.name / f"{key}.partial").is_dir()
    return "resume" if unfinished else "run"


def declared_options(function: str) -> StepOptions:
    """Options of `@step_options` on a function named `module:name`, read from its source without importing it.

    Raises:
        UserError: there is no such module or function.
    """
    for decorator in _definition(function).decorator_list:
        if isinstance(decorator, ast.Call) and ast.unparse(decorator.func).endswith("step_options"):
            return StepOptions(**{word.arg: ast.literal_eval(word.value) for word in decorator.keywords if word.arg})
    return StepOptions()


def described(function: str) -> str:
    """First line of a step function's docstring, read like `declared_options`."""
    return (ast.get_docstring(_definition(function)) or "").partition("\n")[0]


@cache
def _definition(function: str) -> ast.FunctionDef:
    module, _, name = function.partition(":")
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        found = None
    if found is not None and found.origin is not None:
        for node in ast.parse(Path(found.origin).read_bytes()).body:
            if isinstance(node, ast.FunctionDef) and node.name == name:
                return node
    raise UserError(f"pipeline: the step {function} cannot be found; is its package installed?")


def stored_recipe(folder: Path, catalog: catalogs.Catalog | None = None) -> Recipe:
    """The recipe kept in a run's folder, checked against this installation.

    Raises:
        UserError: it is gone, or this version of the pipeline reads other parameters.
    """
    path = folder / "recipe.yaml"
    if not path.is_file():
        raise UserError(f"run: {path} is missing, so the run cannot be continued; start anew with `modelmill run`")
    return (catalog or catalogs.current()).parse(yaml.safe_load(path.read_text(encoding="utf-8")))
