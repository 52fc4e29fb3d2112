"""The repeated blocks of a model, whatever its architecture: what is sharded, checkpointed and compiled one by one."""

from __future__ import annotations

from torch import nn


def blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a model in the order they run.

    They are the children of the `nn.ModuleList` that holds the most parameters: the decoder layers of this package,
    of `transformers` and of most other implementations. The first one wins a tie, so a list of blocks is preferred
    to a list within one of them.

    Args:
        model: any module.

    Returns:
        An empty list for a model without a non-empty `nn.ModuleList`, which is then one piece.
    """
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module)]
    if not lists:
        return []
    largest = max(lists, key=_num_parameters)
    return list(largest)


def _num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
