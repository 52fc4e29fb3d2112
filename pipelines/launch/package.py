"""A recipe compiled to the file that Kubeflow Pipelines takes."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modelmill.components.core.errors import UserError
from modelmill.components.core.recipe import Recipe
from modelmill.pipelines import catalog as catalogs
from modelmill.pipelines.launch.driver import import_kfp_local
from modelmill.pipelines.launch.lint import check, check_references
from modelmill.pipelines.launch.platform_tasks import Placement, placed

_LIMIT = 900 * 1024  # bytes; the workflow made of it must fit into the 1.5 MB that etcd takes


def dag_of(recipe: Recipe, catalog: catalogs.Catalog | None = None) -> Any:
    """The pipeline of a recipe, as a KFP component."""
    import_kfp_local()
    return catalogs.resolve((catalog or catalogs.current()).pipeline(recipe.pipeline).dag)


def compile_recipe(
    recipe: Recipe, sections: Mapping[str, str], target: Path, placement: Placement | None = None
) -> None:
    """Check and compile a recipe's pipeline; the file appears whole or not at all.

    Args:
        recipe: what to compile.
        sections: section of every step; they become the parameters' defaults.
        target: the YAML file.
        placement: where it will run; None compiles the pipeline as the laptop runs it.

    Raises:
        UserError: the pipeline has problems, or is larger than a cluster takes.
    """
    dag = dag_of(recipe)
    from kfp.compiler import Compiler

    check(dag.pipeline_spec, sections)
    if placement is not None:
        dag = placed(dag, placement)
        check_references(dag.pipeline_spec)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".compile-") as scratch:
        draft = Path(scratch) / target.name
        Compiler().compile(dag, str(draft), pipeline_parameters=dict(sections))
        if placement is not None and draft.stat().st_size > _LIMIT:
            size = draft.stat().st_size // 1024
            raise UserError(f"recipe: the compiled pipeline takes {size} KiB, over {_LIMIT // 1024}; split the recipe")
        os.replace(draft, target)
