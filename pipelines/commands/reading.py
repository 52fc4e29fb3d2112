"""`modelmill runs` and `modelmill logs`: what happened, read from the run folders."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from modelmill.components.core.errors import UserError
from modelmill.pipelines.commands.console import as_json, number, of_anybody, print_json, print_table

if TYPE_CHECKING:
    from modelmill.pipelines.launch.runs import Run

DRIVER = "driver"


_RUNS_EXAMPLES = """\b
Examples:
  modelmill runs
  modelmill runs -n 5 --json
  modelmill runs --profile team-p5
"""


@click.command("runs", epilog=_RUNS_EXAMPLES)
@click.option("-n", "limit", type=click.IntRange(min=1), default=20, show_default=True, help="How many, newest first.")
@click.option("--profile", metavar="PROFILE", help="List what runs on this cluster, whoever started it.")
@click.option("--offline", is_flag=True, help="Show runs on a cluster as they were seen last.")
@as_json
def runs_command(limit: int, profile: str | None, offline: bool, as_json: bool) -> None:
    """List the runs of this folder, here and on clusters, newest first.

    A run on a cluster that has not ended is looked up there.
    """
    if profile is not None:
        return _list_cluster(profile, limit, as_json)
    from modelmill.components.core.home import Home
    from modelmill.pipelines.launch.runs import all_runs
    from modelmill.pipelines.launch.watch import duration

    home = Home.current()
    runs = all_runs(home)[::-1][:limit]
    if not offline:
        _look_up(runs)
    entries = [_describe(run) for run in runs]
    if as_json:
        print_json(entries)
        return
    if not runs:
        click.echo(f"no run in {home.runs}; start one with `modelmill run RECIPE`")
        return
    rows = [("RUN", "WHERE", "STATE", "STARTED", "DURATION", "RECIPE", "RESULT")]
    for entry in entries:
        started = datetime.fromtimestamp(entry["started"]).strftime("%Y-%m-%d %H:%M")
        metric = (
            f"{entry['metric'].partition('.')[2]} {number(entry['value'])}" if entry["metric"] else entry["message"]
        )
        short = metric if len(metric) <= 60 else f"{metric[:59]}…"
        place = entry["place"].get("profile", "here")
        rows.append((entry["run"], place, entry["state"], started, duration(entry["seconds"]), entry["recipe"], short))
    print_table(rows)


def _describe(run: Run) -> dict[str, Any]:
    from modelmill.pipelines.launch.watch import RunView

    view = RunView(run.folder, run.record.steps)
    view.refresh()
    metrics = {f"{step.name}.{name}": value for step in view.steps.values() for name, value in step.metrics.items()}
    key = next((name for name in (*run.record.headline, *metrics) if name in metrics), "")
    return {
        "run": run.id,
        "state": run.state,
        "recipe": run.record.recipe or run.record.name,
        "pipeline": run.record.pipeline,
        "recipe_hash": run.record.recipe_hash,
        "started": run.record.started,
        "seconds": run.seconds,
        "exit_code": run.record.exit_code,
        "message": run.record.message,
        "resumed_from": run.record.resumed_from,
        "metric": key,
        "value": metrics.get(key),
        "steps": {step.name: {"state": step.state, "seconds": step.elapsed} for step in view.steps.values()},
        "folder": str(run.folder),
        "place": run.record.place,
    }


def _look_up(runs: Sequence[Run]) -> None:
    """Bring runs on a cluster up to date; an endpoint that is away costs a line, once."""
    from modelmill.pipelines.launch.kubeflow import Endpoint
    from modelmill.pipelines.launch.kubeflow_runs import profile_of, refresh

    endpoints: dict[tuple[str, str], Endpoint | None] = {}
    for run in runs:
        place = run.record.place
        if not place.get("run_id") or run.state != "running":
            continue
        where = (place["endpoint"], place["profile"])
        try:
            if where not in endpoints:
                endpoints[where] = None
                endpoints[where] = Endpoint(profile_of(run))
            if endpoint := endpoints[where]:
                refresh(run, endpoint)
        except UserError as error:
            click.echo(f"warning: {run.id} as it was seen last: {error}", err=True)


def _list_cluster(name: str, limit: int, as_json: bool) -> None:
    """What runs at the endpoint of a profile, from whatever machine or schedule."""
    from modelmill.pipelines.launch.kubeflow import Endpoint, ended_as
    from modelmill.pipelines.platform import load_profile

    endpoint = Endpoint(load_profile(name))
    entries = [
        {
            "run": str(each.run_id),
            "name": str(each.display_name),
            "state": ended_as(each) or str(each.state or "pending").lower(),
            "started": each.created_at.timestamp() if each.created_at else None,
            "schedule": each.recurring_run_id,
            "url": endpoint.run_url(str(each.run_id)),
        }
        for each in endpoint.runs(limit)
    ]
    if as_json:
        print_json(entries)
        return
    rows = [("RUN", "STATE", "STARTED", "NAME")]
    for entry in entries:
        began = entry["started"]
        shown = datetime.fromtimestamp(began).strftime("%Y-%m-%d %H:%M") if began else ""
        rows.append((entry["run"], entry["state"], shown, entry["name"]))
    print_table(rows)


_LOGS_EXAMPLES = """\b
Examples:
  modelmill logs latest
  modelmill logs latest pretrain -f
  modelmill logs 1f0c... --profile team-p5
"""


@click.command("logs", epilog=_LOGS_EXAMPLES)
@click.argument("run", default="latest")
@click.argument("step", required=False)
@click.option("-f", "--follow", is_flag=True, help="Go on showing what is added until the run ends.")
@of_anybody
def logs_command(run: str, step: str | None, follow: bool, profile: str | None) -> None:
    """Show what the steps of a run wrote.

    RUN is an id, a unique part of one, or `latest`. STEP is one of its steps, or `driver` for what kfp itself wrote on
    this machine; without it every step is shown, one after the other. Logs of a run on a cluster come from its pods.
    """
    if profile is not None:
        from modelmill.pipelines.launch.cluster_logs import show_foreign
        from modelmill.pipelines.platform import load_profile

        return show_foreign(load_profile(profile), run, step or "", follow=follow, write=_write)
    from modelmill.components.core.home import Home
    from modelmill.components.core.recipe import suggest
    from modelmill.pipelines.launch.runs import find_run

    found = find_run(Home.current(), run)
    on_cluster = bool(found.record.place)
    known = [*found.record.steps, *([] if on_cluster else [DRIVER])]
    if step is not None and step not in known:
        raise UserError(f"step: {found.id} has no step {step!r}; {suggest(step, known)}")
    if on_cluster:
        from modelmill.pipelines.launch.cluster_logs import show

        return show(found, step or "", follow=follow, write=_write)
    tails = {name: _Tail(_log(found, name)) for name in ([step] if step else found.record.steps)}
    shown = ""
    while True:
        ended = found.state != "running"  # asked before reading, so that nothing written last is missed
        for name, tail in tails.items():
            for text in tail.read():
                if shown != name and len(tails) > 1:
                    click.echo(f"==> {name} <==")
                shown = name
                sys.stdout.write(text)
        sys.stdout.flush()
        if not follow or ended:
            return
        time.sleep(0.2)
        found = find_run(Home.current(), found.id)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _log(run: Run, step: str) -> Path:
    return run.folder / "driver.log" if step == DRIVER else run.log_path(step)


class _Tail:
    """What was added to a file since the last look."""

    def __init__(self, path: Path) -> None:
        self._path, self._offset = path, 0

    def read(self) -> list[str]:
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            file.seek(self._offset)
            data = file.read()
        self._offset += len(data)
        return [data.decode(errors="replace")] if data else []
