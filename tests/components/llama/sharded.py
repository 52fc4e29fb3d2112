"""What four ranks that share matrices find, each scenario against the same model whole on every rank."""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, zeros
from torch.nn import functional as F

from modelmill.components.core.errors import UserError
from modelmill.components.llama.config import LlamaConfig
from modelmill.components.llama.huggingface import export_huggingface, load_weights
from modelmill.components.llama.model import LlamaDecoder
from modelmill.components.training import activations, collectives, initialize
from modelmill.components.training.attention_kernels import DocumentwiseFlash
from modelmill.components.training.config import TrainingConfig
from modelmill.components.training.documents import document_ids
from modelmill.components.training.launch import TrainingResult
from modelmill.components.training.layout import ParallelConfig
from modelmill.components.training.loss import linear_cross_entropy
from modelmill.components.training.mesh import Mesh
from modelmill.components.training.options import MemoryBudget
from modelmill.components.training.worker import RankContext, run_rank

MODULE = "tests.components.llama.sharded"
COMPILED = MemoryBudget(budget=0.5)  # the compiler chooses what is kept
EOS = 0
MODEL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_layers": 2,
    "num_heads": 8,
    "num_kv_heads": 4,
    "max_sequence_length": 16,
    "init_std": 0.3,  # far from uniform predictions, so that a wrong sum shows
}


def config(**changes: Any) -> LlamaConfig:
    return LlamaConfig.model_validate({**MODEL, **changes})


def grid(tensor: int) -> Mesh:
    """The four ranks as tensor groups; the other ranks share the model's copies out."""
    return Mesh.build(ParallelConfig(processes_per_node=4, tensor=tensor, shard=4 // tensor), "cpu")


def sharded(
    model: LlamaConfig, mesh: Mesh, sequence_parallel: bool, *, dtype: torch.dtype = torch.float64, fsdp: bool = False
) -> LlamaDecoder:
    """A decoder that was split on the meta device and then drawn."""
    decoder = LlamaDecoder(model, device="meta", dtype=dtype)
    decoder.shard_tensors(mesh, sequence_parallel)
    if fsdp:
        assert mesh.device_mesh is not None
        for layer in decoder.layers:
            fully_shard(layer, mesh=mesh.device_mesh["shard"])
        fully_shard(decoder, mesh=mesh.device_mesh["shard"])
    decoder.to_empty(device="cpu")
    decoder.init_weights(5)
    return decoder


def everyone() -> collectives.RankGroup:
    assert dist.group.WORLD is not None
    return collectives.RankGroup.of(dist.group.WORLD)


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def error(found: Tensor, expected: Tensor) -> float:
    """Largest difference, as a part of the largest expected number."""
    return ((whole(found) - expected).abs().max() / expected.abs().max()).item()


def rows(length: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, 96, (3, length), generator=generator)
    targets = torch.randint(0, 96, (3, length), generator=generator)
    targets[0, 4:9] = -100
    return tokens, targets


def worst(model: nn.Module, expected: nn.Module) -> float:
    """Largest error of the gradients, of which every one must have its parameter's placements."""
    errors = []
    for (name, one), (_, other) in zip(model.named_parameters(), expected.named_parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        if isinstance(one, DTensor):
            assert one.grad.placements == one.placements, name  # type: ignore[attr-defined]
        errors.append(error(one.grad, other.grad))
    return max(errors)


def compare(mesh: Mesh, sequence_parallel: bool, tied: bool, **options: Any) -> dict[str, float]:
    """Logits, loss and gradients of a split decoder against a whole one."""
    model = config(tie_embeddings=tied)
    mode = options.pop("activation_memory", "none")
    alone = LlamaDecoder(model, dtype=options.get("dtype", torch.float64), seed=5)
    split = sharded(model, mesh, sequence_parallel, **options)
    activations.apply(split, mode)
    tokens, targets = rows()
    found = {}
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor
    ):
        loss = split(tokens, targets)
    expected = alone(tokens, targets)
    if sequence_parallel and mode != COMPILED:  # no rank may keep the hidden states of all positions
        assert not [tensor.shape for tensor in saved if tensor.numel() == tokens.numel() * model.hidden_size]
    found["loss"] = error(loss, expected)
    loss.backward()
    expected.backward()
    found["gradients of the loss"] = worst(split, alone)
    for one in (split, alone):
        one.zero_grad()
    logits, expected = split(tokens), alone(tokens)
    found["logits"] = error(logits, expected)
    if not options.get("fsdp"):  # which gathers weights for calls of the whole model only
        found["hidden states"] = error(split.hidden_states(tokens), alone.hidden_states(tokens))
    for result in (logits, expected):
        F.cross_entropy(result.flatten(0, 1), targets.flatten()).backward()
    found["gradients of the logits"] = worst(split, alone)
    return found


def parity(ranks: RankContext) -> dict[str, dict[str, float]]:
    found = {}
    for tensor in (2, 4):
        mesh = grid(tensor)
        for sequence_parallel in (False, True):
            for tied in (False, True):
                name = f"tensor {tensor}, sequence {sequence_parallel}, tied {tied}"
                found[name] = compare(mesh, sequence_parallel, tied)
    mesh = grid(2)
    found["fully sharded"] = compare(mesh, True, True, fsdp=True)
    found["recomputed"] = compare(mesh, True, False, activation_memory="full")
    found["partly recomputed"] = compare(mesh, False, False, activation_memory="selective")
    return found


def float32(ranks: RankContext) -> dict[str, dict[str, float]]:
    return {"sequence": compare(grid(2), True, False, dtype=torch.float32)}


def masked(ranks: RankContext) -> dict[str, dict[str, float]]:
    """Loss and gradients within documents, where every rank attends over whole rows with its own heads."""
    tokens, targets = rows()
    tokens[0, [2, 3, 7]] = tokens[1, 11] = EOS
    documents = document_ids(tokens, EOS)
    found = {}
    for name, tensor, sequence_parallel, fsdp in (
        ("tensor 2", 2, False, False),
        ("tensor 2, sequence", 2, True, False),
        ("tensor 2, sequence, fully sharded", 2, True, True),
        ("tensor 4, sequence", 4, True, False),
    ):
        alone = LlamaDecoder(config(), dtype=torch.float64, seed=5)
        split = sharded(config(), grid(tensor), sequence_parallel, fsdp=fsdp)
        split.attention_kernel = DocumentwiseFlash()
        loss, expected = split(tokens, targets, documents), alone(tokens, targets, documents)
        loss.backward()
        expected.backward()
        changed = error(alone(tokens, targets), expected)
        found[name] = {"loss": error(loss, expected), "gradients": worst(split, alone), "unmasked": changed}
    return found


def initial(ranks: RankContext) -> dict[str, bool]:
    """Whether parameters of every layout start as one process draws them, in blocks that the parts do not respect."""
    line, square = init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2))
    layouts: dict[str, tuple[Any, list[Placement]]] = {
        "rows": (line, [Shard(0)]),
        "columns": (line, [Shard(1)]),
        "copies": (line, [Replicate()]),
        "rows and columns": (square, [Shard(0), Shard(1)]),
    }
    found = {}
    size = initialize._BLOCK_ELEMENTS
    try:
        initialize._BLOCK_ELEMENTS = 64
        for shape in ((24, 10), (7, 5), (3, 8), (40, 100)):
            expected = torch.empty(shape)
            initialize.init_normal(expected, name="w", seed=1, std=0.5)
            for name, (mesh, placements) in layouts.items():
                part = zeros(*shape, device_mesh=mesh, placements=placements)
                initialize.init_normal(part, name="w", seed=1, std=0.5)
                found[f"{shape} {name}"] = torch.equal(part.full_tensor(), expected)
        for tied in (False, True):
            alone = LlamaDecoder(config(tie_embeddings=tied), seed=5).state_dict()
            for tensor in (2, 4):
                for fsdp in (False, True):
                    split = sharded(config(tie_embeddings=tied), grid(tensor), True, dtype=torch.float32, fsdp=fsdp)
                    same = [torch.equal(whole(value), alone[name]) for name, value in split.state_dict().items()]
                    found[f"tied {tied}, tensor {tensor}, fsdp {fsdp}"] = all(same)
            placed = LlamaDecoder(config(tie_embeddings=tied), seed=5)
            placed.shard_tensors(grid(2), True)
            same = [torch.equal(whole(value), alone[name]) for name, value in placed.state_dict().items()]
            found[f"tied {tied}, split where it lies"] = all(same)
    finally:
        initialize._BLOCK_ELEMENTS = size
    return found


def vocabulary_loss(ranks: RankContext) -> dict[str, dict[str, float]]:
    """The loss over a split vocabulary against torch's over the whole, in float64."""
    found = {}
    group, size = everyone(), ranks.world_size
    for reduction in ("mean", "sum"):
        for ignored in (0.0, 0.3):
            generator = torch.Generator().manual_seed(9)
            hidden = torch.randn(37, 16, dtype=torch.float64, generator=generator)
            weight = torch.randn(24, 16, dtype=torch.float64, generator=generator)
            targets = torch.randint(0, 24, (37,), generator=generator)
            targets[torch.rand(37, generator=generator) < ignored] = -100
            full = [tensor.clone().requires_grad_() for tensor in (hidden, weight)]
            expected = F.cross_entropy(F.linear(*full), targets, reduction=reduction)
            wanted = torch.autograd.grad(0.5 * expected, full)
            own = [hidden.clone().requires_grad_(), weight.chunk(size)[ranks.rank].clone().requires_grad_()]
            loss = linear_cross_entropy(
                collectives.copy(own[0], group),
                own[1],
                targets,
                chunk_tokens=8,
                reduction=reduction,  # type: ignore[arg-type]
                group=group,
            )
            gradients = torch.autograd.grad(0.5 * loss, own)
            found[f"{reduction}, {ignored} ignored"] = {
                "loss": error(loss, expected),
                "hidden": error(gradients[0], wanted[0]),
                "weight": error(gradients[1], wanted[1].chunk(size)[ranks.rank]),
            }
    return found


def adjoint(ranks: RankContext) -> dict[str, float]:
    """How far <A x, y> is from <x, A* y> summed over all ranks, for each collective A and its gradient A*."""
    group, size = everyone(), ranks.world_size
    forms: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...], bool, bool]] = {
        # collective, shape of its input, whether input and output are the same on every rank
        "copy": (lambda x: collectives.copy(x, group), (2, 3), True, False),
        "reduce": (lambda x: collectives.reduce(x, group), (2, 3), False, True),
    }
    for dim in (0, 1, 2):
        forms[f"gather {dim}"] = (lambda x, dim=dim: collectives.gather(x, dim, group), (2, 3, 5), False, False)
        forms[f"gather replicated {dim}"] = (
            lambda x, dim=dim: collectives.gather_replicated(x, dim, group), (2, 3, 5), False, True
        )  # fmt: skip
        forms[f"reduce scatter {dim}"] = (
            lambda x, dim=dim: collectives.reduce_scatter(x, dim, group), (4, 8, 12), False, False
        )  # fmt: skip
    found = {}
    for name, (collective, shape, same_input, same_output) in forms.items():
        own = torch.Generator().manual_seed(11 + ranks.rank)
        shared = torch.Generator().manual_seed(10)
        x = torch.randn(shape, dtype=torch.float64, generator=shared if same_input else own).requires_grad_()
        result = collective(x)
        y = torch.randn(result.shape, dtype=torch.float64, generator=shared if same_output else own)
        (gradient,) = torch.autograd.grad(result, x, y)
        sides = torch.stack([(result * y).sum() / (size if same_output else 1),
                             (x * gradient).sum() / (size if same_input else 1)]).detach()  # fmt: skip
        dist.all_reduce(sides)
        found[name] = abs(sides[0] - sides[1]).item()
    return found


def export(ranks: RankContext) -> dict[str, Any]:
    """Digests of exported folders, equal when the bytes are, and whether reading one back restores the weights."""
    found = {}
    alone = LlamaDecoder(config(), seed=5)
    reference = {name: value.clone() for name, value in alone.state_dict().items()}
    layouts = {"alone": alone, "tensor 4": sharded(config(), grid(4), True, dtype=torch.float32)}
    layouts["tensor 2, sharded"] = sharded(config(), grid(2), True, dtype=torch.float32, fsdp=True)
    for name, model in layouts.items():
        for limit in (10**9, 9_000):
            folder = ranks.scratch / "exports" / name / str(limit)
            export_huggingface(model, folder, max_shard_bytes=limit)
            dist.barrier()
            found[f"{name}, {limit}"] = digest(folder)
    for name, model in layouts.items():
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        load_weights(model, folder)
        state = {key: whole(value) for key, value in model.state_dict().items()}
        found[f"{name}, loaded"] = all(torch.equal(value, reference[key]) for key, value in state.items())
    return found


def digest(folder: Path) -> str:
    content = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        content.update(path.name.encode() + path.read_bytes())
    return content.hexdigest()


def refusals(ranks: RankContext) -> dict[str, str]:
    """What the decoder says to what it cannot do."""
    mesh = grid(4)
    split = sharded(config(), mesh, True)
    found = {}
    for name, attempt in {
        "length": lambda: split(rows(10)[0]),
        "heads": lambda: LlamaDecoder(config(num_kv_heads=2), device="meta").shard_tensors(mesh, True),
        "vocabulary": lambda: LlamaDecoder(config(vocab_size=97), device="meta").shard_tensors(mesh, True),
    }.items():
        try:
            attempt()
            found[name] = "nothing"
        except UserError as refusal:
            found[name] = str(refusal)
    uneven = sharded(config(), mesh, False)
    found["uneven without sequence parallel"] = str(math.isfinite(uneven(*rows(10)).item()))
    return found


def compiled(ranks: RankContext) -> dict[str, float]:
    return compare(grid(2), True, False, activation_memory=COMPILED)


FAST = (parity, masked, float32, initial, vocabulary_loss, adjoint, export, refusals)
SCENARIOS = (*FAST, compiled)


def measure(ranks: RankContext, spec: dict[str, Any], training: TrainingConfig) -> TrainingResult:
    """The scenarios asked for, as every rank sees them."""
    found = {scenario.__name__: scenario(ranks) for scenario in SCENARIOS if scenario.__name__ in spec["scenarios"]}
    every: list[Any] = [None] * ranks.world_size
    dist.all_gather_object(every, found)
    return TrainingResult(metadata={"ranks": every})


if __name__ == "__main__":
    run_rank(measure, sys.argv)
