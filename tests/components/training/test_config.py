"""Wrong training sections are refused with a sentence that names the field, its value and what would do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from modelmill.components.core.errors import UserError
from modelmill.components.core.recipe import Recipe, validate
from modelmill.components.llama.config import LlamaConfig
from modelmill.components.training.config import TrainingConfig, check_run
from modelmill.components.training.launch import LocalLauncher
from modelmill.components.training.layout import divisors
from tests.components.training.samples import LENGTH, MODEL, TRAINING, VOCAB, make_tokens, training_config


class SampleRecipe(Recipe):
    training: TrainingConfig


REFUSED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "batch": (
        {"global_batch_size": 9},
        ["global_batch_size 9", "data-parallel degree 2", "micro_batch_size 2", "8 or 12"],
    ),
    "batch below one micro-batch": ({"global_batch_size": 2}, ["global_batch_size 2", "use a global_batch_size of 4"]),
    "warmup": ({"warmup_steps": 9}, ["warmup_steps 9", "steps 8", "0 to 8"]),
    "parts of the schedule": (
        {"constant_steps": 4, "decay_steps": 3},
        ["warmup_steps 2", "constant_steps 4", "decay_steps 3", "steps 8", "raise steps to 9"],
    ),
    "lowest rate": ({"min_learning_rate": 0.1}, ["min_learning_rate 0.1", "learning_rate 0.01"]),
    "negative rate": ({"learning_rate": -1}, ["training.learning_rate", "-1", "greater than 0"]),
    "infinite rate": ({"learning_rate": float("inf")}, ["training.learning_rate", "finite"]),
    "betas": ({"betas": [0.9, 1.0]}, ["betas [0.9, 1.0]", "[0.9, 0.95]"]),
    "precision": ({"precision": "fp16"}, ["training.precision", "'fp16'", "bf16-mixed"]),
    "accelerator": ({"accelerator": "tpu"}, ["training.accelerator", "'tpu'", "neuron"]),
    "schedule": ({"schedule": "step"}, ["training.schedule", "'step'", "linear"]),
    "zero steps": ({"steps": 0}, ["training.steps", "0", "greater than 0"]),
    "unknown field": ({"learn_rate": 1}, ["training.learn_rate", "no such parameter", "learning_rate"]),
    "data degree": (
        {"parallel": {"data": 3}},
        ["training.parallel", "data 3", "= 3 is not", "= 2 processes", "set data to 2"],
    ),
    "tensor degree": (
        {"parallel": {"processes_per_node": 4, "tensor": 3}},
        ["training.parallel", "tensor 3", "processes_per_node 4", "1, 2, 4"],
    ),
    "shard degree": (
        {"parallel": {"processes_per_node": 4, "shard": 3}},
        ["training.parallel", "shard 3 does not divide", "data-parallel degree 4", "1, 2, 4"],
    ),
    "shard degree beside tensor": (
        {"parallel": {"processes_per_node": 4, "tensor": 2, "shard": 4}},
        ["training.parallel", "shard 4 does not divide", "data-parallel degree 2", "1 or 2"],
    ),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_a_wrong_value_is_named_with_what_would_do(case: str) -> None:
    changes, expected = REFUSED[case]
    with pytest.raises(UserError) as caught:
        validate(SampleRecipe, {"pipeline": "p", "name": "n", "training": {**TRAINING, **changes}})
    message = str(caught.value)
    assert "\n" not in message
    for words in expected:
        assert words in message, message


def test_the_published_layout_is_admitted_and_its_degrees_follow() -> None:
    config = training_config(
        global_batch_size=1024,
        micro_batch_size=1,
        parallel={"nodes": 128, "processes_per_node": 32, "tensor": 8},
    )
    assert (config.parallel.world_size, config.parallel.data_degree, config.accumulation_steps) == (4096, 512, 2)


def test_layout_and_reporting_do_not_decide_the_weights_but_the_rate_does() -> None:
    base = training_config()
    same = training_config(micro_batch_size=4, parallel={"processes_per_node": 1}, log_every=3, keep_checkpoints=7)
    assert base.deciding() == same.deciding()
    assert base.deciding() != training_config(learning_rate=0.02).deciding()
    assert base.deciding() != training_config(global_batch_size=4).deciding()


@pytest.mark.parametrize("number", [1, 2, 12, 36, 97, 4096])
def test_divisors(number: int) -> None:
    assert divisors(number) == [d for d in range(1, number + 1) if number % d == 0]


def test_sections_are_frozen() -> None:
    with pytest.raises(ValidationError):
        training_config().steps = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("model", "training", "tokens", "expected"),
    [
        ({"vocab_size": 50}, {}, {}, ["model.vocab_size: 50", f"tokenizer's {VOCAB}"]),
        ({"max_sequence_length": 16}, {}, {}, [f"packing.sequence_length: {LENGTH}", "model.max_sequence_length 16"]),
        ({}, {}, {"rows": 6}, ["training.global_batch_size: 8", "6 rows"]),
    ],
)
def test_model_training_and_data_are_checked_against_each_other(
    tmp_path: Path, model: dict[str, Any], training: dict[str, Any], tokens: dict[str, Any], expected: list[str]
) -> None:
    manifest = make_tokens(tmp_path / "tokens", **tokens)
    with pytest.raises(UserError) as caught:
        check_run(LlamaConfig.model_validate({**MODEL, **model}), training_config(**training), manifest)
    for words in expected:
        assert words in str(caught.value)


def test_a_corpus_without_validation_rows_needs_validation_switched_off(tmp_path: Path) -> None:
    manifest = make_tokens(tmp_path / "tokens")
    manifest.counts["validation_rows"] = 0
    model = LlamaConfig.model_validate(MODEL)
    with pytest.raises(UserError, match=r"training\.validation_rows: 7 .* set training\.validation_rows to 0"):
        check_run(model, training_config(), manifest)
    assert check_run(model, training_config(validation_rows=0), manifest) == VOCAB


def test_the_vocabulary_is_the_tokenizers_or_a_larger_one(tmp_path: Path) -> None:
    manifest = make_tokens(tmp_path / "tokens")
    assert check_run(LlamaConfig.model_validate(MODEL), training_config(), manifest) == VOCAB
    padded = LlamaConfig.model_validate({**MODEL, "vocab_size": 128})
    assert check_run(padded, training_config(), manifest) == 128


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"parallel": {"nodes": 2}}, ["training.parallel.nodes: 2", "cluster launcher"]),
        ({"parallel": {"pipeline": 2}}, ["training.parallel.pipeline: 2", "use 1", "shard or tensor"]),
        ({"attention": "flex"}, ["training.attention: 'flex' needs an NVIDIA GPU", "this run is on cpu", "flash"]),
    ],
)
def test_the_local_launcher_refuses_what_it_cannot_do(changes: dict[str, Any], expected: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        LocalLauncher().check(training_config(**changes))
    for words in expected:
        assert words in str(caught.value)
