"""What the recipes of `chronos_tune` and `reforecast` refuse, in one line that names parameter and fix."""

from __future__ import annotations

import pytest

from modelmill.components.core.errors import UserError
from modelmill.pipelines import catalog


@pytest.mark.parametrize(
    ("name", "override", "words"),
    [
        ("gpu/chronos2-lora", "tuning={}", ["tuning", "nothing is given", "chronos2 for a"]),
        ("gpu/chronos2-lora", "tuning.search={}", ["tuning", "search", "chronos"]),
        ("laptop/reforecast-demo", "tuning.chronos2.steps=3", ["chronos and chronos2 are given"]),
        ("laptop/reforecast-demo", "tuning.chronos.model.d_model=16", ["model: the tuning starts from a given model"]),
        ("laptop/reforecast-demo", "gate.metric=rmse", ["gate.metric", "rmse", "mase"]),
        ("laptop/reforecast-demo", "gate={metric: sql}", ["gate.direction", "lower"]),
        ("laptop/reforecast-demo", "archive.uri=ftp://x/y", ["archive.uri", "is not an S3 URI"]),
        ("laptop/reforecast-demo", "degradation.max_ratio=0", ["degradation.max_ratio", "0"]),
        ("laptop/reforecast-demo", "drift.max_scale_ratio=1", ["drift.max_scale_ratio", "1"]),
        ("laptop/reforecast-demo", "series.as_of=soon", ["series.as_of", "soon", "2024-01-31"]),
    ],
)
def test_wrong_values_name_parameter_and_fix(name: str, override: str, words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        catalog.load(name, [override])
    assert all(word in str(error.value) for word in words), str(error.value)


def test_a_date_of_the_command_line_is_a_text_of_the_recipe() -> None:
    recipe = catalog.load("laptop/reforecast-demo", ["series.as_of=2008-06-30"])
    assert recipe.series.as_of == "2008-06-30"  # type: ignore[attr-defined]
    assert recipe.hash != catalog.load("laptop/reforecast-demo").hash


def test_forecasts_are_published_under_the_registered_models_name() -> None:
    recipe = catalog.load("laptop/reforecast-demo", ["archive.uri=s3://bucket/forecasts"])
    steps = {step.name: step.config for step in recipe.steps()}
    for name in ("publish_forecasts", "judge_forecasts"):
        assert (steps[name].name, steps[name].uri) == ("chronos-demo", "s3://bucket/forecasts")  # type: ignore[attr-defined]
