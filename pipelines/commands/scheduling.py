"""`modelmill schedule` and `modelmill schedules`: recurring runs on a cluster."""

from __future__ import annotations

import click

from modelmill.components.core.errors import UserError
from modelmill.pipelines.commands.console import as_json, print_json, print_table
from modelmill.pipelines.commands.launching import profile_overrides

_SCHEDULE_EXAMPLES = """\b
Examples:
  modelmill schedule laptop/retrain-docs-qa --profile team-p5 --cron "0 0 6 * * *"
  modelmill schedule my.yaml --profile team-p5 --every 6h --name nightly
"""
_SCHEDULES_EXAMPLES = """\b
Examples:
  modelmill schedules --profile team-p5
  modelmill schedules pause nightly --profile team-p5
  modelmill schedules delete nightly --profile team-p5
"""
_profile = click.option("--profile", metavar="PROFILE", required=True, help="Where on the cluster.")


@click.command("schedule", epilog=_SCHEDULE_EXAMPLES)
@click.argument("recipe")
@_profile
@profile_overrides
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change one value of the recipe.")
@click.option("--cron", metavar="FIELDS", help="Second, minute, hour, day, month, weekday; in UTC.")
@click.option("--every", metavar="INTERVAL", help="Time between two runs, such as 30m, 6h or 1d.")
@click.option("--name", help="Name of the schedule.  [default: the recipe's]")
@click.option("--catchup", is_flag=True, help="Make up for runs that were missed while it was paused.")
@click.option(
    "--concurrency", type=click.IntRange(1, 10), default=1, show_default=True, help="Runs of it at one time."
)
def schedule_command(
    recipe: str,
    profile: str,
    profile_set: tuple[str, ...],
    overrides: tuple[str, ...],
    cron: str | None,
    every: str | None,
    name: str | None,
    catchup: bool,
    concurrency: int,
) -> None:
    """Run a recipe again and again on a cluster.

    There is one schedule of a name. The same command twice changes nothing; with another recipe, code, profile or time
    the schedule is replaced, and stays paused if it was.
    """
    from modelmill.pipelines import catalog
    from modelmill.pipelines.launch import scheduling
    from modelmill.pipelines.launch.platform_tasks import Placement
    from modelmill.pipelines.platform import load_profile

    if (cron is None) == (every is None):
        raise UserError("schedule: give either --cron or --every")
    timing = scheduling.Timing(
        cron=scheduling.read_cron(cron) if cron else "",
        every=scheduling.read_every(every) if every else 0,
        catchup=catchup,
        concurrency=concurrency,
    )
    loaded = catalog.load(recipe, overrides)
    placement = Placement(loaded, load_profile(profile, profile_set), recipe)
    made, change = scheduling.schedule(placement, name or loaded.name, timing)
    paused = "" if made.enabled else f" (paused; `modelmill schedules resume {made.name} --profile {profile}`)"
    click.echo(f"{change}: {made.name}, {_when(made.timing.cron, made.timing.every)}{paused}")


@click.command("schedules", epilog=_SCHEDULES_EXAMPLES)
@click.argument("action", type=click.Choice(["list", "pause", "resume", "delete"]), default="list")
@click.argument("name", required=False)
@_profile
@as_json
def schedules_command(action: str, name: str | None, profile: str, as_json: bool) -> None:
    """List, pause, resume or delete schedules of a cluster.

    Runs that a schedule has started go on, whatever becomes of it.
    """
    from modelmill.pipelines.launch import scheduling
    from modelmill.pipelines.launch.kubeflow import Endpoint
    from modelmill.pipelines.platform import load_profile

    if (name is None) != (action == "list"):
        raise UserError("schedules: name the schedule to pause, resume or delete; the list takes no name")
    endpoint = Endpoint(load_profile(profile))
    if name is None:
        found = [each.describe() for each in scheduling.schedules(endpoint)]
        if as_json:
            print_json(found)
            return
        rows = [("NAME", "STATE", "WHEN", "AT ONCE", "CATCH UP")]
        for each in found:
            timing = each["timing"]
            state = "active" if each["enabled"] else "paused"
            when = _when(timing["cron"], timing["every"])
            rows.append((each["name"], state, when, str(timing["concurrency"]), "yes" if timing["catchup"] else "no"))
        print_table(rows)
        return
    if action == "delete":
        scheduling.one(endpoint, name)
        for held in scheduling.find(endpoint, name):
            scheduling.delete(endpoint, held)
        click.echo(f"deleted: {name}")
        return
    scheduling.set_enabled(endpoint, name, action == "resume")
    click.echo(f"{'active' if action == 'resume' else 'paused'}: {name}")


def _when(cron: str, seconds: int) -> str:
    from modelmill.pipelines.launch.watch import duration

    return f"cron {cron} UTC" if cron else f"every {duration(float(seconds))}"
