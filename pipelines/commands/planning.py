"""`modelmill plan`: what a run would do and need."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from modelmill.components.core.errors import UserError
from modelmill.pipelines.commands.console import as_json, gibibytes, number, print_json, print_table
from modelmill.pipelines.commands.launching import profile_option, profile_overrides

if TYPE_CHECKING:
    from modelmill.components.core.recipe import Recipe
    from modelmill.pipelines.outlook import Outlook
    from modelmill.pipelines.placement import Place
    from modelmill.pipelines.plan import StepPlan
    from modelmill.pipelines.platform import Profile

_EXAMPLES = """\b
Examples:
  modelmill plan laptop/llama-demo
  modelmill plan gpu/llama3-8b --price-per-hour 98 --mfu 0.38
  modelmill plan gpu/llama3-8b --profile eks-p5
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
@profile_option
@profile_overrides
@click.option("--device", help="Device to plan for, such as h100, trn1-core or cpu.  [default: by the accelerator]")
@click.option("--mfu", type=click.FloatRange(0, 1, min_open=True), help="Model FLOPs utilisation to assume.")
@click.option("--price-per-hour", type=click.FloatRange(min=0), help="Price of one node; without it no cost is shown.")
@as_json
def plan_command(
    recipe: str,
    overrides: tuple[str, ...],
    profile: str | None,
    profile_set: tuple[str, ...],
    device: str | None,
    mfu: float | None,
    price_per_hour: float | None,
    as_json: bool,
) -> None:
    """Show what a run would do and need, without touching anything.

    With the profile of a cluster: where each step would run there, and what keeps it from being submitted.
    """
    from modelmill.components.core.home import Home
    from modelmill.pipelines import catalog, plan
    from modelmill.pipelines.outlook import outlook

    if profile is None and profile_set:
        raise UserError("--profile-set: changes a profile; name it with --profile")
    place = _cluster(profile, profile_set)
    home = Home.current()
    loaded = catalog.load(recipe, overrides)
    # What exists in the home of a cluster is not known here; its steps find out when they run.
    steps = [] if place else plan.trace(loaded, home.store)
    price = place.price_per_hour if place and price_per_hour is None else price_per_hour
    device = device or (place.device if place else None)
    found = outlook(loaded, steps, home, device=device, mfu=mfu, price_per_hour=price, elsewhere=place is not None)
    document: dict[str, object] = {"recipe": loaded.name, "hash": loaded.hash}
    if place:
        where, why = _placement(loaded, place, found)
        document |= {"profile": place.name, "steps": [asdict(each) for each in where], "problems": why}
    else:
        document["steps"] = [_entry(each) for each in steps]
    document["training"] = asdict(found) if found else None
    if as_json:
        print_json(document)
        return
    click.echo(f"{loaded.name}  ({loaded.pipeline}, recipe {loaded.hash})\n{loaded.description}\n")
    if place:
        _show_placement(place, where, why)
    else:
        print_table([(each.step.name, each.action, each.problem or _MEANING[each.action]) for each in steps], indent=2)
    if found is not None:
        click.echo("\nTraining")
        print_table(_rows(found), indent=2)
        click.echo("\nAssumptions")
        for sentence in found.assumptions:
            click.echo(f"  {sentence}")


def _cluster(name: str | None, overrides: tuple[str, ...]) -> Profile | None:
    """The profile, when it is of a cluster; one of this machine changes nothing."""
    from modelmill.pipelines.platform import load_profile

    profile = load_profile(name, overrides) if name else None
    return profile if profile and profile.where == "cluster" else None


def _placement(recipe: Recipe, profile: Profile, found: Outlook | None) -> tuple[list[Place], list[str]]:
    """Pods of every step, and what keeps the recipe from running under the profile."""
    from modelmill.pipelines.placement import places, problems

    why, job = problems(recipe, profile), profile.trainjob
    if profile.launcher == "trainjob" and job and job.deadline_seconds and found and found.seconds:
        needed, allowed = found.seconds / 86400, job.deadline_seconds / 86400
        if needed > allowed:
            why.append(
                f"trainjob.deadline_seconds: {allowed:,.1f} days end the job before the {needed:,.1f} days it is"
                " predicted to take; raise it and step_timeout_seconds"
            )
    return places(recipe, profile), why


def _show_placement(profile: Profile, where: list[Place], why: list[str]) -> None:
    click.echo(f"On {profile.name}: {profile.description}")
    rows = []
    for each in where:
        asks = ", ".join(f"{amount} {name}" for name, amount in each.asks.items())
        nodes = ", ".join(each.nodes.values()) or "any node"
        waits = f", queue {each.queue}" if each.queue else ""
        pods = each.kind if each.kind == "pod" else f"{each.kind}, {each.count} nodes"
        rows.append((each.step, pods, asks, f"{nodes}{waits}", each.image))
    print_table(rows, indent=2)
    if why:
        click.echo("\nNot admissible as it is")
        for problem in why:
            click.echo(f"  {problem}")


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
