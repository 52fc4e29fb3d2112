"""A decoder whose matrices are shared by ranks equals one that is whole; four processes, one launch."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from modelmill.components.core.errors import UserError
from modelmill.components.core.home import Home
from modelmill.components.data.loader import open_rows
from modelmill.components.llama.huggingface import load_huggingface
from modelmill.components.llama.pretrain import pretrain
from modelmill.components.training.launch import TrainingJob
from tests.components.llama import sharded
from tests.components.training.forked_ranks import ForkedRanks
from tests.components.training.samples import make_tokenizer, make_tokens, pretrain_config, training_config


def launch(scratch: Path, *scenarios: str) -> list[dict[str, Any]]:
    """What each of four ranks found in each scenario."""
    training = training_config(parallel={"processes_per_node": 4})
    job = TrainingJob(sharded.MODULE, {"scenarios": scenarios}, training, scratch)
    return ForkedRanks().launch(job).metadata["ranks"]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The findings of one launch."""
    names = (scenario.__name__ for scenario in sharded.FAST)
    return launch(tmp_path_factory.mktemp("sharded"), *names)


def test_logits_loss_and_every_gradient_equal_one_process(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert len(rank["parity"]) == 11
        for layout, errors in rank["parity"].items():
            assert len(errors) == (4 if layout == "fully sharded" else 5)
            assert all(error < 1e-10 for error in errors.values()), (layout, errors)


def test_documents_are_masked_the_same_on_every_rank(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert len(rank["masked"]) == 4
        for layout, errors in rank["masked"].items():
            assert errors["loss"] < 1e-10, (layout, errors)
            assert errors["gradients"] < 1e-10, (layout, errors)
            assert errors["unmasked"] > 1e-3, (layout, errors)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no compiler here")
def test_compiled_blocks_do_too(tmp_path: Path) -> None:
    for rank in launch(tmp_path, "compiled"):
        assert len(rank["compiled"]) == 5
        assert all(error < 1e-10 for error in rank["compiled"].values()), rank["compiled"]


def test_float32_does_too_to_its_rounding(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert all(error < 1e-5 for error in rank["float32"]["sequence"].values()), rank["float32"]


def test_weights_start_the_same_on_every_mesh(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert len(rank["initial"]) == 26
        assert all(rank["initial"].values()), rank["initial"]


def test_a_loss_over_a_split_vocabulary_equals_torchs(found: list[dict[str, Any]]) -> None:
    for rank in found:
        for case, errors in rank["vocabulary_loss"].items():
            assert all(error < 1e-13 for error in errors.values()), (case, errors)


def test_gradients_of_collectives_are_their_adjoints(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert len(rank["adjoint"]) == 11
        assert all(difference < 1e-12 for difference in rank["adjoint"].values()), rank["adjoint"]


def test_an_export_has_the_same_bytes_however_the_model_is_sharded_and_can_be_read_back(
    found: list[dict[str, Any]],
) -> None:
    for rank in found:
        digests = rank["export"]
        for limit in (10**9, 9_000):
            assert len({digests[f"{name}, {limit}"] for name in ("alone", "tensor 4", "tensor 2, sharded")}) == 1
        assert digests[f"alone, {10**9}"] != digests["alone, 9000"]
        assert all(digests[f"{name}, loaded"] for name in ("alone", "tensor 4", "tensor 2, sharded"))


@pytest.mark.parametrize(
    ("attempt", "message"),
    [
        ("length", "sequence_length: 10 tokens cannot be split over 4 tensor-parallel ranks; use a multiple, or set"),
        ("heads", "training.parallel.tensor: 4 does not divide the model's 2 key-value heads; use 1 or 2"),
        (
            "vocabulary",
            "training.parallel.tensor: 4 does not divide the model's vocabulary 97; use 1, or pad it: set"
            " model.vocab_size to 100",
        ),
        ("uneven without sequence parallel", "True"),
    ],
)
def test_what_cannot_be_split_is_refused(found: list[dict[str, Any]], attempt: str, message: str) -> None:
    for rank in found:
        assert re.match(re.escape(message), rank["refusals"][attempt]), rank["refusals"][attempt]


def test_the_step_trains_a_shared_model_and_exports_what_it_validated(home: Home, tmp_path: Path) -> None:
    tokens, tokenizer = make_tokens(tmp_path / "tokens"), make_tokenizer(tmp_path / "tokenizer")
    output = tmp_path / "out" / "data"
    output.mkdir(parents=True)
    parallel = {"processes_per_node": 2, "tensor": 2}
    with pytest.raises(UserError, match=r"tensor: 2 does not divide the model's vocabulary 97; use 1, or pad it"):
        pretrain(pretrain_config(parallel=parallel), output, tokenizer=tokenizer, tokens=tokens)
    config = pretrain_config(model={"vocab_size": 98}, parallel=parallel)
    result = pretrain(config, output, tokenizer=tokenizer, tokens=tokens, launcher=ForkedRanks())
    rows = torch.from_numpy(open_rows(tokens, "validation")[:7].astype(np.int64))
    with torch.no_grad():
        loss = load_huggingface(output / "model")(rows[:, :-1], rows[:, 1:])
    assert loss.item() == pytest.approx(result.metrics["validation_loss"], rel=1e-5)
    assert loss.item() < 4.0  # from log(98)
    assert result.counts["world_size"] == 2
