"""`modelmill fetch` and `modelmill report`: what a run made, on this machine."""

from __future__ import annotations

from pathlib import Path

import click

from modelmill.pipelines.commands.console import as_json, print_json

_FETCH_EXAMPLES = """\b
Examples:
  modelmill fetch latest -o model
  modelmill fetch 20261121-1015 --step pack_tokens -o tokens
  modelmill fetch models:/docs-qa@champion -o model
"""
_REPORT_EXAMPLES = """\b
Examples:
  modelmill report latest
  modelmill report latest --open
"""


@click.command("fetch", epilog=_FETCH_EXAMPLES)
@click.argument("what", metavar="RUN|MODEL")
@click.option("--step", help="Whose output.  [default: the last step that made a model]")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="New or empty folder.")
@as_json
def fetch_command(what: str, step: str | None, output: Path, as_json: bool) -> None:
    """Copy what a run made, or a registered model, into a folder.

    RUN is an id, a unique part of one, or `latest`; MODEL is `models:/name/3` or `models:/name@champion`. Every file
    is verified.
    """
    from modelmill.pipelines.launch import outputs

    done = outputs.fetch_model(what, output) if what.startswith("models:/") else outputs.fetch_run(what, step, output)
    if as_json:
        print_json(done)
    else:
        click.echo(f"{done['source']} is in {output} ({done['files']} files)")


@click.command("report", epilog=_REPORT_EXAMPLES)
@click.argument("run", default="latest")
@click.option("--open", "opened", is_flag=True, help="Open them in the browser.")
@as_json
def report_command(run: str, opened: bool, as_json: bool) -> None:
    """Show where the reports of a run are.

    RUN is an id, a unique part of one, or `latest`. Reports of a run on a cluster come from the home where it is
    mounted here, else from MLflow.
    """
    from modelmill.pipelines.launch import outputs

    pages = outputs.report_pages(run)
    if as_json:
        print_json([str(page) for page in pages])
        return
    for page in pages:
        click.echo(str(page))
        if opened:
            click.launch(page.as_uri())
