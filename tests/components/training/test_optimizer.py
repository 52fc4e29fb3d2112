"""Which optimizer a run gets, what it decays, and that it works on distributed parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from modelmill.components.training.adamw import AdamW
from modelmill.components.training.launch import TrainingJob
from modelmill.components.training.mesh import Mesh
from modelmill.components.training.optimizer import decay_groups, make_optimizer, start_step
from tests.components.training.forked_ranks import ForkedRanks
from tests.components.training.optimizers import MODULE, OPTIMIZERS, Parameters, checkpoints, updated
from tests.components.training.runs import history
from tests.components.training.samples import make_tokens, training_config

TWO = {"processes_per_node": 2}
SPLIT = {"processes_per_node": 2, "tensor": 2}
SHARDED = {"processes_per_node": 2, "shard": 2}
STOCHASTIC = {"precision": "bf16-stochastic", "learning_rate": 2e-3}
SHORT = {"steps": 20, "validation_rows": 0, "checkpoint_every": None}
RUNS: dict[str, dict[str, Any]] = {
    "copies": {"parallel": TWO, "training": {**SHORT, **STOCHASTIC}},
    "shared": {"parallel": SHARDED, "training": {**SHORT, **STOCHASTIC, "optimizer_state": "8bit"}},
    "split": {"parallel": SPLIT, "training": {**SHORT, **STOCHASTIC}},
    "fp8": {"parallel": SHARDED, "training": {**SHORT, "precision": "fp8-mixed"}},
    "fp8 split": {"parallel": SPLIT, "training": {**SHORT, "precision": "fp8-mixed"}},
}


class Odd(nn.Module):
    """Parameters whose shape does not tell what they are."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 4)
        self.norm = nn.LayerNorm((3, 4))
        self.projection = nn.Linear(4, 4)
        self.expert_weight = nn.Parameter(torch.zeros(2, 4, 4))
        self.expert_bias = nn.Parameter(torch.zeros(2, 4))
        self.scale = nn.Parameter(torch.ones(()))
        self.frozen = nn.Parameter(torch.zeros(4, 4), requires_grad=False)
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.embedding.weight  # tied


def decayed(model: nn.Module, **options: Any) -> tuple[set[str], set[str]]:
    """Names of the parameters with and without decay."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    found: tuple[set[str], set[str]] = (set(), set())
    for group in decay_groups(model, training_config(**options)):
        assert group["weight_decay"] in (0.0, 0.1)
        found[group["weight_decay"] == 0.0].update(names[parameter] for parameter in group["params"])
    return found


def test_matrices_are_decayed_whatever_the_model() -> None:
    with_decay, without = decayed(Odd())
    assert with_decay == {"embedding.weight", "projection.weight", "expert_weight"}
    assert without == {"norm.weight", "norm.bias", "projection.bias", "expert_bias", "scale"}


def test_everything_trained_is_decayed_when_asked() -> None:
    with_decay, without = decayed(Odd(), decay_norm_weights=True)
    assert not without
    assert len(with_decay) == 8


def test_the_decay_shrinks_what_it_should_and_nothing_else() -> None:
    model = Odd()
    optimizer = make_optimizer(model, training_config())
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    start_step(optimizer, 0, 0.5)
    optimizer.step()
    for name, parameter in model.named_parameters():
        factor = 1 - 0.5 * 0.1 if name in ("embedding.weight", "projection.weight") else 1.0
        torch.testing.assert_close(parameter.detach(), factor * before[name])


@pytest.mark.parametrize(
    ("changes", "own", "quantized", "stochastic"),
    [
        ({}, False, False, False),
        ({"precision": "bf16-mixed"}, False, False, False),
        ({"precision": "fp8-mixed"}, False, False, False),
        ({"precision": "bf16-stochastic"}, True, False, True),
        ({"optimizer_state": "8bit"}, True, True, False),
        ({"precision": "bf16-stochastic", "optimizer_state": "8bit"}, True, True, True),
    ],
)
def test_which_optimizer_a_run_gets(changes: dict[str, Any], own: bool, quantized: bool, stochastic: bool) -> None:
    optimizer = make_optimizer(Odd(), training_config(seed=5, **changes))
    if not own:
        assert type(optimizer) is torch.optim.AdamW
        assert optimizer.defaults["fused"] is True
        return
    assert isinstance(optimizer, AdamW)
    assert (optimizer.quantized, optimizer.stochastic_rounding, optimizer.seed) == (quantized, stochastic, 5)


def test_a_step_is_prepared_with_its_rate_and_number() -> None:
    optimizer = make_optimizer(Odd(), training_config(precision="bf16-stochastic"))
    start_step(optimizer, 7, 0.125)
    assert {group["lr"] for group in optimizer.param_groups} == {0.125}
    assert isinstance(optimizer, AdamW)
    assert optimizer.steps == 7


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("optimizers")


@pytest.fixture(scope="module")
def ranks(root: Path) -> list[dict[str, Any]]:
    """What two ranks found, in one launch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MODELMILL_HOME", str(root / "home"))
        tokens = make_tokens(root / "tokens")
        spec = {"tokens": tokens.model_dump(mode="json"), "root": str(root), "runs": RUNS}
        (root / "launch").mkdir()
        job = TrainingJob(MODULE, spec, training_config(parallel=SHARDED), root / "launch")
        return ForkedRanks().launch(job).metadata["ranks"]


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_a_step_left_out_changes_no_bit_of_distributed_parameters(ranks: list[dict[str, Any]], name: str) -> None:
    assert [rank[name]["skipped"] for rank in ranks] == [True, True]
    fused = "torch.optim.adamw.AdamW"
    assert (ranks[0][name]["class"] == fused) is (name == "fused")


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_distributed_parameters_are_updated_as_whole_ones(ranks: list[dict[str, Any]], name: str) -> None:
    """To the bit in fp32; in few bits within their rounding, as blocks and random bits follow the parts."""
    whole, _ = updated(Mesh(), OPTIMIZERS[name])
    for key, parameter in whole.named_parameters():
        found = torch.tensor(ranks[0][name]["weights"][key])
        assert found.tolist() == ranks[1][name]["weights"][key]
        expected = parameter.detach().float().flatten()
        if name == "fused" or (name == "8bit" and parameter.numel() < 4096):
            assert torch.equal(found, expected)
            continue
        # Three updates of at most about the rate, 1e-2; bf16 weights also move by their spacing.
        spacing = 2.0**-7 * expected.abs().clamp(min=2.0**-7) * ("stochastic" in name)
        assert ((found - expected).abs() <= 1e-2 + 3 * spacing).all()
        assert (found - expected).abs().mean() < 3e-3 + spacing.mean()


def test_copies_of_a_parameter_are_rounded_alike_and_parts_of_one_are_not(ranks: list[dict[str, Any]]) -> None:
    for name in ("stochastic", "stochastic 8bit"):
        assert ranks[0][name]["replicas"] == ranks[1][name]["replicas"]
    first, second = (torch.tensor(rank["shards"]) for rank in ranks)
    assert set(first.tolist()) == set(second.tolist()) == {1.0, 1.0 - 2.0**-8}  # a rate of 1e-3, a quarter of it
    assert not torch.equal(first, second)
    assert (first != second).float().mean().item() == pytest.approx(2 * 0.256 * 0.744, abs=0.05)


def test_bf16_copies_stay_equal_over_a_run(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["copies"]["digest"] == ranks[1]["copies"]["digest"]
    assert ranks[0]["copies"]["dtypes"] == ["torch.bfloat16"]
    # Norms are whole on both ranks of a tensor group, matrices are not.
    assert ranks[0]["split"]["norm"] == ranks[1]["split"]["norm"]
    assert ranks[0]["split"]["digest"] != ranks[1]["split"]["digest"]


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_a_checkpoint_gives_every_rank_its_bits_again_and_loads_on_one(
    ranks: list[dict[str, Any]], root: Path, name: str
) -> None:
    assert [rank["resumed"][name] for rank in ranks] == [True, True]
    trained, reference = updated(Mesh(), OPTIMIZERS[name])
    loaded = Parameters(Mesh(), trained.plain.dtype)
    optimizer = make_optimizer(loaded, training_config(**OPTIMIZERS[name]))
    assert checkpoints(root / f"kept {name}").load_latest(loaded, optimizer).step == 3
    for (key, parameter), other in zip(loaded.named_parameters(), trained.parameters(), strict=True):
        assert parameter.detach().float().flatten().tolist() == ranks[0][name]["weights"][key]
        assert {k: v.dtype for k, v in optimizer.state[parameter].items()} == {
            k: v.dtype for k, v in reference.state[other].items()
        }
        for moment in ("exp_avg", "exp_avg_sq"):
            found, expected = moments(optimizer, parameter)[moment], moments(reference, other)[moment]
            # Quantised in other blocks, and once more than where it came from; or bf16 rounded by other bits.
            error = (found - expected).norm() / expected.norm()
            assert error < (0.05 if "exp_avg_scale" in optimizer.state[parameter] or "stochastic" in name else 1e-6)


def moments(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, torch.Tensor]:
    state = optimizer.portable_state(parameter) if isinstance(optimizer, AdamW) else optimizer.state[parameter]
    return {name: value.float() for name, value in state.items()}


@pytest.mark.parametrize("name", list(RUNS))
def test_runs_learn_in_every_precision(ranks: list[dict[str, Any]], root: Path, name: str) -> None:
    points = history(root / name)
    losses = [point["loss"] for point in points if "loss" in point]
    assert losses[-1] < losses[0] - 0.5
    assert ("Float8Linear" in ranks[0][name]["kinds"]) is name.startswith("fp8")
