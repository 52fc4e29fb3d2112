"""`modelmill run` and `modelmill resume`: start a run here, show it, and sum it up."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import click

from modelmill.pipelines.commands.console import number, print_table, program

if TYPE_CHECKING:
    from modelmill.pipelines.launch.local import RunResult
    from modelmill.pipelines.launch.watch import RunView

_grace = click.option(
    "--grace",
    type=click.FloatRange(min=0),
    default=20.0,
    show_default=True,
    metavar="SECONDS",
    help="Time a step gets to save its work when the run is cancelled.",
)


@click.command(
    "run", epilog="\b\nExamples:\n  modelmill run laptop/llama-demo\n  modelmill run my.yaml --set training.steps=50"
)
@click.argument("recipe")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change one value of the recipe.")
@click.option("--fresh", is_flag=True, help="Compute every step again, also those whose output exists.")
@_grace
def run_command(recipe: str, overrides: tuple[str, ...], fresh: bool, grace: float) -> None:
    """Run a recipe on this machine.

    RECIPE is a name that `modelmill list` shows, or a YAML file. Steps whose inputs, parameters and code are unchanged
    are reused. Ctrl-C ends the steps in order; a second one ends them at once.
    """
    from modelmill.pipelines import catalog
    from modelmill.pipelines.launch.local import run_local
    from modelmill.pipelines.launch.watch import display

    loaded = catalog.load(recipe, overrides)
    _finish(run_local(loaded, reference=recipe, display=display(), grace=grace, fresh=fresh))


@click.command("resume", epilog="\b\nExamples:\n  modelmill resume latest\n  modelmill resume 20261121-1015")
@click.argument("run", default="latest")
@_grace
def resume_command(run: str, grace: float) -> None:
    """Continue a run that failed, was cancelled or was interrupted.

    RUN is an id, a unique part of one, or `latest`. A new run is made that takes over what had finished, side effects
    included, and goes on with the rest; training goes on from its last checkpoint.
    """
    from modelmill.components.core.home import Home
    from modelmill.pipelines.launch.local import resume_local
    from modelmill.pipelines.launch.runs import find_run
    from modelmill.pipelines.launch.watch import display

    old = find_run(Home.current(), run)
    _finish(resume_local(old, display=display(), grace=grace))


def _finish(result: RunResult) -> None:
    """Print the summary and leave with the run's exit code; a closed terminal changes neither."""
    with suppress(OSError):
        _summarise(result)
    sys.exit(result.exit_code)


def _summarise(result: RunResult) -> None:
    from modelmill.components.core.home import Home
    from modelmill.components.core.mlflow_store import safe_uri
    from modelmill.pipelines.launch.watch import duration

    run, view = result.run, result.view
    click.echo(f"\n{run.record.name}: {result.state} in {duration(run.seconds)}\n")
    rows = []
    for step in view.steps.values():
        state = "skipped" if step.state == "waiting" and result.state == "succeeded" else step.state
        rows.append(
            (step.name, state, duration(step.elapsed), step.message if step.state in ("failed", "cancelled") else "")
        )
    print_table(rows, indent=2)
    if lines := headline(view, run.record.headline):
        click.echo()
        print_table(lines, indent=2)
    click.echo(f"\n  run folder  {run.folder}")
    for report in _reports(view):
        click.echo(f"  report      {report}")
    click.echo(f"  MLflow      {result.tracking or safe_uri(Home.current().tracking_uri)}")
    click.echo("\nNext:")
    print_table([(f"{program()} {command}", purpose) for command, purpose in _next(result)], indent=2)
    if result.exit_code and result.message:
        click.echo(f"modelmill: {result.message}", err=True)


def _reports(view: RunView) -> list[Path]:
    """Pages that steps wrote for people, on this machine."""
    from modelmill.components.core.errors import UserError
    from modelmill.components.core.store import local_copy, noted_folder

    pages = []
    for uri in filter(None, (step.uri for step in view.steps.values())):
        with suppress(UserError):  # its store does not answer now
            pages.append(local_copy(noted_folder(uri) / "data" / "report.html"))
    return [page for page in pages if page.is_file()]


def _next(result: RunResult) -> list[tuple[str, str]]:
    run = result.run
    if result.state == "succeeded":
        return [
            ("ui", "curves, parameters and the registered model in the browser"),
            (f"logs {run.id}", "what the steps wrote"),
            ("runs", "this run beside the others"),
        ]
    broken = [step.name for step in result.view.steps.values() if step.state in ("failed", "cancelled")]
    log = broken[0] if broken else "driver"
    return [
        (f"logs {run.id} {log}", "what happened"),
        (f"resume {run.id}", "go on from there"),
        ("doctor", "is the machine in order?"),
    ]


def headline(view: RunView, chosen: list[str]) -> list[tuple[str, str]]:
    """The chosen metrics (all without a choice); baselines (`bigram_loss` for `loss`) stand beside what they judge."""
    rows: list[tuple[str, str]] = []
    for step in view.steps.values():
        shown = [name for name in step.metrics if not chosen or f"{step.name}.{name}" in chosen]
        for name in shown:
            if any(_baseline(name, other) for other in shown):
                continue
            compared = [
                f"{label} {number(step.metrics[other])}" for other in shown if (label := _baseline(other, name))
            ]
            value = number(step.metrics[name])
            rows.append((f"{step.name}.{name}", f"{value}  ({', '.join(compared)})" if compared else value))
    order = {name: place for place, name in enumerate(chosen)}
    return sorted(rows, key=lambda row: order.get(row[0], 0))


def _baseline(metric: str, name: str) -> str:
    """`bigram` for `bigram_loss` and `loss`; empty when the first is no baseline of the second."""
    label = metric.removesuffix(f"_{name}")
    return label if label != metric and label.isalnum() else ""
