"""Activation memory: what the blocks of a model keep from the forward for the backward pass.

Autograd keeps every intermediate result of a block; over many blocks, rows and positions these are most of what a
training step holds. A checkpointed block (Chen et al. 2016, arXiv:1604.06174) keeps its inputs and runs its forward
pass again in the backward pass; selective checkpointing (Korthikanti et al. 2022, arXiv:2205.05198) keeps the results
of expensive operators besides, so that only cheap ones run again. Gradients are the same bits in all of these modes;
a compiled block (`MemoryBudget`) orders its sums differently.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from modelmill.components.core.errors import UserError
from modelmill.components.training.blocks import blocks
from modelmill.components.training.options import ActivationMemory, EveryNLayers, MemoryBudget

_aten, _collectives = torch.ops.aten, torch.ops._c10d_functional


def _overloads(*packets: Any) -> frozenset[Any]:
    """Every overload of some operators that returns a new result.

    A policy is asked about overloads (`aten.mm.default`), to which a packet (`aten.mm`) never compares equal: a list
    of packets keeps nothing and says nothing. Variants that write into an argument are left out, since handing back
    a kept result would leave that argument unwritten.
    """
    found = (getattr(packet, name) for packet in packets for name in packet.overloads())
    return frozenset(overload for overload in found if not overload._schema.is_mutable)


MATMULS = _overloads(_aten.mm, _aten.bmm, _aten.addmm)
"""What `selective_matmul` keeps."""

COMPUTE_HEAVY = MATMULS | _overloads(
    _aten._scaled_mm,
    _aten._grouped_mm,
    _aten.convolution,
    _aten.convolution_backward,
    _aten.upsample_bilinear2d,
    _aten._scaled_dot_product_flash_attention,
    _aten._scaled_dot_product_flash_attention_for_cpu,
    _aten._scaled_dot_product_efficient_attention,
    _aten._scaled_dot_product_cudnn_attention,
    _aten._flash_attention_forward,
    _aten._efficient_attention_forward,
    # Sums over ranks wait for a network. Gathers do too, but their results are the largest tensors of a block.
    _collectives.all_reduce,
    _collectives.reduce_scatter_tensor,
)
"""What `selective` keeps: everything that costs much to compute again."""


def apply(model: nn.Module, mode: ActivationMemory) -> None:
    """Make the blocks of a model keep what a mode says; before sharding and data parallelism wrap them.

    The `forward` of the blocks is replaced, so modules, parameters and their names stay as they are.

    Args:
        model: any model with a list of blocks (see `blocks.blocks`); may lie on the meta device. A key-value cache
            that its `config` asks for is switched off: a block that runs twice would append to it twice.
        mode: `none` changes nothing; `full` checkpoints every block, `every_n_layers` the first of every n;
            `selective` and `selective_matmul` keep the results of `COMPUTE_HEAVY` and `MATMULS`; a `MemoryBudget`
            compiles every block and leaves the choice to the compiler's partitioner.

    Raises:
        UserError: the model has no list of blocks, or a budget is asked for where nothing can be compiled.
    """
    if mode == "none":
        return
    found = blocks(model)
    if not found:
        raise UserError("training.activation_memory: the model has no list of blocks to checkpoint; use none")
    if isinstance(mode, MemoryBudget):
        _refuse_without_compiler(found)
        for block in found:
            block.forward = torch.compile(block.forward, backend=_Budgeted(mode.budget))
        return
    if getattr(getattr(model, "config", None), "use_cache", False):
        model.config.use_cache = False  # type: ignore[union-attr]
    step = mode.every_n_layers if isinstance(mode, EveryNLayers) else 1
    for block in found[::step]:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, **_contexts(mode))


def _contexts(mode: ActivationMemory) -> dict[str, Callable[[], Any]]:
    """The `context_fn` of `checkpoint` for a selective mode, nothing for the others."""
    kept = {"selective": COMPUTE_HEAVY, "selective_matmul": MATMULS}.get(mode) if isinstance(mode, str) else None
    return (
        {} if kept is None else {"context_fn": partial(create_selective_checkpoint_contexts, partial(_decide, kept))}
    )


def _decide(kept: frozenset[Any], context: object, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in kept else CheckpointPolicy.PREFER_RECOMPUTE


@dataclass(frozen=True)
class _Budgeted:
    """The inductor backend with an activation memory budget.

    Compiled code is cached by function and backend. Blocks of one class share a function, so a budget must be part
    of the backend: set globally, a second model's would be overlooked.
    """

    budget: float

    def __call__(self, graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        from torch._dynamo.backends.registry import lookup_backend

        # `torch._dynamo.config`, which some descriptions name, has no such setting.
        with torch._functorch.config.patch(activation_memory_budget=self.budget):
            return lookup_backend("inductor")(graph, inputs)


def _refuse_without_compiler(found: Sequence[nn.Module]) -> None:
    on_cpu = all(parameter.device.type in ("cpu", "meta") for block in found for parameter in block.parameters())
    if on_cpu and not torch.accelerator.is_available() and not (shutil.which("g++") or shutil.which("clang++")):
        raise UserError(
            "training.activation_memory: a budget compiles the blocks and this machine has no C++ compiler;"
            " install g++ or use selective"
        )
