"""`modelmill plan`: what a run would do and need."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from modelmill.pipelines.commands.console import as_json, gibibytes, number, print_json, print_table

if TYPE_CHECKING:
    from modelmill.pipelines.outlook import Outlook
    from modelmill.pipelines.plan import StepPlan

_EXAMPLES = """\b
Examples:
  modelmill plan laptop/llama-demo
  modelmill plan gpu/llama3-8b --price-per-hour 98 --mfu 0.38
"""
_MEANING = {
    "reuse": "its output exists",
    "resume": "goes on from its last checkpoint",
    "run": "",
    "always": "runs every time, for what it does or measures",
}


@click.command("plan", epilog=_EXAMPLES)
@click.argument("recipe")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change one value of the recipe.")
@click.option("--device", help="Device to plan for, such as h100, trn1-core or cpu.  [default: by the accelerator]")
@click.option("--mfu", type=click.FloatRange(0, 1, min_open=True), help="Model FLOPs utilisation to assume.")
@click.option("--price-per-hour", type=click.FloatRange(min=0), help="Price of one node; without it no cost is shown.")
@as_json
def plan_command(
    recipe: str,
    overrides: tuple[str, ...],
    device: str | None,
    mfu: float | None,
    price_per_hour: float | None,
    as_json: bool,
) -> None:
    """Show what a run would do and need, without touching anything."""
    from modelmill.components.core.home import Home
    from modelmill.pipelines import catalog, plan
    from modelmill.pipelines.outlook import outlook

    home = Home.current()
    loaded = catalog.load(recipe, overrides)
    steps = plan.trace(loaded, home.store)
    found = outlook(loaded, steps, home, device=device, mfu=mfu, price_per_hour=price_per_hour)
    if as_json:
        entries = [_entry(each) for each in steps]
        training = asdict(found) if found else None
        print_json({"recipe": loaded.name, "hash": loaded.hash, "steps": entries, "training": training})
        return
    click.echo(f"{loaded.name}  ({loaded.pipeline}, recipe {loaded.hash})\n{loaded.description}\n")
    print_table([(each.step.name, each.action, each.problem or _MEANING[each.action]) for each in steps], indent=2)
    if found is not None:
        click.echo("\nTraining")
        print_table(_rows(found), indent=2)
        click.echo("\nAssumptions")
        for sentence in found.assumptions:
            click.echo(f"  {sentence}")


def _entry(each: StepPlan) -> dict[str, object]:
    uri = each.manifest.uri if each.manifest else None
    return {"step": each.step.name, "action": each.action, "key": each.key, "uri": uri, "problem": each.problem}


def _rows(found: Outlook) -> list[tuple[str, str]]:
    from modelmill.pipelines.launch.watch import duration

    layout, total = found.layout, sum(found.memory.values())
    parts = ", ".join(f"{name} {gibibytes(size)}" for name, size in found.memory.items())
    verdict = ""
    if found.device_bytes:
        verdict = f" of {gibibytes(found.device_bytes)} on a {found.device}"
        verdict += "" if total < found.device_bytes else ": DOES NOT FIT; raise shard or tensor, or lower the batch"
    shards = f" in shards of {layout['shard']}" if layout["shard"] > 1 else ""
    rows = [
        ("layout", f"{layout['nodes']} nodes x {layout['processes_per_node']} processes = {found.devices}"),
        ("", f"tensor {layout['tensor']} x pipeline {layout['pipeline']} x data {layout['data']}{shards}"),
        ("batch", f"micro-batch {layout['micro_batch_size']} x accumulation {layout['accumulation_steps']}"),
        ("parameters", number(found.parameters)),
        ("memory", f"{gibibytes(total)} a device{verdict}"),
        ("", parts),
        ("tokens", f"{number(found.tokens)} ({number(found.tokens_per_step)} a step)"),
        ("operations", f"{number(found.flops)}FLOP"),
        ("time", "unknown" if found.seconds is None else _long(found.seconds, duration(found.seconds))),
    ]
    if found.cost is not None:
        rows.append(
            ("cost", f"{found.cost:,.{0 if found.cost > 1000 else 2}f} at the given price for {layout['nodes']} nodes")
        )
    return rows


def _long(seconds: float, text: str) -> str:
    return f"{seconds / 86400:,.1f} days" if seconds > 3 * 86400 else text
