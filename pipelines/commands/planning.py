"""`modelmill plan`: what a run would do and need."""

from __future__ import annotations

import click

from modelmill.pipelines.commands.console import as_json, print_json, print_table


@click.command(
    "plan",
    epilog="\b\nExamples:\n  modelmill plan laptop/llama-demo\n  modelmill plan gpu/llama3-8b --price-per-hour 4",
)
@click.argument("recipe")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change one value of the recipe.")
@as_json
def plan_command(recipe: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Show what a run would do, without touching anything."""
    from modelmill.components.core.home import Home
    from modelmill.pipelines import catalog, plan

    loaded = catalog.load(recipe, overrides)
    steps = plan.trace(loaded, Home.current().store)
    if as_json:
        print_json([{"step": each.step.name, "action": each.action, "key": each.key} for each in steps])
        return
    print_table([(each.step.name, each.action, each.key or "") for each in steps])
