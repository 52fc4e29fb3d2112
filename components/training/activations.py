"""Activation memory: what the blocks of a model keep from the forward for the backward pass.

Autograd keeps every intermediate result of a block; over many blocks, rows and positions these are most of what a
training step holds. A checkpointed block (Chen et al. 2016, arXiv:1604.06174) keeps its inputs and runs its forward
pass again in the backward pass; selective checkpointing (Korthikanti et al. 2022, arXiv:2205.05198) keeps the results
of expensive operators besides, so that only cheap ones run again. Gradients are the same bits in all of these modes;
a compiled block (`MemoryBudget`) orders its sums differently.
"""

from __future__ import annotations

import os
import shutil
import sys
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

MATMULS = frozenset({"aten::mm", "aten::bmm", "aten::addmm", "aten::_scaled_mm", "aten::_grouped_mm"})
"""What `selective_matmul` keeps, by the names of operators: matrix products, in fp8 too."""

COMPUTE_HEAVY = MATMULS | {
    "aten::convolution",
    "aten::convolution_backward",
    "aten::upsample_bilinear2d",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_flash_attention_forward",
    "aten::_efficient_attention_forward",
    "torch_attn::_varlen_attn",
    # Sums over ranks wait for a network. Gathers do too, but their results are the largest tensors of a block.
    "_c10d_functional::all_reduce",
    "_c10d_functional::reduce_scatter_tensor",
}
"""What `selective` keeps: everything torch knows that costs much to compute again. Attention of other packages and
compiled attention are not operators of torch and run again."""


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
        block.forward = partial(_checkpointing(mode), block.forward)


def _checkpointing(mode: ActivationMemory) -> Callable[..., Any]:
    """`checkpoint` with the context of a selective mode, or plain."""
    kept = {"selective": COMPUTE_HEAVY, "selective_matmul": MATMULS}.get(mode) if isinstance(mode, str) else None
    if kept is None:
        return partial(checkpoint, use_reentrant=False)
    context = partial(create_selective_checkpoint_contexts, partial(_decide, kept))
    return partial(checkpoint, use_reentrant=False, context_fn=context)


def _decide(kept: frozenset[str], context: object, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Whether a result is kept, for `create_selective_checkpoint_contexts`.

    A policy is asked about an overload (`aten.mm.default`), to which the operator's packet (`aten.mm`) never compares
    equal: a list of packets keeps nothing and says nothing, so names are compared. A variant that writes into an
    argument always runs again, since handing back a kept result would leave that argument unwritten.
    """
    schema = getattr(operator, "_schema", None)
    keep = schema is not None and schema.name in kept and not schema.is_mutable
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


@dataclass(frozen=True)
class _Budgeted:
    """The inductor backend with an activation memory budget.

    Compiled code is cached by function and backend. Blocks of one class share a function, so a budget must be part
    of the backend: set globally, a second model's would be overlooked.
    """

    budget: float

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        from torch._dynamo.backends.registry import lookup_backend

        # `torch._dynamo.config`, which some descriptions name, has no such setting.
        settings: dict[str, Any] = {"activation_memory_budget": self.budget}
        sizeless = "unsafe_treat_script_objects_as_zero_size"
        if hasattr(torch._functorch.config, sizeless):
            # Distributed parameters bring their mesh into the graph, whose memory newer versions refuse to guess.
            settings[sizeless] = True
        with torch._functorch.config.patch(settings):
            return lookup_backend("inductor")(graph, inputs)


def _refuse_without_compiler(found: Sequence[nn.Module]) -> None:
    on_cpu = all(parameter.device.type in ("cpu", "meta") for block in found for parameter in block.parameters())
    compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")  # as inductor chooses it
    if on_cpu and not torch.accelerator.is_available() and not shutil.which(compiler):
        raise UserError(
            f"training.activation_memory: a budget compiles the blocks and there is no C++ compiler {compiler!r} on"
            " this machine; install it, name another one in CXX, or use selective"
        )
