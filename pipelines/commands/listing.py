"""`modelmill list`: pipelines, their steps, the recipes that configure them, and the profiles they run under."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import click

from modelmill.components.core.errors import UserError
from modelmill.pipelines.commands.console import as_json, print_json, print_table

if TYPE_CHECKING:
    from modelmill.pipelines.catalog import Catalog


@click.command("list", epilog="\b\nExamples:\n  modelmill list\n  modelmill list --json")
@as_json
def list_command(as_json: bool) -> None:
    """Show pipelines, their steps, the recipes and the profiles."""
    from modelmill.pipelines.catalog import current

    found = _collect(current())
    if as_json:
        print_json(found)
        return
    click.echo("Pipelines")
    print_table([(each["name"], each["description"]) for each in found["pipelines"]], indent=2)
    click.echo("\nRecipes")
    print_table([(each["name"], each["problem"] or each["description"]) for each in found["recipes"]], indent=2)
    click.echo("\nProfiles")
    print_table([(each["name"], each["problem"] or each["description"]) for each in found["profiles"]], indent=2)
    click.echo("\nSteps")
    print_table([(each["name"], each["function"], each["description"]) for each in found["steps"]], indent=2)


def _collect(catalog: Catalog) -> dict[str, list[dict[str, Any]]]:
    from modelmill.pipelines.plan import declared_options, described

    pipelines, recipes = [], []
    steps: dict[str, dict[str, Any]] = {}
    for name, pipeline in catalog.pipelines.items():
        text = inspect.getdoc(pipeline.recipe_type()) or ""
        pipelines.append({"name": name, "description": text.partition("\n")[0]})
    for name in catalog.recipe_names():
        try:
            recipe = catalog.load(name)
        except UserError as error:
            recipes.append({"name": name, "pipeline": None, "description": "", "problem": f"broken: {error}"})
            continue
        recipes.append({"name": name, "pipeline": recipe.pipeline, "description": recipe.description, "problem": ""})
        for step in recipe.steps():
            options = declared_options(step.function)
            entry = {"name": step.name, "function": step.function, "description": described(step.function)}
            steps.setdefault(step.function, {**entry, "reuse": options.reuse, "resumable": options.resumable})
    return {"pipelines": pipelines, "recipes": recipes, "profiles": _profiles(), "steps": list(steps.values())}


def _profiles() -> list[dict[str, Any]]:
    from modelmill.pipelines.platform import load_profile, profile_names

    found = []
    for name in profile_names():
        try:
            found.append({"name": name, "description": load_profile(name).description, "problem": ""})
        except UserError as error:
            found.append({"name": name, "description": "", "problem": f"broken: {error}"})
    return found
