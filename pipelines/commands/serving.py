"""`modelmill ui` and `modelmill doctor`."""

from __future__ import annotations

import os
import socket
import sys

import click

from modelmill.components.core.errors import UserError
from modelmill.pipelines.commands.console import as_json, print_json, print_table

_DEFAULT_PORT = 5000
_DOCTOR_EXAMPLES = """\b
Examples:
  modelmill doctor
  modelmill doctor --profile eks-p5
  modelmill doctor gpu/llama3-8b --profile eks-p5 --in-cluster
"""


@click.command("ui", epilog="\b\nExamples:\n  modelmill ui\n  modelmill ui --port 8080 --no-browser")
@click.option("--port", type=click.IntRange(1, 65535), help="Port on this machine.  [default: 5000, or a free one]")
@click.option("--browser/--no-browser", default=True, help="Open the page in a browser.")
def ui_command(port: int | None, browser: bool) -> None:
    """Open the MLflow page on the runs of this folder.

    What earlier runs could not deliver is delivered first. The page is reachable from this machine only.
    """
    from modelmill.components.core.home import Home
    from modelmill.components.core.mlflow_store import safe_uri, sqlite_path

    home = Home.current()
    uri = home.tracking_uri
    chosen = _port(port)
    _deliver(home)
    if uri.startswith(("http://", "https://")):
        click.echo(f"MLflow: {safe_uri(uri)}")
        if browser:
            click.launch(uri)
        return
    database = sqlite_path(uri)
    if database is not None and not database.is_file():
        raise UserError(f"ui: there is nothing to show in {database} yet; start a run with `modelmill run RECIPE`")
    address = f"http://127.0.0.1:{chosen}"
    click.echo(f"MLflow: {address} (Ctrl-C ends it)")
    sys.stdout.flush()
    if browser:
        _open_when_up(address, chosen)
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri, "--host", "127.0.0.1"]
    command += ["--port", str(chosen), "--workers", "1", "--default-artifact-root", home.artifact_root.as_uri()]
    os.environ["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"  # runs code sent over HTTP; nothing here needs it
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    os.execv(sys.executable, command)


def _port(wanted: int | None) -> int:
    """The wanted port, or 5000, or any free one when none was asked for.

    Raises:
        UserError: the wanted port is taken or not allowed.
    """
    for candidate in (wanted or _DEFAULT_PORT, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", candidate))
            except OSError as error:
                if wanted is not None:
                    reason = error.strerror or "cannot be used"
                    raise UserError(f"--port: {wanted}: {reason}; choose another, or leave --port out") from None
                continue
            return probe.getsockname()[1]
    raise UserError("--port: no port is free on 127.0.0.1")


def _deliver(home: object) -> None:
    from modelmill.components.core.delivery import deliver_pending

    for report in deliver_pending(home):  # type: ignore[arg-type]
        for warning in report.warnings:
            click.echo(f"warning: {warning}", err=True)
        if report.records:
            click.echo(f"delivered {report.records} records of {report.run_id}")


def _open_when_up(address: str, port: int) -> None:
    """Open the browser from a child process as soon as the server that replaces this process answers."""
    if os.fork():
        return
    import time

    for _ in range(240):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                click.launch(address)
                break
        time.sleep(0.25)
    os._exit(0)


@click.command("doctor", epilog=_DOCTOR_EXAMPLES)
@click.argument("recipe", required=False)
@click.option("--profile", metavar="NAME", help="Look at the cluster of this profile instead of this machine.")
@click.option("--profile-set", multiple=True, metavar="KEY=VALUE", help="Change one value of the profile.")
@click.option("--in-cluster", is_flag=True, help="With --profile: also look from a short-lived Job in the cluster.")
@as_json
def doctor_command(
    recipe: str | None, profile: str | None, profile_set: tuple[str, ...], in_cluster: bool, as_json: bool
) -> None:
    """Check this machine, or with --profile a cluster, before anything is spent.

    A RECIPE says how many nodes its training job needs; without one, room for a single node is looked for.
    """
    from modelmill.components.core.home import Home
    from modelmill.pipelines.doctor import cluster, machine

    if profile is None:
        if recipe or profile_set or in_cluster:
            raise UserError("doctor: RECIPE, --profile-set and --in-cluster need --profile NAME")
        findings = machine.examine(Home.current())
    else:
        from modelmill.pipelines.platform import load_profile

        place = load_profile(profile, profile_set)
        if place.where != "cluster":
            raise UserError(f"--profile: {profile} is this machine; leave --profile out, or name one of a cluster")
        findings = cluster.examine(place, _nodes(recipe), in_cluster=in_cluster)
    if as_json:
        print_json([vars(finding) for finding in findings])
    else:
        rows = [(each.level, each.subject, each.text + (f"; {each.fix}" if each.fix else "")) for each in findings]
        print_table(rows)
    if any(finding.level == "fail" for finding in findings):
        sys.exit(1)


def _nodes(recipe: str | None) -> int:
    """Nodes of the training job of a recipe."""
    if recipe is None:
        return 1
    from modelmill.pipelines import catalog

    configs = [step.config for step in catalog.load(recipe).steps()]
    layouts = [getattr(getattr(config, "training", None), "parallel", None) for config in configs]
    return max((layout.nodes for layout in layouts if layout is not None), default=1)
