"""What there is to run: the pipelines, their recipe types and the recipes that ship.

Everything is named by `module:attribute` and imported when it is needed, so that the command starts without
kfp. A team with pipelines of its own points `MODELMILL_CATALOG` at a `Catalog` (`my_package.catalog:CATALOG`).
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelmill.components.core.errors import UserError
from modelmill.components.core.recipe import Recipe, load_recipe, shipped_recipes, validate

CATALOG_VARIABLE = "MODELMILL_CATALOG"
RECIPES = Path(__file__).resolve().parent / "recipes"


def resolve(reference: str) -> Any:
    """Import what `module:attribute` names."""
    module, _, attribute = reference.partition(":")
    return getattr(importlib.import_module(module), attribute)


@dataclass(frozen=True)
class Pipeline:
    """A pipeline: the type of its recipes and its DAG, both as `module:attribute`."""

    recipe: str
    dag: str

    def recipe_type(self) -> type[Recipe]:
        return resolve(self.recipe)


class _RecipeTypes(Mapping[str, type[Recipe]]):
    """Recipe type of each pipeline, imported when it is asked for."""

    def __init__(self, pipelines: Mapping[str, Pipeline]) -> None:
        self._pipelines = pipelines

    def __getitem__(self, name: str) -> type[Recipe]:
        return self._pipelines[name].recipe_type()

    def __contains__(self, name: object) -> bool:
        return name in self._pipelines

    def __iter__(self) -> Iterator[str]:
        return iter(self._pipelines)

    def __len__(self) -> int:
        return len(self._pipelines)


@dataclass(frozen=True)
class Catalog:
    """Pipelines by name, and the folder of the recipes that configure them."""

    pipelines: Mapping[str, Pipeline]
    recipes: Path

    def load(self, reference: str, overrides: Sequence[str] = ()) -> Recipe:
        """Read and check a recipe named by file or by its name in `recipes`.

        Raises:
            UserError: one line naming the recipe or the parameter, its value and the fix.
        """
        types = _RecipeTypes(self.pipelines)
        return load_recipe(reference, folder=self.recipes, types=types, overrides=overrides)

    def parse(self, values: Mapping[str, Any]) -> Recipe:
        """Check a resolved recipe, as stored with a run."""
        return validate(self.pipeline(str(values.get("pipeline"))).recipe_type(), values)

    def pipeline(self, name: str) -> Pipeline:
        """The pipeline of a name.

        Raises:
            UserError: this installation has no such pipeline.
        """
        if name not in self.pipelines:
            known = ", ".join(sorted(self.pipelines))
            raise UserError(f"pipeline: {name!r} is not in this installation's catalog; it has {known}")
        return self.pipelines[name]

    def recipe_names(self) -> list[str]:
        return shipped_recipes(self.recipes)


SHIPPED = Catalog(
    pipelines={
        "llama_pretrain": Pipeline(
            recipe="modelmill.pipelines.recipes.llama_pretrain:LlamaPretrainRecipe",
            dag="modelmill.pipelines.llama_pretrain:llama_pretrain",
        ),
        "lora_finetune": Pipeline(
            recipe="modelmill.pipelines.recipes.lora_finetune:LoraFinetuneRecipe",
            dag="modelmill.pipelines.lora_finetune:lora_finetune",
        ),
        "preference_tuning": Pipeline(
            recipe="modelmill.pipelines.recipes.preference_tuning:PreferenceTuningRecipe",
            dag="modelmill.pipelines.preference_tuning:preference_tuning",
        ),
        "retrain": Pipeline(
            recipe="modelmill.pipelines.recipes.retrain:RetrainRecipe",
            dag="modelmill.pipelines.retrain:retrain",
        ),
        "continue_pretraining": Pipeline(
            recipe="modelmill.pipelines.recipes.continue_pretraining:ContinuePretrainingRecipe",
            dag="modelmill.pipelines.continue_pretraining:continue_pretraining",
        ),
        "embedding_finetune": Pipeline(
            recipe="modelmill.pipelines.recipes.embedding_finetune:EmbeddingFinetuneRecipe",
            dag="modelmill.pipelines.embedding_finetune:embedding_finetune",
        ),
        "chronos_forecast": Pipeline(
            recipe="modelmill.pipelines.recipes.chronos_forecast:ChronosForecastRecipe",
            dag="modelmill.pipelines.chronos_forecast:chronos_forecast",
        ),
        "chronos_tune": Pipeline(
            recipe="modelmill.pipelines.recipes.chronos_tune:ChronosTuneRecipe",
            dag="modelmill.pipelines.chronos_tune:chronos_tune",
        ),
        "reforecast": Pipeline(
            recipe="modelmill.pipelines.recipes.reforecast:ReforecastRecipe",
            dag="modelmill.pipelines.reforecast:reforecast",
        ),
        "chronos_search": Pipeline(
            recipe="modelmill.pipelines.recipes.chronos_search:ChronosSearchRecipe",
            dag="modelmill.pipelines.chronos_search:chronos_search",
        ),
        "deploy_forecaster": Pipeline(
            recipe="modelmill.pipelines.recipes.deploy_forecaster:DeployForecasterRecipe",
            dag="modelmill.pipelines.deploy_forecaster:deploy_forecaster",
        ),
        "activation_sweep": Pipeline(
            recipe="modelmill.pipelines.recipes.activation_sweep:ActivationSweepRecipe",
            dag="modelmill.pipelines.activation_sweep:activation_sweep",
        ),
        "attention_benchmark": Pipeline(
            recipe="modelmill.pipelines.recipes.attention_benchmark:AttentionBenchmarkRecipe",
            dag="modelmill.pipelines.attention_benchmark:attention_benchmark",
        ),
    },
    recipes=RECIPES,
)


def current() -> Catalog:
    """The catalog `MODELMILL_CATALOG` names, else the one that ships.

    Raises:
        UserError: the variable does not name a `Catalog`.
    """
    reference = os.environ.get(CATALOG_VARIABLE)
    if not reference:
        return SHIPPED
    try:
        found = resolve(reference)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"{CATALOG_VARIABLE}: cannot import {reference!r} ({error}); write module:attribute") from None
    if not isinstance(found, Catalog):
        raise UserError(f"{CATALOG_VARIABLE}: {reference!r} is no modelmill.pipelines.catalog.Catalog")
    return found


def load(reference: str, overrides: Sequence[str] = (), *, catalog: Catalog | None = None) -> Recipe:
    """Read and check a recipe from the current catalog: see `Catalog.load`."""
    return (catalog or current()).load(reference, overrides)
