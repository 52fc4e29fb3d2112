"""`modelmill compile`: the pipelines as KFP YAML, with a recipe's sections as the parameters' defaults."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from modelmill.components.core.errors import UserError, disk_error
from modelmill.pipelines.commands.launching import profile_option, profile_overrides

if TYPE_CHECKING:
    from modelmill.components.core.recipe import Recipe
    from modelmill.pipelines.platform import Profile


_EXAMPLES = """\b
Examples:
  modelmill compile laptop/llama-demo -o build
  modelmill compile gpu/llama3-8b --profile team-p5 -o build
  modelmill compile --all -o build
"""


@click.command("compile", epilog=_EXAMPLES)
@click.argument("recipe", required=False)
@click.option("--all", "everything", is_flag=True, help="Every recipe that ships.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change one value of the recipe.")
@profile_option
@profile_overrides
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder for the YAML files.")
def compile_command(
    recipe: str | None,
    everything: bool,
    overrides: tuple[str, ...],
    profile: str | None,
    profile_set: tuple[str, ...],
    output: Path,
) -> None:
    """Compile a recipe's pipeline to KFP YAML.

    The file takes no further parameters: it runs the recipe as it is, and a section can be replaced when it is
    submitted. With a profile its tasks have what they need to run on that cluster.
    """
    from modelmill.pipelines.catalog import current

    catalog = current()
    if everything == (recipe is not None):
        raise UserError("compile: name one recipe, or give --all for every recipe that ships")
    if everything and overrides:
        raise UserError("--set: changes one recipe; name it instead of --all")
    names = catalog.recipe_names() if everything else [str(recipe)]
    chosen = _profile(profile, profile_set)
    loaded = {name: catalog.load(name, overrides) for name in names}
    try:
        output.mkdir(parents=True, exist_ok=True)
        for name, each in loaded.items():
            click.echo(_compile(name, each, output, chosen))
    except FileExistsError:
        raise UserError(f"--output: {output} is a file; give a folder") from None
    except OSError as error:
        problem = disk_error(error, output)
        raise (UserError(f"--output: {output} cannot be written ({error.strerror})") if problem else error) from None


def _profile(name: str | None, overrides: tuple[str, ...]) -> Profile | None:
    from modelmill.pipelines.platform import load_profile

    if name is None and overrides:
        raise UserError("--profile-set: changes a profile; name it with --profile")
    return load_profile(name, overrides) if name else None


def _compile(name: str, recipe: Recipe, folder: Path, profile: Profile | None) -> Path:
    """Lint and compile one recipe; the file appears whole or not at all."""
    from modelmill.pipelines import plan
    from modelmill.pipelines.launch.package import compile_recipe
    from modelmill.pipelines.launch.platform_tasks import Placement, check_admissible, cluster_sections

    stem = Path(name).stem if name.endswith((".yaml", ".yml")) else name.replace("/", "-")
    target = folder / f"{stem}.yaml"
    if profile is not None:
        check_admissible(recipe, profile)
        compile_recipe(recipe, cluster_sections(recipe), target, Placement(recipe, profile, name))
        return target
    found = plan.portable_sections(recipe)
    for step, (_, problem) in found.items():
        if problem:
            click.echo(f"warning: {name}: {step} cannot see its input from here: {problem}", err=True)
    compile_recipe(recipe, {step: text for step, (text, _) in found.items()}, target)
    return target
