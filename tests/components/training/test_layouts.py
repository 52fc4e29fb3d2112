"""One run, many layouts: the same losses, norms and weights on one rank, two and four, however the work is shared."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from modelmill.components.core.errors import UserError
from modelmill.components.core.manifest import Manifest
from modelmill.components.training.launch import TrainingJob
from modelmill.components.training.mesh import Mesh
from modelmill.components.training.prepare import prepare
from tests.components.training.forked_ranks import ForkedRanks
from tests.components.training.layouts import MODULE, STEPS, Scenario, as_spec, first_gradient, run
from tests.components.training.runs import history, single_rank
from tests.components.training.samples import make_tokens, training_config

pytestmark = pytest.mark.slow  # `make test` has tests/components/llama/test_sharded.py
TWO: dict[str, dict[str, Any]] = {
    "dp2": {},
    "fsdp2": {"shard": 2},
    "tp2": {"tensor": 2, "sequence_parallel": False},
    "tp2sp": {"tensor": 2},
}
FOUR: dict[str, dict[str, Any]] = {
    "fsdp4": {"shard": 4},
    "hsdp2x2": {"shard": 2},
    "tp2xdp2": {"tensor": 2, "sequence_parallel": False},
    "tp2xfsdp2": {"tensor": 2, "shard": 2},
}
# On one rank: how one batch of 8 rows is cut does not matter either.
ONE = Scenario("one", {"processes_per_node": 1})
STOCHASTIC = Scenario(
    "one-stochastic", ONE.parallel, {"precision": "bf16-stochastic", "micro_batch_size": 2}, dtype="bfloat16"
)
TRANSFORMERS = [("fsdp2", "llama_hf"), ("dp2", "gpt_neox"), ("fsdp2", "gpt_neox")]
CUT = Scenario("cut", {"processes_per_node": 1}, {"micro_batch_size": 1})


def layouts(degrees: dict[str, dict[str, Any]], processes: int) -> list[Scenario]:
    return [Scenario(name, {"processes_per_node": processes, **parallel}) for name, parallel in degrees.items()]


@dataclass
class Measured:
    """What all launches found: folders of the runs, and findings of each rank by run."""

    tokens: Manifest
    root: Path
    ranks: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def alone(self, scenario: Scenario) -> dict[str, Any]:
        """Run a scenario here, on one rank."""
        self.ranks[scenario.name] = [run(scenario, self.tokens, single_rank(self.root), self.root)]
        return self.ranks[scenario.name][0]

    def launch(self, processes: int, tasks: list[tuple[str, Scenario]]) -> None:
        """Run tasks on as many real ranks, all in one launch."""
        scratch = self.root / f"launch-{processes}"
        scratch.mkdir()
        spec = {"tokens": self.tokens.model_dump(mode="json"), "root": str(self.root), "tasks": as_spec(tasks)}
        training = training_config(parallel={"processes_per_node": processes})
        found = ForkedRanks().launch(TrainingJob(MODULE, spec, training, scratch)).metadata["ranks"]
        for name in found[0]:
            self.ranks[name] = [rank[name] for rank in found]

    def points(self, name: str, after: int = 0) -> list[dict[str, float]]:
        """What a run logged: loss, gradient norm and validation loss step by step."""
        return [record for record in history(self.root / name) if record["step"] > after]

    def same(self, name: str, other: str, rel: float, after: int = 0) -> None:
        """Both runs logged the same numbers."""
        mine, its = self.points(name, after), self.points(other, after)
        assert len(mine) == len(its) > STEPS // 2
        for one, two in zip(mine, its, strict=True):
            assert one == pytest.approx(two, rel=rel)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    """Every run of this file."""
    folder = tmp_path_factory.mktemp("layouts")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MODELMILL_HOME", str(folder / "home"))
        found = Measured(make_tokens(folder / "tokens"), folder / "runs")
        found.root.mkdir()
        for scenario in (ONE, CUT, STOCHASTIC, replace(ONE, name="one-fp32", dtype="float32")):
            found.alone(scenario)
        for kind in ("llama_hf", "gpt_neox"):
            found.alone(replace(ONE, name=f"one-{kind}", model=kind))
        gradient = replace(ONE, name="gradient-one")
        found.ranks["gradient-one"] = [first_gradient(gradient, found.tokens, single_rank(found.root), found.root)]
        found.launch(2, two_ranks())
        found.launch(4, four_ranks())
        found.alone(replace(ONE, name="tp2xfsdp2-to-one", resume="tp2xfsdp2"))
    return found


def two_ranks() -> list[tuple[str, Scenario]]:
    pair: dict[str, Any] = {"processes_per_node": 2}
    sharded = {**pair, "shard": 2}
    runs = layouts(TWO, 2)
    runs += [Scenario(f"{name}-fp32", {**pair, **TWO[name]}, dtype="float32") for name in ("dp2", "fsdp2")]
    runs += [
        Scenario(f"{name}-bf16", {**pair, **TWO[name]}, {"precision": "bf16-mixed"}, dtype="float32")
        for name in ("dp2", "fsdp2")
    ]
    runs += [replace(STOCHASTIC, name="dp2-stochastic", parallel=pair)]
    runs += [Scenario(f"{name}-{kind}", {**pair, **TWO[name]}, model=kind) for name, kind in TRANSFORMERS]
    runs += [Scenario("fsdp2-cut", sharded, {"micro_batch_size": 1})]
    runs += [Scenario("fsdp2-checkpointed", sharded, {"activation_memory": "full"})]
    runs += [
        Scenario("one-to-fsdp2", sharded, resume="one"),
        Scenario("fsdp2-to-tp2", {**pair, "tensor": 2}, resume="fsdp2"),
    ]
    return [
        *(("run", scenario) for scenario in runs),
        *(("first_gradient", Scenario(f"gradient-{name}", {**pair, **TWO[name]})) for name in TWO),
        ("failing_save", Scenario("full-disk", sharded)),
    ]


def four_ranks() -> list[tuple[str, Scenario]]:
    four: dict[str, Any] = {"processes_per_node": 4}
    runs = layouts(FOUR, 4)
    runs += [
        Scenario("hsdp2x2-cut", {**four, "shard": 2}, {"micro_batch_size": 1}),
        Scenario("fsdp2-to-hsdp2x2", {**four, "shard": 2}, resume="fsdp2"),
        Scenario("tp2sp-to-tp2xfsdp2", {**four, "tensor": 2, "shard": 2}, resume="tp2sp"),
        Scenario("tp2xfsdp2-to-dp4", four, resume="tp2xfsdp2"),
    ]
    mixed = {"precision": "bf16-mixed"}
    runs += [Scenario("tp2xfsdp2-bf16", {**four, **FOUR["tp2xfsdp2"]}, mixed, dtype="float32")]
    split = [Scenario(f"gradient-{name}", {**four, **FOUR[name]}) for name in ("tp2xdp2", "tp2xfsdp2")]
    return [*(("run", scenario) for scenario in runs), *(("first_gradient", scenario) for scenario in split)]


@pytest.mark.parametrize("name", ["cut", *TWO, "fsdp2-cut", "fsdp2-checkpointed", *FOUR, "hsdp2x2-cut"])
def test_the_trajectory_is_that_of_one_rank(measured: Measured, name: str) -> None:
    measured.same(name, "one", rel=1e-9)


@pytest.mark.parametrize("name", ["dp2-fp32", "fsdp2-fp32"])
def test_in_fp32_too_but_for_the_order_of_sums(measured: Measured, name: str) -> None:
    measured.same(name, "one-fp32", rel=1e-5)


def test_mixed_precision_is_the_same_computation_sharded_or_not(measured: Measured) -> None:
    measured.same("fsdp2-bf16", "dp2-bf16", rel=1e-6)
    # Tensor parallelism adds up bf16 products on several ranks, which rounds them another time.
    measured.same("tp2xfsdp2-bf16", "dp2-bf16", rel=0.02)


def test_bf16_weights_are_averaged_in_fp32_by_fsdp_where_nothing_is_shared_either(measured: Measured) -> None:
    assert measured.ranks["dp2-stochastic"][0]["kind"].startswith("FSDP")
    for one, two in zip(measured.points("dp2-stochastic"), measured.points("one-stochastic"), strict=True):
        assert one["step"] == two["step"]
        if "loss" in one:
            assert one["loss"] == pytest.approx(two["loss"], rel=0.01)


class Unsplittable(torch.nn.Module):
    """A model that knows nothing of tensor parallelism."""


def test_a_model_that_cannot_be_split_is_refused_by_name(tmp_path: Path) -> None:
    config = training_config(parallel={"processes_per_node": 2, "tensor": 2})
    ranks = replace(single_rank(tmp_path), mesh=Mesh(tensor=2))
    with pytest.raises(UserError, match=r"training\.parallel\.tensor: 2, but Unsplittable .* use 1") as caught:
        prepare(Unsplittable(), ranks, config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "kind"), TRANSFORMERS)
def test_any_transformers_model_runs_on_the_same_loop(measured: Measured, name: str, kind: str) -> None:
    measured.same(f"{name}-{kind}", f"one-{kind}", rel=1e-9)


@pytest.mark.parametrize(
    "name",
    ["one-to-fsdp2", "fsdp2-to-tp2", "fsdp2-to-hsdp2x2", "tp2sp-to-tp2xfsdp2", "tp2xfsdp2-to-dp4", "tp2xfsdp2-to-one"],
)
def test_a_checkpoint_goes_on_under_another_layout(measured: Measured, name: str) -> None:
    assert measured.points(name)[0]["step"] == STEPS // 2 + 1
    measured.same(name, "one", rel=1e-9, after=STEPS // 2)


@pytest.mark.parametrize("name", [*TWO, "tp2xdp2", "tp2xfsdp2"])
def test_the_averaged_gradient_is_the_single_process_mean(measured: Measured, name: str) -> None:
    expected, found = measured.ranks["gradient-one"][0], measured.ranks[f"gradient-{name}"][0]
    assert found.keys() == expected.keys()
    for parameter, gradient in found.items():
        np.testing.assert_allclose(gradient, expected[parameter], rtol=1e-9, atol=1e-14, err_msg=parameter)


def test_sharding_shares_the_weights_out(measured: Measured) -> None:
    everything = measured.ranks["one"][0]["held"]
    for name, shares in (("dp2", 1), ("fsdp2", 2), ("fsdp4", 4), ("hsdp2x2", 2)):
        held = [rank["held"] for rank in measured.ranks[name]]
        assert sum(held) == everything * len(held) // shares
        assert max(held) == pytest.approx(everything / shares, rel=0.05)
    assert measured.ranks["dp2"][0]["kind"] == "DistributedDataParallel"  # the fast path when nothing is shared


def test_a_disk_that_is_full_for_one_rank_fails_all_of_them_and_leaves_what_was_whole(measured: Measured) -> None:
    first, last = measured.ranks["full-disk"]
    assert first["raised"][0] == last["raised"][0] == 28
    assert "rank 1" in first["raised"][1]
    assert first["left"] == ["step-00000001"]
    # ... and a later one in which a single rank's file is damaged is skipped by all ranks.
    assert first["loaded"] == last["loaded"] == 1
