"""`modelmill runs` and `modelmill logs`: what happened, read from the run folders."""

from __future__ import annotations

import sys
import time
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from modelmill.components.core.errors import UserError
from modelmill.pipelines.commands.console import as_json, number, print_json, print_table

if TYPE_CHECKING:
    from modelmill.pipelines.launch.runs import Run

DRIVER = "driver"


@click.command("runs", epilog="\b\nExamples:\n  modelmill runs\n  modelmill runs -n 5 --json")
@click.option("-n", "limit", type=click.IntRange(min=1), default=20, show_default=True, help="How many, newest first.")
@as_json
def runs_command(limit: int, as_json: bool) -> None:
    """List the runs of this folder, newest first."""
    from modelmill.components.core.home import Home
    from modelmill.pipelines.launch.runs import all_runs
    from modelmill.pipelines.launch.watch import duration

    home = Home.current()
    runs = all_runs(home)[::-1][:limit]
    entries = [_describe(run) for run in runs]
    if as_json:
        print_json(entries)
        return
    if not runs:
        click.echo(f"no run in {home.runs}; start one with `modelmill run RECIPE`")
        return
    rows = [("RUN", "STATE", "STARTED", "DURATION", "RECIPE", "RESULT")]
    for entry in entries:
        started = datetime.fromtimestamp(entry["started"]).strftime("%Y-%m-%d %H:%M")
        metric = (
            f"{entry['metric'].partition('.')[2]} {number(entry['value'])}" if entry["metric"] else entry["message"]
        )
        short = metric if len(metric) <= 60 else f"{metric[:59]}…"
        rows.append((entry["run"], entry["state"], started, duration(entry["seconds"]), entry["recipe"], short))
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
    }


@click.command("logs", epilog="\b\nExamples:\n  modelmill logs latest\n  modelmill logs latest pretrain -f")
@click.argument("run", default="latest")
@click.argument("step", required=False)
@click.option("-f", "--follow", is_flag=True, help="Go on showing what is added until the run ends.")
def logs_command(run: str, step: str | None, follow: bool) -> None:
    """Show what the steps of a run wrote.

    RUN is an id, a unique part of one, or `latest`. STEP is one of its steps, or `driver` for what kfp itself wrote;
    without it every step is shown, one after the other.
    """
    from modelmill.components.core.home import Home
    from modelmill.components.core.recipe import suggest
    from modelmill.pipelines.launch.runs import find_run

    found = find_run(Home.current(), run)
    known = [*found.record.steps, DRIVER]
    if step is not None and step not in known:
        raise UserError(f"step: {found.id} has no step {step!r}; {suggest(step, known)}")
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
