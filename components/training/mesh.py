"""The ranks of a run as a grid: replicate x shard x tensor, the tensor dimension fastest.

Neighbouring ranks, which share a machine's fast links, form the tensor groups, whose collectives lie inside every
layer; sharded copies come next, and replicas, which meet once a step, are furthest apart.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from modelmill.components.training.layout import ParallelConfig

NAMES = ("replicate", "shard", "tensor")


@dataclass(frozen=True)
class Mesh:
    """Where this rank stands.

    Attributes:
        replicate: whole copies of the model.
        shard: data-parallel ranks that share a copy's weights, gradients and optimizer state.
        tensor: ranks that share every layer's matrices and see the same data.
        rank: of this process in the whole grid.
        device_mesh: the grid with one dimension for each of `NAMES`; None for a single process without a group.
    """

    replicate: int = 1
    shard: int = 1
    tensor: int = 1
    rank: int = 0
    device_mesh: DeviceMesh | None = None

    @classmethod
    def build(cls, parallel: ParallelConfig, device_type: str) -> Mesh:
        """Make the grid; called by every rank of an initialised process group.

        Args:
            parallel: the degrees; `pipeline` must be 1.
            device_type: of the ranks' devices, as torch names it.
        """
        sizes = (parallel.replicate_degree, parallel.shard, parallel.tensor)
        grid = init_device_mesh(device_type, sizes, mesh_dim_names=NAMES)
        return cls(*sizes, rank=grid.get_rank(), device_mesh=grid)

    @property
    def data_degree(self) -> int:
        """Parts of a batch; gradients are averaged over as many."""
        return self.replicate * self.shard

    @property
    def data_rank(self) -> int:
        """Which part of a batch is this rank's; the same within a tensor group."""
        return self.rank // self.tensor

    @property
    def tensor_rank(self) -> int:
        """This rank's place in its tensor group."""
        return self.rank % self.tensor

    @property
    def tensor_group(self) -> ProcessGroup | None:
        """The ranks that share this rank's matrices; None when there are no others."""
        if self.device_mesh is None or self.tensor == 1:
            return None
        return self.device_mesh.get_group("tensor")
