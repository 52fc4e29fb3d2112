"""Recipes: extending, overriding, one clear line for every mistake, and a hash of what matters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, field_validator

from modelmill.components.core.errors import UserError
from modelmill.components.core.recipe import Recipe, Section, load_recipe, shipped_recipes, suggest, validate


class Inner(Section):
    """A section inside a section."""

    depth: int = Field(default=1, ge=1)


class Training(Section):
    """A section with a rule of its own."""

    steps: int = Field(ge=1)
    rate: float = 1e-3
    names: list[str] = Field(default=[])
    inner: Inner = Inner()

    @field_validator("steps")
    @classmethod
    def _even(cls, value: int) -> int:
        if value % 2:
            raise ValueError(f"{value} is odd; use {value + 1}")
        return value


class Sample(Recipe):
    """A pipeline's recipe."""

    training: Training
    other: Inner | None = None


TYPES = {"sample": Sample}
BASE = "pipeline: sample\nname: base\ntraining:\n  steps: 10\n  names: [a, b]\n"


@pytest.fixture
def recipes(tmp_path: Path) -> Path:
    (tmp_path / "laptop").mkdir()
    (tmp_path / "laptop" / "base.yaml").write_text(BASE)
    (tmp_path / "laptop" / "child.yaml").write_text("extends: laptop/base\nname: child\ntraining:\n  rate: 0.1\n")
    return tmp_path


def load(folder: Path, reference: str = "laptop/base", *overrides: str) -> Sample:
    recipe = load_recipe(reference, folder=folder, types=TYPES, overrides=overrides)
    assert isinstance(recipe, Sample)
    return recipe


def test_extends_merges_sections_and_replaces_lists(recipes: Path) -> None:
    child = load(recipes, "laptop/child")
    assert (child.name, child.training.steps, child.training.rate) == ("child", 10, 0.1)
    sibling = recipes / "laptop" / "grandchild.yaml"
    sibling.write_text("extends: child.yaml\nname: g\ntraining: {names: [c], inner: {depth: 3}}\n")
    grandchild = load(recipes, str(sibling))
    assert grandchild.training == Training(steps=10, rate=0.1, names=["c"], inner=Inner(depth=3))
    assert shipped_recipes(recipes) == ["laptop/base", "laptop/child", "laptop/grandchild"]


@pytest.mark.parametrize(
    ("override", "check"),
    [
        ("training.steps=20", lambda recipe: recipe.training.steps == 20),
        ("training.rate=3e-4", lambda recipe: recipe.training.rate == 3e-4),  # YAML calls this a string
        ("training.inner.depth=5", lambda recipe: recipe.training.inner.depth == 5),
        ("other.depth=4", lambda recipe: recipe.other.depth == 4),
        ("training.names=[x, 'y=z']", lambda recipe: recipe.training.names == ["x", "y=z"]),
        ("name=a=b", lambda recipe: recipe.name == "a=b"),
        ("other=null", lambda recipe: recipe.other is None),
    ],
)
def test_overrides(recipes: Path, override: str, check: Any) -> None:
    assert check(load(recipes, "laptop/base", override))


def test_an_override_fills_a_section_that_the_file_leaves_empty(recipes: Path) -> None:
    (recipes / "laptop" / "empty.yaml").write_text("pipeline: sample\nname: e\ntraining:\n")
    assert load(recipes, "laptop/empty", "training.steps=4").training.steps == 4


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.stepz=2"], r"training\.stepz: no such parameter; did you mean steps\?"),
        (["training.inner.deep=2"], r"training\.inner\.deep: no such parameter; did you mean depth\?"),
        (["zzz=2"], r"zzz: no such parameter; choose from "),
        (["training.steps=0"], r"training\.steps: 0: .*greater than or equal to 1"),
        (["training.steps=3"], r"^training\.steps: 3 is odd; use 4$"),
        (["training.steps=many"], r"training\.steps: 'many': "),
        (["training=5"], r"training: 5: Input should be a valid dictionary"),
        (["training.steps.x=1"], r"--set: training\.steps\.x goes through steps, which is a value"),
        (["training.steps"], r"--set: 'training\.steps' is not key=value"),
        (["=1"], r"--set: '=1' is not key=value"),
        (["training.names=[a"], r"--set: the value '\[a' of training\.names is not YAML"),
        (["pipeline=simple"], r"pipeline: 'simple' in laptop/base is not a pipeline; did you mean sample\?"),
        (["pipeline=[1]"], r"pipeline: \[1\] in laptop/base is not a pipeline"),
        (["pipeline=null"], r"pipeline: None in laptop/base is not a pipeline"),
        (["training.steps=0", "training.rate=x"], r"training\.steps: .*; training\.rate: 'x': "),
    ],
)
def test_a_wrong_value_is_one_line(recipes: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as failure:
        load(recipes, "laptop/base", *overrides)
    assert "\n" not in str(failure.value)


def write(folder: Path, content: bytes) -> str:
    (folder / "bad.yaml").write_bytes(content)
    return str(folder / "bad.yaml")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: [1\nb: 2", r"bad\.yaml line 2 is not YAML"),
        (b"a: \xff", r"bad\.yaml is not UTF-8"),
        (b"- 1", r"holds no mapping"),
        (b"", r"holds no mapping"),
        (b"extends: laptop/nothing", r"no recipe is called 'laptop/nothing'"),
        (b"extends: bad.yaml", r"extends itself"),
        (b"extends: missing.yaml", r"missing\.yaml does not exist"),
        (b"pipeline: sample\nname: x", r"^training: is missing; add it to the recipe$"),
        (b"pipeline: sample\nname: x\ntraining: {}", r"^training\.steps: is missing"),
        (b"pipeline: !!python/object/apply:os.system [ls]", r"is not YAML"),
    ],
)
def test_a_wrong_file_is_one_line(recipes: Path, content: bytes, message: str) -> None:
    with pytest.raises(UserError, match=message) as failure:
        load(recipes, write(recipes, content))
    assert "\n" not in str(failure.value)


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("laptop/bas", r"no recipe is called 'laptop/bas'; did you mean laptop/base"),
        ("nowhere.yaml", r"nowhere\.yaml does not exist"),
        ("../../etc/passwd", r"no recipe is called"),
        ("zzzzzz", r"choose from laptop/base, laptop/child"),
        ("a\0b", r"no recipe is called"),
    ],
)
def test_an_unknown_recipe_is_one_line(recipes: Path, reference: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(recipes, reference)


def test_extending_in_a_circle(recipes: Path) -> None:
    (recipes / "laptop" / "one.yaml").write_text("extends: laptop/two\n")
    (recipes / "laptop" / "two.yaml").write_text("extends: laptop/one\n")
    with pytest.raises(UserError, match="extends itself"):
        load(recipes, "laptop/one")


def test_hash_follows_what_decides_the_run(recipes: Path) -> None:
    base = load(recipes)
    assert base.hash == load(recipes, "laptop/base", "name=other", "description=words").hash
    assert base.hash == load(recipes, "laptop/base", "training.rate=0.001").hash, "a default written out"
    assert base.hash != load(recipes, "laptop/base", "training.rate=0.002").hash
    assert len(base.hash) == 16


def test_resolved_recipe_gives_itself(recipes: Path) -> None:
    child = load(recipes, "laptop/child")
    (recipes / "resolved.yaml").write_text(child.resolved_yaml())
    assert load(recipes, str(recipes / "resolved.yaml")) == child


@given(st.dictionaries(st.text(max_size=5), st.recursive(st.none() | st.integers() | st.text(max_size=5), st.lists)))
def test_any_mapping_is_accepted_or_explained(values: dict[str, Any]) -> None:
    with pytest.raises(UserError) as failure:
        validate(Sample, {"pipeline": "sample", **values})
    assert str(failure.value)
    assert "\n" not in str(failure.value)


def test_suggestions() -> None:
    assert suggest("stpes", ["steps", "rate"]) == "did you mean steps?"
    assert suggest("qqq", ["b", "a"]) == "choose from a, b"
