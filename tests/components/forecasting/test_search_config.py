"""What a search refuses before anything is trained, and the trainings it makes of a trial's values."""

from __future__ import annotations

from typing import Any

import pytest

from modelmill.components.core.errors import UserError
from modelmill.components.core.recipe import validate
from modelmill.components.forecasting.chronos2_config import Chronos2TuneConfig
from modelmill.components.forecasting.chronos_train_config import ChronosTrainConfig
from modelmill.components.forecasting.search_config import SearchConfig
from tests.components.forecasting.searches import TRAINING, section

CHRONOS2 = {"chronos": None, "chronos2": {"steps": 20, "rank": 4, "alpha": 8.0}}


def test_the_defaults_are_those_of_the_requirement() -> None:
    config = SearchConfig.model_validate({"chronos": {"training": TRAINING}})
    assert (config.space.learning_rate, config.seed) == ((1e-5, 1e-4), 10)
    assert config.refit is False, "a refit cannot be compared with the base any more"


def test_the_values_of_a_trial_become_a_training() -> None:
    config = section(space={"steps": [4, 8], "batch_size": [8, 16]})
    made = config.training_of({"learning_rate": 5e-5, "steps": 4, "batch_size": 16})
    assert isinstance(made, ChronosTrainConfig)
    training = made.training
    assert (training.learning_rate, training.steps, training.global_batch_size) == (5e-5, 4, 16)
    assert training.min_learning_rate == pytest.approx(5e-6), "as far below as in the section"
    assert config.steps_of({"learning_rate": 5e-5}) == 8


def test_the_values_of_a_trial_become_a_tuning_of_chronos2() -> None:
    config = section(**CHRONOS2, space={"rank": [2, 8], "batch_size": [16], "steps": [10]})
    made = config.training_of({"learning_rate": 5e-5, "rank": 8, "batch_size": 16, "steps": 10})
    assert isinstance(made, Chronos2TuneConfig)
    assert (made.learning_rate, made.rank, made.alpha, made.batch_size, made.steps) == (5e-5, 8, 16.0, 16, 10)
    full = section(chronos=None, chronos2={"method": "full"})
    assert full.training_of({"learning_rate": 1e-6}) == Chronos2TuneConfig(method="full", learning_rate=1e-6)


def test_a_search_is_another_when_what_decides_its_trials_is() -> None:
    first = section().identity("s", "b")
    assert section(max_jobs=40, refit=True, study="x").identity("s", "b") == first
    changes: list[dict[str, Any]] = [{"seed": 11}, {"space": {"learning_rate": [1e-5, 2e-4]}}, {"metric": "mase"}]
    changes += [{"training": {"steps": 9}}, {"validation_windows": 2}, {"pruning": {}}, {"max_parallel_jobs": 2}]
    others = [section(**change).identity("s", "b") for change in changes]
    others += [section().identity("t", "b"), section().identity("s", "c")]
    assert len({first, *others}) == 1 + len(others)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"space": {"learning_rate": [1e-4, 1e-5]}},
            r"learning_rate: \[0.0001, 1e-05\] must rise; write \[1e-05, 0.0",
        ),
        ({"space": {"learning_rate": [0, 1e-5]}}, "greater than 0"),
        ({"space": {"learning_rate": [1e-5]}}, "space.learning_rate"),
        ({"space": {"learning_rate": [1e-5, float("inf")]}}, "finite"),
        ({"space": {"steps": [4, 4]}}, r"steps: \[4, 4\] must hold different values"),
        ({"space": {"steps": []}}, r"steps: \[\] must hold different values"),
        ({"space": {"batch_size": [6]}}, "space: batch_size 6 cannot be trained: global_batch_size 6 is not a mult"),
        ({"space": {"rank": [4]}}, "space.rank: only a Chronos-2 tuned with LoRA has a rank"),
        ({"chronos": None}, "chronos, chronos2: neither is given"),
        ({"chronos2": {}}, "chronos, chronos2: both are given"),
        ({"chronos": {"model": {}, "training": TRAINING}}, "chronos.model: a search starts from the base"),
        ({**CHRONOS2, "pruning": {}}, "pruning: a Chronos-2 is trained by its library in one piece"),
        ({"pruning": {"segments": 9}}, "pruning.segments: 9 is more than 8 steps"),
        ({"pruning": {"segments": 1}}, "greater than or equal to 2"),
        ({"max_jobs": 0}, "max_jobs"),
        ({"max_parallel_jobs": 0}, "max_parallel_jobs"),
        ({"metric": "rmse"}, "'sql', 'wql' or 'mase'"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_what_cannot_be_searched(changes: dict[str, Any], message: str) -> None:
    given = {"chronos": {"training": TRAINING}, **changes}
    with pytest.raises(UserError, match=message):
        validate(SearchConfig, {name: value for name, value in given.items() if value is not None})
