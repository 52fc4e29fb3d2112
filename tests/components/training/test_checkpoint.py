"""Checkpoints: exact, committed whole, and skipped when they are not."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from torch import nn

from modelmill.components.core.errors import UserError
from modelmill.components.training.checkpoint import Checkpoints, Progress
from modelmill.components.training.optimizer import make_optimizer
from tests.components.training.samples import training_config


class Tied(nn.Module):
    """Two matrices, a vector, a tied head, and both kinds of buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("seen", torch.zeros(3))
        self.register_buffer("table", torch.ones(2), persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.embedding(tokens)))


def trained(steps: int) -> tuple[Tied, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = Tied()
    optimizer = make_optimizer(model, training_config())
    for step in range(steps):
        model(torch.arange(5)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        model.seen += step
    return model, optimizer


def store(folder: Path, *, keep: int = 2, digest: str = "a") -> Checkpoints:
    return Checkpoints(folder, digest=digest, keep=keep, rank=0, world_size=1)


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    moments = [value for p in model.parameters() for value in optimizer.state[p].values()]
    return [tensor.clone() for tensor in [*model.state_dict().values(), *moments]]


def test_everything_comes_back_bit_for_bit(tmp_path: Path) -> None:
    model, optimizer = trained(3)
    torch.manual_seed(99)
    store(tmp_path).save(Progress(3, 60), model, optimizer)
    expected, draw = state_of(model, optimizer), torch.rand(4)
    fresh, other = trained(1)
    assert store(tmp_path).load_latest(fresh, other) == Progress(3, 60)
    assert all(torch.equal(a, b) for a, b in zip(state_of(fresh, other), expected, strict=True))
    assert torch.equal(torch.rand(4), draw)
    # ... and the next step is the same step.
    for one, two in ((model, optimizer), (fresh, other)):
        one(torch.arange(5)).square().mean().backward()
        two.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), fresh.parameters(), strict=True))


def test_without_a_checkpoint_training_starts_at_the_start(tmp_path: Path) -> None:
    model, optimizer = trained(0)
    assert store(tmp_path / "none").load_latest(model, optimizer) == Progress(0, 0)


def test_the_newest_stay_and_the_rest_goes(tmp_path: Path) -> None:
    model, optimizer = trained(1)
    for step in (1, 2, 9, 10, 100):
        store(tmp_path, keep=2).save(Progress(step, step), model, optimizer)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000010", "step-00000100"]


DAMAGES = {
    "no marker": lambda folder: (folder / "checkpoint.json").unlink(),
    "torn marker": lambda folder: (folder / "checkpoint.json").write_text('{"format": 2, "st'),
    "foreign marker": lambda folder: (folder / "checkpoint.json").write_text("[]"),
    "newer format": lambda folder: (folder / "checkpoint.json").write_text('{"format": 99}'),
    "missing file": lambda folder: (folder / "optimizer-0.safetensors").unlink(),
    "truncated file": lambda folder: (folder / "model-0.safetensors").write_bytes(b"\0" * 10),
    "flipped bit": lambda folder: flip(folder / "model-0.safetensors"),
}


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", list(DAMAGES))
def test_an_unsound_checkpoint_is_skipped_with_a_warning(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, optimizer = trained(1)
    checkpoints = store(tmp_path)
    checkpoints.save(Progress(1, 10), model, optimizer)
    checkpoints.save(Progress(2, 20), model, optimizer)
    DAMAGES[damage](tmp_path / "step-00000002")
    with caplog.at_level(logging.WARNING, logger="modelmill"):
        assert checkpoints.load_latest(model, optimizer) == Progress(1, 10)
    assert "skipping checkpoint step-00000002" in caplog.text


def test_pruning_never_counts_an_unsound_checkpoint_as_kept(tmp_path: Path) -> None:
    model, optimizer = trained(1)
    checkpoints = store(tmp_path, keep=1)
    checkpoints.save(Progress(5, 50), model, optimizer)
    DAMAGES["no marker"](tmp_path / "step-00000005")
    checkpoints.save(Progress(3, 30), model, optimizer)
    assert checkpoints.load_latest(model, optimizer) == Progress(3, 30)


def test_what_a_killed_save_left_is_ignored_and_removed(tmp_path: Path) -> None:
    model, optimizer = trained(1)
    (tmp_path / ".step-00000007.partial").mkdir(parents=True)
    checkpoints = store(tmp_path)
    assert checkpoints.load_latest(model, optimizer) == Progress()
    checkpoints.save(Progress(1, 1), model, optimizer)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_a_failed_save_leaves_the_older_checkpoint_and_no_rest(tmp_path: Path) -> None:
    model, optimizer = trained(1)
    checkpoints = store(tmp_path)
    checkpoints.save(Progress(1, 1), model, optimizer)
    optimizer.state[next(model.parameters())]["step"] = "not a tensor"
    with pytest.raises(Exception, match="detach"):
        checkpoints.save(Progress(2, 2), model, optimizer)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_another_configurations_checkpoint_is_refused(tmp_path: Path) -> None:
    model, optimizer = trained(1)
    store(tmp_path, digest="a").save(Progress(1, 1), model, optimizer)
    with pytest.raises(UserError, match="another configuration"):
        store(tmp_path, digest="b").load_latest(model, optimizer)


def test_a_tied_weight_is_stored_once_and_only_persistent_buffers(tmp_path: Path) -> None:
    from safetensors import safe_open

    model, optimizer = trained(1)
    store(tmp_path).save(Progress(1, 1), model, optimizer)
    with safe_open(tmp_path / "step-00000001" / "model-0.safetensors", framework="pt") as file:
        assert sorted(file.keys()) == ["embedding.weight", "norm.bias", "norm.weight", "seen"]
    marker = json.loads((tmp_path / "step-00000001" / "checkpoint.json").read_text())
    assert (marker["step"], marker["tokens"], marker["world_size"]) == (1, 1, 1)
