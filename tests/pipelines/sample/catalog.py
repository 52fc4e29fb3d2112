"""The catalog the tests point MODELMILL_CATALOG at."""

from pathlib import Path

from modelmill.pipelines.catalog import Catalog, Pipeline

_HERE = "tests.pipelines.sample"
CATALOG = Catalog(
    pipelines={
        name: Pipeline(recipe=f"{_HERE}.steps:SampleRecipe", dag=f"{_HERE}.pipelines:{name}")
        for name in ("sample", "unimportable")
    }
    | {"guarded": Pipeline(recipe=f"{_HERE}.guarded:GuardedRecipe", dag=f"{_HERE}.guarded_dag:guarded")}
    | {
        name: Pipeline(recipe=f"{_HERE}.fanned:FannedRecipe", dag=f"{_HERE}.fanned_dag:{name}")
        for name in ("fanned", "fanned_unimportable")
    },
    recipes=Path(__file__).parent / "recipes",
)
