"""`modelmill models` and `modelmill rollback`: what the registry holds, and the way back."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click

from modelmill.pipelines.commands.console import as_json, print_json, print_table


@click.command("models", epilog="\b\nExamples:\n  modelmill models\n  modelmill models llama-demo --json")
@click.argument("name", required=False)
@as_json
def models_command(name: str | None, as_json: bool) -> None:
    """List registered models, their versions and what was decided.

    NAME is one registered model; without it all are shown. Aliases say what a version is: candidate (to be judged),
    challenger (passed against something else than the champion), champion (in use), previous (the champion before).
    """
    from modelmill.components.registry.listing import list_models

    models = list_models(name)
    if as_json:
        print_json(models)
        return
    if not models:
        click.echo("no model is registered; a pipeline with the step register_model registers one")
        return
    head = ("MODEL", "VERSION", "ALIASES", "GATE", "DECISION", "METHOD", "WEIGHTS", "DATA")
    print_table([head, *(_row(model["name"], version) for model in models for version in model["versions"])])


def _row(name: str, version: dict[str, Any]) -> tuple[str, ...]:
    decision = "rolled back" if "rolled_back" in version else version.get("promotion", "-")
    gain = f" {float(version['gate_gain']):+.3g} {version['gate_metric']}" if "gate_gain" in version else ""
    return (
        name,
        version["version"],
        ", ".join(version["aliases"]) or "-",
        f"{version.get('gate', '-')}{gain}",
        decision,
        version.get("method", "-"),
        version.get("weights_digest", "-")[:12],
        version.get("dataset_digest", "-")[:12],
    )


@click.command(
    "rollback",
    epilog='\b\nExamples:\n  modelmill rollback llama-demo --reason "answers in the wrong language"\n'
    "  modelmill rollback llama-demo --json",
)
@click.argument("name")
@click.option("--reason", default="", metavar="TEXT", help="Why; kept with the version that was the champion.")
@as_json
def rollback_command(name: str, reason: str, as_json: bool) -> None:
    """Make the previous champion of a registered model the champion again.

    The version that was the champion is marked, so that no pipeline promotes it again. A package of it in the
    SageMaker Model Registry is rejected.
    """
    from modelmill.components.registry.rollback import rollback

    done = rollback(name, reason)
    if as_json:
        print_json(asdict(done))
        return
    click.echo(f"{done.name}: version {done.champion} is the champion again (weights {done.weights_digest[:12]})")
    click.echo(f"version {done.rolled_back} is marked as rolled back: {done.reason}")
    if done.previous:
        click.echo(f"a further rollback would go to version {done.previous}")
    for warning in done.warnings:
        click.echo(f"warning: {warning}", err=True)
