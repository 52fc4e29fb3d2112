"""`modelmill run` and `modelmill resume`: start a run, here or on a cluster, show it, and sum it up."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import click

from modelmill.components.core.errors import UserError
from modelmill.pipelines.commands.console import number, of_anybody, print_table, program

if TYPE_CHECKING:
    from modelmill.pipelines.launch.kubeflow import Endpoint
    from modelmill.pipelines.launch.local import RunResult
    from modelmill.pipelines.launch.runs import Run
    from modelmill.pipelines.launch.watch import RunView
    from modelmill.pipelines.platform import Profile

_grace = click.option(
    "--grace",
    type=click.FloatRange(min=0),
    default=20.0,
    show_default=True,
    metavar="SECONDS",
    help="Time a step gets to save its work when the run is cancelled.",
)


profile_option = click.option(
    "--profile", metavar="PROFILE", help="Where on the cluster: a name that `modelmill list` shows, or a YAML file."
)
profile_overrides = click.option(
    "--profile-set", "profile_set", multiple=True, metavar="KEY=VALUE", help="Change one value of the profile."
)

_RUN_EXAMPLES = """\b
Examples:
  modelmill run laptop/llama-demo
  modelmill run my.yaml --set training.steps=50
  modelmill run gpu/llama3-8b --on kfp --profile team-p5
  modelmill run gpu/llama3-8b --on kfp --profile team-p5 --detach
"""


@click.command("run", epilog=_RUN_EXAMPLES)
@click.argument("recipe")
@click.option("--on", "place", type=click.Choice(["local", "kfp"]), help="Where.  [default: kfp with a --profile]")
@profile_option
@profile_overrides
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change one value of the recipe.")
@click.option("--fresh", is_flag=True, help="Compute every step again, also those whose output exists.")
@click.option("--wait/--detach", default=True, help="Show a run on a cluster until it ends, or only start it.")
@_grace
def run_command(
    recipe: str,
    place: str | None,
    profile: str | None,
    profile_set: tuple[str, ...],
    overrides: tuple[str, ...],
    fresh: bool,
    wait: bool,
    grace: float,
) -> None:
    """Run a recipe, on this machine or on a cluster.

    RECIPE is a name that `modelmill list` shows, or a YAML file. Steps whose inputs, parameters and code are unchanged
    are reused. Ctrl-C ends the steps of a local run in order, a second one ends them at once; a run on a cluster goes
    on without this command, and `modelmill cancel` ends it.
    """
    from modelmill.pipelines import catalog
    from modelmill.pipelines.launch.watch import display

    chosen = _profile(place, profile, profile_set)
    if chosen is None and not wait:
        raise UserError("--detach: a run on this machine ends with its command; leave it out, or add --on kfp")
    loaded = catalog.load(recipe, overrides)
    if chosen is None:
        from modelmill.pipelines.launch.local import run_local

        _finish(run_local(loaded, reference=recipe, display=display(), grace=grace, fresh=fresh))
        return
    from modelmill.pipelines.launch.kubeflow import Endpoint
    from modelmill.pipelines.launch.kubeflow_runs import submit
    from modelmill.pipelines.launch.platform_tasks import Placement, check_admissible

    check_admissible(loaded, chosen)
    endpoint = Endpoint(chosen)
    _see(submit(Placement(loaded, chosen, recipe, fresh=fresh), endpoint=endpoint), endpoint, wait)


def _profile(place: str | None, name: str | None, overrides: tuple[str, ...]) -> Profile | None:
    """The profile of a run on a cluster, or None for a run here."""
    if place == "kfp" and name is None:
        raise UserError("--on kfp: needs --profile; `modelmill list` shows the profiles")
    if name is None:
        if overrides:
            raise UserError("--profile-set: changes a profile; name it with --profile")
        return None
    from modelmill.pipelines.platform import load_profile

    profile = load_profile(name, overrides)
    if profile.where == "cluster" and place == "local":
        raise UserError(f"--on local: the profile {name} is for a cluster; leave one of them out")
    if profile.where == "laptop" and place == "kfp":
        raise UserError(f"--profile: {name} is for this machine; choose one of a cluster")
    return profile if profile.where == "cluster" else None


def _see(run: Run, endpoint: Endpoint, wait: bool) -> None:
    """Show a run on a cluster to its end, or say how to find it again."""
    from modelmill.pipelines.launch.kubeflow_runs import follow
    from modelmill.pipelines.launch.watch import display

    if wait:
        _finish(follow(run, endpoint, display()))
        return
    click.echo(f"run {run.id} started\n\n  KFP  {run.record.place['url']}\n\nNext:")
    commands = {f"logs {run.id} -f": "what the steps write", "runs": "how far it is", f"cancel {run.id}": "end it"}
    print_table([(f"{program()} {command}", purpose) for command, purpose in commands.items()], indent=2)


_RESUME_EXAMPLES = """\b
Examples:
  modelmill resume latest
  modelmill resume 20261121-1015
  modelmill resume 1f0c... --profile team-p5
"""


@click.command("resume", epilog=_RESUME_EXAMPLES)
@click.argument("run", default="latest")
@of_anybody
@click.option("--wait/--detach", default=True, help="Show a run on a cluster until it ends, or only start it.")
@_grace
def resume_command(run: str, profile: str | None, wait: bool, grace: float) -> None:
    """Continue a run that failed, was cancelled or was interrupted.

    RUN is an id, a unique part of one, or `latest`. A new run is made that takes over what had finished, side effects
    included, and goes on with the rest; training goes on from its last checkpoint. A run on a cluster goes on with the
    code and images it had; after a correction start a new one, which reuses what the correction does not touch. One
    that was started elsewhere needs the profile it ran under and the code that reads its recipe the same.
    """
    from modelmill.components.core.home import Home
    from modelmill.pipelines.launch.runs import find_run

    old = find_run(Home.current(), run) if profile is None else _adopted(run, profile)
    if old.record.place:
        from modelmill.pipelines.launch.kubeflow import Endpoint
        from modelmill.pipelines.launch.kubeflow_runs import profile_of, resume

        endpoint = Endpoint(profile_of(old))
        _see(resume(old, endpoint=endpoint), endpoint, wait)
        return
    from modelmill.pipelines.launch.local import resume_local
    from modelmill.pipelines.launch.watch import display

    _finish(resume_local(old, display=display(), grace=grace))


def _adopted(run_id: str, profile: str) -> Run:
    """A run that another machine started, by its id at KFP."""
    from modelmill.pipelines.launch.adopting import adopt
    from modelmill.pipelines.platform import load_profile

    return adopt(run_id, load_profile(profile))


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
    for report in reports(view):
        click.echo(f"  report      {report}")
    for name, address in result.links or [("MLflow", result.tracking or safe_uri(Home.current().tracking_uri))]:
        click.echo(f"  {name:<10}  {address}")
    click.echo("\nNext:")
    print_table([(f"{program()} {command}", purpose) for command, purpose in _next(result)], indent=2)
    if result.exit_code and result.message:
        click.echo(f"modelmill: {result.message}", err=True)


def reports(view: RunView) -> list[Path]:
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
    if result.state == "running":
        return [(f"logs {run.id} -f", "what the steps write"), (f"cancel {run.id}", "end it")]
    if result.state == "succeeded" and result.links:
        return [(f"logs {run.id}", "what the steps wrote"), (f"fetch {run.id} -o model", "the model it made")]
    if result.state == "succeeded":
        return [
            ("ui", "curves, parameters and the registered model in the browser"),
            (f"logs {run.id}", "what the steps wrote"),
            ("runs", "this run beside the others"),
        ]
    broken = [step.name for step in result.view.steps.values() if step.state in ("failed", "cancelled")]
    log = broken[0] if broken else "" if result.links else "driver"
    return [
        (f"logs {run.id} {log}".rstrip(), "what happened"),
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
