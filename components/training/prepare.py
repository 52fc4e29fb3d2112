"""What happens to a model between being built and being given its weights, in the one order that works."""

from __future__ import annotations

from torch import nn

from modelmill.components.core.errors import UserError
from modelmill.components.training import activations, sharding
from modelmill.components.training.config import TrainingConfig
from modelmill.components.training.precision import set_precision
from modelmill.components.training.worker import RankContext


def prepare(model: nn.Module, ranks: RankContext, config: TrainingConfig) -> None:
    """Lay a model out over the ranks: precision, tensor parallelism, activation memory, sharding.

    Sharding comes last because it cuts what tensor parallelism has cut already, and gathers what a block needs before
    the block runs a second time for its backward pass. Called on the meta device, no rank ever allocates more than
    its own part:

        model = build on "meta"
        prepare(model, ranks, config)
        model.to_empty(device=ranks.device), then initialise or load

    A model that lies on the device already, with the same weights on every rank, is cut in place.

    Args:
        model: any model; tensor parallelism needs its method `shard_tensors(mesh, sequence_parallel)`, which replaces
            its parameters by distributed ones.
        ranks: who this rank is.
        config: the training section.

    Raises:
        UserError: the model cannot be laid out like this.
    """
    mesh, parallel = ranks.mesh, config.parallel
    set_precision(model, config.precision, mesh.tensor)
    if mesh.tensor > 1:
        split = getattr(model, "shard_tensors", None)
        if split is None:
            raise UserError(
                f"training.parallel.tensor: {mesh.tensor}, but {type(model).__name__} cannot be split into tensor-"
                "parallel parts; use 1, and training.parallel.shard to spread its weights"
            )
        split(mesh, parallel.sequence_parallel)
    activations.apply(model, config.activation_memory)
    sharding.shard(model, mesh, config.precision)
