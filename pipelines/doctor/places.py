"""The pods of a run as a scheduler sees them: what each asks for, how many there are, which nodes they may use."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal

from modelmill.components.launchers.trainjob_config import Toleration
from modelmill.pipelines.doctor.cluster import Target
from modelmill.pipelines.doctor.kube import quantity

Amounts = dict[str, Decimal]
EFA = "vpc.amazonaws.com/efa"


@dataclass(frozen=True)
class Place:
    """Pods of one kind: what each asks for, how many there are at a time, and which nodes they may use."""

    name: str
    each: Amounts
    count: int
    node_selector: Mapping[str, str]
    tolerations: Sequence[Toleration]

    @property
    def total(self) -> Amounts:
        return {resource: amount * self.count for resource, amount in self.each.items()}


def training_place(target: Target) -> Place | None:
    """The nodes of a training job, or None where steps train themselves."""
    job = target.profile.trainjob
    if target.profile.launcher != "trainjob" or job is None:
        return None
    each = {"cpu": quantity(job.cpu), "memory": quantity(job.memory)}
    if job.accelerator and job.devices_per_node:
        each[job.accelerator] = Decimal(job.devices_per_node)
    if job.efa_per_node:
        each[EFA] = Decimal(job.efa_per_node)
    return Place("training job", each, target.nodes, job.node_selector, job.tolerations)


def places(target: Target) -> Iterator[Place]:
    """Every kind of pod that a run of the profile starts."""
    for name, step in (("step", target.profile.step), ("device step", target.profile.device_step)):
        if step is None:
            continue
        each = {"cpu": quantity(step.cpu), "memory": quantity(step.memory)}
        if step.accelerator and step.accelerator_count:
            each[step.accelerator] = Decimal(step.accelerator_count)
        yield Place(name, each, 1, step.node_selector, step.tolerations)
    if job := training_place(target):
        yield job


def size(resource: str, amount: Decimal) -> str:
    """`1800 GiB` of memory, `8` of anything else."""
    return f"{amount / 2**30:.0f} GiB" if resource.endswith("memory") else f"{amount:f}"


def shown(amounts: Mapping[str, Decimal]) -> str:
    """`cpu 184, memory 1800 GiB, nvidia.com/gpu 8`."""
    return ", ".join(f"{resource} {size(resource, amount)}" for resource, amount in amounts.items())
