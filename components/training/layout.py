"""How the processes of a run share the work: the `training.parallel` section of a recipe. Torch-free."""

from __future__ import annotations

from typing import Self

from pydantic import Field, PositiveInt, model_validator

from modelmill.components.core.recipe import Section


class ParallelConfig(Section):
    """How the processes share the work. `tensor x pipeline x data = nodes x processes_per_node`.

    `shard` splits the data-parallel ranks further: 1 keeps a whole copy of the model on each (DDP), all of them is
    fully sharded (FSDP, Zhao et al. 2023, arXiv:2304.11277), a number between is hybrid: sharded within a group,
    replicated between groups.
    """

    nodes: PositiveInt = Field(default=1, description="Machines.")
    processes_per_node: PositiveInt = Field(default=2, description="Processes on each machine, one a device.")
    tensor: PositiveInt = Field(default=1, description="Processes that share every layer's matrices.")
    sequence_parallel: bool = Field(
        default=True,
        description="Whether the processes of a tensor-parallel group also split the positions between its matrices; "
        "matters only with tensor above 1.",
    )
    pipeline: PositiveInt = Field(default=1, description="Stages the layers are split into.")
    data: PositiveInt | None = Field(
        default=None,
        description="Parts a batch is split into, one a process (or tensor group); left out, what the rest leaves.",
    )
    shard: PositiveInt = Field(
        default=1,
        description="Data-parallel processes that share one copy of weights, gradients and optimizer state; 1: none.",
    )

    @model_validator(mode="after")
    def _degrees_make_the_world(self) -> Self:
        model, world = self.tensor * self.pipeline, self.world_size
        if world % model:
            raise ValueError(
                f"tensor {self.tensor} x pipeline {self.pipeline} = {model} does not divide"
                f" nodes {self.nodes} x processes_per_node {self.processes_per_node} = {world} processes;"
                f" use degrees whose product is one of {joined(divisors(world))}"
            )
        if self.data is not None and self.data * model != world:
            raise ValueError(
                f"tensor {self.tensor} x pipeline {self.pipeline} x data {self.data} = {model * self.data} is not"
                f" nodes {self.nodes} x processes_per_node {self.processes_per_node} = {world} processes;"
                f" set data to {world // model} or leave it out"
            )
        if self.data_degree % self.shard:
            raise ValueError(
                f"shard {self.shard} does not divide the data-parallel degree {self.data_degree};"
                f" use {joined(divisors(self.data_degree))}"
            )
        return self

    @property
    def world_size(self) -> int:
        """Processes on all machines together."""
        return self.nodes * self.processes_per_node

    @property
    def data_degree(self) -> int:
        """Ranks (or tensor groups) that see different data; gradients are averaged over these."""
        return self.data or self.world_size // (self.tensor * self.pipeline)

    @property
    def replicate_degree(self) -> int:
        """Whole copies of the model, each shared by `shard` ranks."""
        return self.data_degree // self.shard


def divisors(number: int) -> list[int]:
    """Divisors of a positive integer in rising order."""
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return small + [number // d for d in reversed(small) if d * d != number]


def joined(values: list[int]) -> str:
    """Values for an error message: `2`, `2 or 4`, `1, 2, 4`."""
    return " or ".join(str(value) for value in values) if len(values) < 3 else ", ".join(str(v) for v in values)
