"""Data parallelism: whole copies of a model that average their gradients, or copies shared out over ranks.

    shard    tensor
    1        1        `DistributedDataParallel`: every rank holds everything; the fewest and largest messages
    all      any      FSDP2 `fully_shard` (Zhao et al. 2023, arXiv:2304.11277) over the mesh dimension "shard"
    between  any      the same as hybrid sharding: sharded within a group, gradients averaged between groups too
    1        above 1  hybrid sharding over groups of one, which averages distributed parameters as they are

Gradients are averaged over the data-parallel degree; ranks of one tensor group see the same data and count once.
"""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from modelmill.components.training.blocks import blocks
from modelmill.components.training.config import Precision
from modelmill.components.training.mesh import Mesh


def shard(model: nn.Module, mesh: Mesh, precision: Precision) -> None:
    """Share a model's parameters out, block by block, where the mesh says so; otherwise do nothing.

    Parameters become distributed tensors. A block's are gathered just before it runs and dropped after it; those
    outside the blocks stay from the first use to the end of the backward pass. Gradients are reduced in fp32 (fp64
    for fp64 weights).

    In mixed precision the matrices of the blocks are gathered in bf16, which is what autocast would make of them, for
    half the traffic and without keeping a bf16 copy of all weights for the backward pass. Everything else (norms,
    biases, embedding, head) is gathered in fp32 and left to autocast, so that losses follow those of
    `DistributedDataParallel` to the order of summation. Under `MixedPrecisionPolicy` alone the residual stream and the
    norms would be bf16, which is another model.

    Args:
        model: any model, on the meta device or with the same weights on every rank; split over the tensor dimension
            and with its activation memory set before.
        mesh: of the run.
        precision: of the run.
    """
    if not is_sharded(mesh, precision):
        return
    assert mesh.device_mesh is not None
    grid = mesh.device_mesh["shard"] if mesh.replicate == 1 else mesh.device_mesh["replicate", "shard"]
    found = blocks(model)
    if precision in ("bf16-mixed", "fp8-mixed"):
        matrices = {p for block in found for p in block.parameters() if p.dim() > 1}
        half = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
        # The root goes first here: it takes vectors out of the blocks, which it could no longer reach afterwards.
        fully_shard(model, mesh=grid, ignored_params=matrices)
        rest = set(model.parameters()) - matrices
        for block in found:
            fully_shard(block, mesh=grid, mp_policy=half, ignored_params=rest)
        return
    half_weights = any(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32 if half_weights else None)
    for block in found:
        fully_shard(block, mesh=grid, mp_policy=policy)
    fully_shard(model, mesh=grid, mp_policy=policy)


def is_sharded(mesh: Mesh, precision: Precision) -> bool:
    """Whether parameters are FSDP2's on this mesh.

    Weights in bf16 are, even without sharding: `DistributedDataParallel` would add their gradients up in bf16.
    """
    return mesh.shard > 1 or (mesh.data_degree > 1 and (mesh.tensor > 1 or precision == "bf16-stochastic"))


def replicate(model: nn.Module, mesh: Mesh, device: torch.device) -> nn.Module:
    """Have the gradients of whole copies averaged; a single rank and a sharded model need no wrapper.

    Args:
        model: after `shard`, on its device, with the same weights on every rank.
        mesh: of the run.
        device: of this rank.

    Returns:
        What to call in the forward pass.
    """
    if mesh.data_degree == 1 or isinstance(model, FSDPModule):
        return model
    devices = None if device.type == "cpu" else [device]
    # Buffers are constants here. torch 2.13 renamed the option that keeps them from being sent with every step.
    known = inspect.signature(DistributedDataParallel).parameters
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    options: dict[str, Any] = {buffers: False}
    return DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True, **options)


def gradient_sync(model: nn.Module, last: bool) -> AbstractContextManager[Any]:
    """Average gradients between copies of the model with the last micro-batch only.

    Ranks that share a copy add theirs up with every micro-batch: until then each holds the gradient of all weights,
    and keeping that would cost more than sharding saves. They gather the weights each time anyway.

    Args:
        model: what is called in the forward pass.
        last: whether the coming micro-batch is the step's last one.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_all_reduce(last)
    if last or not isinstance(model, DistributedDataParallel):
        return nullcontext()
    return model.no_sync()
