"""What two ranks find of optimizers over distributed parameters; the launched half of `test_optimizer.py`."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from modelmill.components.core.manifest import Manifest
from modelmill.components.training.adamw import AdamW
from modelmill.components.training.checkpoint import Checkpoints, Progress
from modelmill.components.training.config import TrainingConfig
from modelmill.components.training.launch import TrainingResult
from modelmill.components.training.mesh import Mesh
from modelmill.components.training.optimizer import make_optimizer, set_found_inf, start_step
from modelmill.components.training.shards import local_part
from modelmill.components.training.worker import RankContext, run_rank
from tests.components.training.layouts import Scenario, make
from tests.components.training.samples import training_config

MODULE = "tests.components.training.optimizers"
SHAPES: dict[str, tuple[tuple[int, ...], Placement | None]] = {
    "rows": ((96, 64), Shard(0)),
    "columns": ((64, 80), Shard(1)),
    "uneven": ((7, 5), Shard(0)),
    "empty": ((1, 4100), Shard(0)),  # nothing is left for the second rank
    "whole": ((80, 64), Replicate()),
    "bias": ((6,), Replicate()),
    "plain": ((9, 4), None),
}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "fused": {},
    "8bit": {"optimizer_state": "8bit"},
    "stochastic": {"precision": "bf16-stochastic"},
    "stochastic 8bit": {"precision": "bf16-stochastic", "optimizer_state": "8bit"},
}


class Parameters(nn.Module):
    """Parameters of all kinds, distributed over the mesh dimension "shard" when there is a mesh."""

    def __init__(self, mesh: Mesh, dtype: torch.dtype) -> None:
        super().__init__()
        self.mesh = mesh
        for name, (_, placement) in SHAPES.items():
            whole = self.draw(name, 0).to(dtype)
            if placement is not None and mesh.device_mesh is not None:
                whole = distribute_tensor(whole, mesh.device_mesh["shard"], [placement], src_data_rank=None)
            self.register_parameter(name, nn.Parameter(whole))

    @staticmethod
    def draw(name: str, step: int) -> Tensor:
        """Numbers of a parameter's shape, the same on every rank."""
        seed = int.from_bytes(hashlib.sha256(f"{name}/{step}".encode()).digest()[:4], "little")
        return torch.randn(SHAPES[name][0], generator=torch.Generator().manual_seed(seed))

    def give_gradients(self, step: int) -> None:
        for name, parameter in self.named_parameters():
            gradient = self.draw(name, step + 1).to(parameter.dtype)
            if isinstance(parameter, DTensor):
                gradient = distribute_tensor(gradient, parameter.device_mesh, parameter.placements, src_data_rank=None)
            parameter.grad = gradient

    def bits(self, optimizer: torch.optim.Optimizer) -> list[Tensor]:
        """This rank's weights and state, copied."""
        states = [value for parameter in self.parameters() for value in optimizer.state[parameter].values()]
        return [local_part(tensor).clone() for tensor in (*self.parameters(), *states)]


def updated(mesh: Mesh, options: dict[str, Any]) -> tuple[Parameters, torch.optim.Optimizer]:
    """Parameters after three steps."""
    config = training_config(**options)
    stochastic = config.precision == "bf16-stochastic"
    parameters = Parameters(mesh, torch.bfloat16 if stochastic else torch.float32)
    optimizer = make_optimizer(parameters, config)
    for step in range(3):
        parameters.give_gradients(step)
        start_step(optimizer, step, 1e-2)
        optimizer.step()
    return parameters, optimizer


def skipped(parameters: Parameters, optimizer: torch.optim.Optimizer) -> bool:
    """Whether a step that is left out changes no bit on this rank."""
    before = parameters.bits(optimizer)
    set_found_inf(optimizer, torch.tensor(torch.inf))
    for parameter in parameters.parameters():
        parameter.grad = torch.full_like(parameter, torch.nan)
    optimizer.step()
    set_found_inf(optimizer, None)
    return all(torch.equal(a, b) for a, b in zip(before, parameters.bits(optimizer), strict=True))


def _digest(tensors: list[Tensor]) -> str:
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _on_two(ranks: RankContext, options: dict[str, Any]) -> dict[str, Any]:
    parameters, optimizer = updated(ranks.mesh, options)
    whole = {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().float().flatten().tolist()
        for name, p in parameters.named_parameters()
    }
    own = [local_part(p).flatten() for name, p in parameters.named_parameters() if name in ("whole", "bias", "plain")]
    return {
        "class": f"{type(optimizer).__module__}.{type(optimizer).__name__}",
        "skipped": skipped(parameters, optimizer),
        "weights": whole,
        "replicas": _digest(own),
    }


def _shards_differ(ranks: RankContext) -> list[float]:
    """Equal parts on both ranks, updated alike but for the random bits: what each rank's part became."""
    assert ranks.mesh.device_mesh is not None
    whole = torch.ones(128, 64, dtype=torch.bfloat16)
    mesh = ranks.mesh.device_mesh["shard"]
    parameter = nn.Parameter(distribute_tensor(whole, mesh, [Shard(0)], src_data_rank=None))
    options = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0}
    optimizer = AdamW([parameter], **options, stochastic_rounding=True)  # type: ignore[arg-type]
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return local_part(parameter).float().flatten().tolist()


def checkpoints(folder: Path, rank: int = 0, world_size: int = 1) -> Checkpoints:
    """Checkpoints of `Parameters`."""
    return Checkpoints(folder, digest="same", keep=1, rank=rank, world_size=world_size)


def _resumed(ranks: RankContext, folder: Path, options: dict[str, Any]) -> bool:
    """Whether a checkpoint of this layout gives this rank its bits again."""
    parameters, optimizer = updated(ranks.mesh, options)
    kept = checkpoints(folder, ranks.rank, ranks.world_size)
    kept.save(Progress(3), parameters, optimizer)
    fresh = Parameters(ranks.mesh, parameters.plain.dtype)
    other = make_optimizer(fresh, training_config(**options))
    kept.load_latest(fresh, other)
    pairs = zip(parameters.bits(optimizer), fresh.bits(other), strict=True)
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


def _trained(ranks: RankContext, tokens: Manifest, root: Path, name: str, **fields: Any) -> dict[str, Any]:
    """A training run: what became of the loop's parameters on this rank."""
    loop = make(Scenario(name, dtype="float32", **fields), tokens, ranks, root)
    loop.run()
    parts = [local_part(parameter).flatten() for parameter in loop.model.parameters()]
    return {
        "digest": _digest(parts),
        "norm": _digest([local_part(next(p for p in loop.model.parameters() if p.dim() == 1))]),
        "dtypes": sorted({str(part.dtype) for part in parts}),
        "loss": loop.journal.latest.get("loss"),
        "kinds": sorted({type(module).__name__ for module in loop.model.modules()}),
    }


def measure(ranks: RankContext, spec: dict[str, Any], training: TrainingConfig) -> TrainingResult:
    """Everything, and what every rank found."""
    tokens, root = Manifest.model_validate(spec["tokens"]), Path(spec["root"])
    found: dict[str, Any] = {name: _on_two(ranks, options) for name, options in OPTIMIZERS.items()}
    found["shards"] = _shards_differ(ranks)
    found["resumed"] = {name: _resumed(ranks, root / f"kept {name}", options) for name, options in OPTIMIZERS.items()}
    for name, fields in spec["runs"].items():
        found[name] = _trained(ranks, tokens, root, name, **fields)
    every: list[Any] = [None] * ranks.world_size
    dist.all_gather_object(every, found)
    return TrainingResult(metadata={"ranks": every})


if __name__ == "__main__":
    run_rank(measure, sys.argv)
