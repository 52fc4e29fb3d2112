"""Every recipe that ships is valid, plans, and compiles to a pipeline whose parameters are the recipe's steps."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from modelmill.components.core.errors import UserError
from modelmill.components.data import config as data_config
from modelmill.pipelines import catalog
from modelmill.pipelines.cli import cli

RECIPES = catalog.SHIPPED.recipe_names()


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, and no look at the network for the presets' datasets."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MODELMILL_HOME", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


def test_the_presets_of_the_issue_ship() -> None:
    assert {"laptop/llama-demo", "laptop/llama-smoke", "gpu/llama3-8b", "trainium/llama2-7b"} <= set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_lists_the_steps_its_pipeline_takes(name: str) -> None:
    recipe = catalog.load(name)
    dag = catalog.resolve(catalog.current().pipeline(recipe.pipeline).dag)
    spec = dag.pipeline_spec
    assert {step.name for step in recipe.steps()} == set(spec.root.input_definitions.parameters)
    assert {step.name.replace("_", "-") for step in recipe.steps()} == set(step_tasks(spec, spec.root.dag))


def step_tasks(spec: Any, dag: Any) -> Iterator[str]:
    """Tasks of a DAG that are steps, those inside its conditions and exit handlers too."""
    for name, task in dag.tasks.items():
        inner = spec.components[task.component_ref.name].dag
        if inner.tasks:
            yield from step_tasks(spec, inner)
        else:
            yield name


@pytest.mark.parametrize("name", RECIPES)
def test_resolved_recipe_is_the_recipe(name: str) -> None:
    recipe = catalog.load(name)
    again = catalog.current().parse(yaml.safe_load(recipe.resolved_yaml()))
    assert again == recipe
    assert again.hash == recipe.hash


@pytest.mark.parametrize("name", RECIPES)
def test_plan_explains_every_recipe_and_touches_nothing(name: str, here: Path) -> None:
    result = CliRunner().invoke(cli, ["plan", name, "--json"])
    assert result.exit_code == 0, result.output
    planned = [step["step"] for step in json.loads(result.stdout)["steps"]]
    assert planned == [step.name for step in catalog.load(name).steps()]
    assert not list(here.iterdir())


@pytest.mark.parametrize("name", RECIPES)
def test_compiled_recipe_carries_its_sections(name: str, here: Path) -> None:
    result = CliRunner().invoke(cli, ["compile", name, "-o", "out"])
    assert result.exit_code == 0, result.output
    documents = [yaml.safe_load_all(path.read_text()) for path in (here / "out").glob("*.yaml")]
    spec = next(iter(documents[0]))
    recipe = catalog.load(name)
    for step in recipe.steps():
        default = spec["root"]["inputDefinitions"]["parameters"][step.name]["defaultValue"]
        assert json.loads(default)["config"] == step.config.model_dump(mode="json")


def test_published_settings_of_the_trainium_preset() -> None:
    """The figures of requirement 2.7: 4096 cores, 4,194,304 tokens a step, Llama 2 7B to the parameter."""
    recipe = catalog.load("trainium/llama2-7b")
    training, model = recipe.training, recipe.model  # type: ignore[attr-defined]
    assert training.parallel.world_size == 4096
    assert (training.parallel.tensor, training.parallel.data_degree, training.accumulation_steps) == (8, 512, 2)
    assert training.global_batch_size * recipe.packing.sequence_length == 4_194_304  # type: ignore[attr-defined]
    assert model.num_parameters() == 6_738_415_616
    assert (training.steps, training.warmup_steps, training.decay_length) == (500_000, 2_000, 480_000)
    assert training.decay_norm_weights


@pytest.mark.parametrize("name", ["gpu/llama3-8b", "trainium/llama2-7b"])
def test_cluster_preset_is_refused_here_before_anything_starts(
    name: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_look(self: object) -> str:
        raise AssertionError("the machine is checked before the data is looked up")

    monkeypatch.setattr(data_config.CorpusConfig, "fingerprint", no_look)
    result = CliRunner().invoke(cli, ["run", name])
    assert isinstance(result.exception, UserError)
    assert "training.parallel.nodes" in str(result.exception)
    assert not (here / ".modelmill" / "runs").exists()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("packing.sequence_length=512", ["packing.sequence_length", "512", "model.max_sequence_length", "256"]),
        ("model.vocab_size=1000", ["model.vocab_size", "1000", "tokenizer.vocab_size", "4096"]),
        ("training.parallel.processes_per_node=3", ["global_batch_size", "8", "12"]),
        ("model.num_heads=3", ["num_heads", "3", "hidden_size"]),
        ("training.stepz=3", ["training.stepz", "steps"]),
        ("training.steps=many", ["training.steps", "many"]),
        ("corpus.max_bytes=0", ["corpus.max_bytes", "0"]),
    ],
)
def test_wrong_override_names_parameter_value_and_fix(override: str, words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        catalog.load("laptop/llama-demo", [override])
    assert all(word in str(error.value) for word in words), str(error.value)
    assert "\n" not in str(error.value)
