"""Rows with different numbers of targets: every target of a global batch weighs the same, however it is cut."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from modelmill.components.core.manifest import Manifest
from modelmill.components.data.loader import BatchSource, open_rows
from modelmill.components.training.loop import TrainingData, TrainingLoop
from modelmill.components.training.loss import linear_cross_entropy
from tests.components.training.runs import history, make_loop, single_rank
from tests.components.training.samples import make_tokens, training_config

ALONE = {"parallel": {"processes_per_node": 1}}


@pytest.fixture
def tokens(home: object, tmp_path: Path) -> Manifest:
    return make_tokens(tmp_path / "tokens")


def mask(rows: np.ndarray) -> np.ndarray:
    """As many targets as the row's second token says, from none to a row full."""
    return np.arange(rows.shape[1] - 1) < rows[:, 1:2] % rows.shape[1]


class Weighted(BatchSource):
    """The batches of another source, with their masks counted."""

    def targets(self, step: int) -> int:
        return int(mask(self.batch(step)).sum())


def sum_of_losses(model: torch.nn.Module, rows: torch.Tensor) -> torch.Tensor:
    targets = torch.where(torch.from_numpy(mask(rows.numpy())), rows[:, 1:], -100)
    logits = model(rows[:, :-1])
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")


def weighted_loop(tokens: Manifest, scratch: Path, **changes: object) -> TrainingLoop:
    loop = make_loop(tokens, training_config(**ALONE, **changes), single_rank(scratch), dtype=torch.float64)
    validation = open_rows(tokens, "validation")
    source = Weighted(open_rows(tokens, "train"), 0, 8)
    loop.data = TrainingData(source, validation, mask(validation.astype(np.int64)).sum(1))
    loop.objective = sum_of_losses
    return loop


def test_how_a_masked_batch_is_cut_does_not_matter(tokens: Manifest, tmp_path: Path) -> None:
    found = []
    for micro in (1, 2, 8):
        weighted_loop(tokens, tmp_path / str(micro), micro_batch_size=micro).run()
        found.append(history(tmp_path / str(micro)))
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            assert one == pytest.approx(two, rel=1e-9)
    # The rows do differ: a mean of the micro-batches' means is another number.
    counts = mask(BatchSource(open_rows(tokens, "train"), 0, 8).batch(0)).sum(1)
    assert len(set(counts.tolist())) > 3


def test_the_loss_is_the_mean_over_all_targets_of_the_batch(tokens: Manifest, tmp_path: Path) -> None:
    loop = weighted_loop(tokens, tmp_path / "run", steps=1, warmup_steps=0)
    rows = torch.from_numpy(loop.data.batches.batch(0, 0, 1))
    counted = torch.from_numpy(mask(rows.numpy()))
    logits = loop.model(rows[:, :-1])
    direct = torch.nn.functional.cross_entropy(logits[counted], rows[:, 1:][counted])
    gradient = torch.autograd.grad(direct, list(loop.model.parameters()))
    loop.run()
    record = history(tmp_path / "run")[0]
    assert record["loss"] == pytest.approx(direct.item(), rel=1e-12)
    norm = torch.stack([part.norm() for part in gradient]).norm()
    assert record["grad_norm"] == pytest.approx(norm.item(), rel=1e-9)
    assert record["tokens"] == int(counted.sum())


def test_validation_weighs_by_targets(tokens: Manifest, tmp_path: Path) -> None:
    loop = weighted_loop(tokens, tmp_path / "run", validate_every=None)
    loop.run()
    found = [record["validation_loss"] for record in history(tmp_path / "run") if "validation_loss" in record]
    rows = torch.from_numpy(open_rows(tokens, "validation")[:7].astype(np.int64))
    counted = torch.from_numpy(mask(rows.numpy()))
    with torch.no_grad():
        direct = torch.nn.functional.cross_entropy(loop.model(rows[:, :-1])[counted], rows[:, 1:][counted])
    assert found == [pytest.approx(direct.item(), rel=1e-12)]


def test_a_micro_batch_without_targets_adds_nothing() -> None:
    hidden = torch.randn(6, 4, requires_grad=True)
    weight = torch.randn(9, 4, requires_grad=True)
    loss = linear_cross_entropy(hidden, weight, torch.full((6,), -100), reduction="sum")
    loss.backward()
    assert loss.item() == 0
    assert hidden.grad is not None
    assert not hidden.grad.any()
    assert weight.grad is not None
    assert not weight.grad.any()


def test_frozen_parameters_stay_out_of_checkpoints_and_optimizer(tokens: Manifest, tmp_path: Path) -> None:
    config = training_config(**ALONE)
    first = make_loop(tokens, config, single_rank(tmp_path / "run"))
    trained = {name for name, _ in first.model.named_parameters() if "layers.1." in name}
    for name, parameter in first.model.named_parameters():
        parameter.requires_grad_(name in trained)
    loop = TrainingLoop(
        model=first.model,
        objective=first.objective,
        data=first.data,
        config=config,
        ranks=first.ranks,
        checkpoints=first.checkpoints,
        journal=first.journal,
        rate_scale=lambda name: 4.0 if name.endswith("down.weight") else 1.0,
    )
    before = {name: parameter.detach().clone() for name, parameter in loop.model.named_parameters()}
    loop.run()
    from safetensors import safe_open

    newest = sorted((tmp_path / "run" / "checkpoints").glob("step-*"))[-1]
    with safe_open(newest / "model-0.safetensors", "pt") as file:
        assert set(file.keys()) == trained
    for name, parameter in loop.model.named_parameters():
        assert torch.equal(parameter, before[name]) == (name not in trained)
    rates = {group["rate_scale"]: group["lr"] for group in loop.optimizer.param_groups}
    assert rates[4.0] == 4 * rates[1.0] > 0
