"""`modelmill compile`: the pipelines as KFP YAML, with a recipe's sections as the parameters' defaults."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import click

from modelmill.components.core.errors import UserError, disk_error

if TYPE_CHECKING:
    from modelmill.components.core.recipe import Recipe
    from modelmill.pipelines.catalog import Catalog


@click.command(
    "compile",
    epilog="\b\nExamples:\n  modelmill compile laptop/llama-demo -o build\n  modelmill compile --all -o build",
)
@click.argument("recipe", required=False)
@click.option("--all", "everything", is_flag=True, help="Every recipe that ships.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change one value of the recipe.")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder for the YAML files.")
def compile_command(recipe: str | None, everything: bool, overrides: tuple[str, ...], output: Path) -> None:
    """Compile a recipe's pipeline to KFP YAML.

    The file takes no further parameters: it runs the recipe as it is, and a section can be replaced when it is
    submitted.
    """
    from modelmill.pipelines.catalog import current

    catalog = current()
    if everything == (recipe is not None):
        raise UserError("compile: name one recipe, or give --all for every recipe that ships")
    if everything and overrides:
        raise UserError("--set: changes one recipe; name it instead of --all")
    names = catalog.recipe_names() if everything else [str(recipe)]
    loaded = {name: catalog.load(name, overrides) for name in names}
    try:
        output.mkdir(parents=True, exist_ok=True)
        for name, each in loaded.items():
            click.echo(_compile(catalog, name, each, output))
    except FileExistsError:
        raise UserError(f"--output: {output} is a file; give a folder") from None
    except OSError as error:
        problem = disk_error(error, output)
        raise (UserError(f"--output: {output} cannot be written ({error.strerror})") if problem else error) from None


def _compile(catalog: Catalog, name: str, recipe: Recipe, folder: Path) -> Path:
    """Lint and compile one recipe; the file appears whole or not at all."""
    from modelmill.pipelines import plan
    from modelmill.pipelines.catalog import resolve
    from modelmill.pipelines.launch.driver import import_kfp_local
    from modelmill.pipelines.launch.lint import check

    import_kfp_local()
    from kfp.compiler import Compiler

    dag = resolve(catalog.pipeline(recipe.pipeline).dag)
    found = plan.portable_sections(recipe)
    for step, (_, problem) in found.items():
        if problem:
            click.echo(f"warning: {name}: {step} cannot see its input from here: {problem}", err=True)
    sections = {step: text for step, (text, _) in found.items()}
    check(dag.pipeline_spec, sections)
    stem = Path(name).stem if name.endswith((".yaml", ".yml")) else name.replace("/", "-")
    target = folder / f"{stem}.yaml"
    with tempfile.TemporaryDirectory(dir=folder, prefix=".compile-") as scratch:
        draft = Path(scratch) / target.name
        Compiler().compile(dag, str(draft), pipeline_parameters=sections)
        os.replace(draft, target)
    return target
