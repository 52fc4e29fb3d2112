"""`modelmill cancel`: end a run, wherever it is."""

from __future__ import annotations

import click

from modelmill.pipelines.commands.console import of_anybody

_EXAMPLES = """\b
Examples:
  modelmill cancel latest
  modelmill cancel 20261121-1015
  modelmill cancel 1f0c... --profile team-p5
"""


@click.command("cancel", epilog=_EXAMPLES)
@click.argument("run", default="latest")
@of_anybody
@click.option(
    "--grace",
    type=click.FloatRange(min=0),
    default=20.0,
    show_default=True,
    metavar="SECONDS",
    help="Time that the steps of a local run were given when it was started.",
)
def cancel_command(run: str, profile: str | None, grace: float) -> None:
    """End a run.

    RUN is an id, a unique part of one, or `latest`. Steps here get their time of grace; a run on a cluster is
    terminated, its training jobs are deleted, and its runs in MLflow end as KILLED. If MLflow cannot be reached, the
    same command does that later. `modelmill resume` goes on from the last checkpoint.
    """
    from modelmill.components.core.home import Home
    from modelmill.pipelines.launch import cancel
    from modelmill.pipelines.launch.runs import find_run

    if profile is not None:
        from modelmill.pipelines.platform import load_profile

        state = cancel.cancel_foreign(run, load_profile(profile), click.echo)
        click.echo(f"{run}: {state}")
        return
    found = find_run(Home.current(), run)
    away = bool(found.record.place)
    state = cancel.cancel_on_kfp(found, click.echo) if away else cancel.cancel_local(found, grace)
    click.echo(f"{found.id}: {state}")
