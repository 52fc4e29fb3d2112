"""The device a rank computes on: CPU with gloo, NVIDIA GPU with nccl, or the native Neuron device.

Neuron registers itself with torch as a device called "neuron" when its package is installed (`torch.backends`
entry points); it is reached only through torch's generic hooks, so nothing here imports a vendor package.
"""

from __future__ import annotations

import os
import resource
import sys
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist

from modelmill.components.core.errors import UserError
from modelmill.components.training.config import Precision
from modelmill.components.training.precision import precisions_on

_COLLECTIVE_TIMEOUT = timedelta(minutes=30)


class Accelerator(Protocol):
    """What the engine needs from a kind of device."""

    name: str

    def device_count(self) -> int:
        """Devices of this kind in this machine; a CPU serves any number of processes."""

    def device(self, local_rank: int) -> torch.device:
        """Device of a rank, made the current one."""

    def backend(self) -> str:
        """Collective backend in `init_process_group`'s notation, with one for CPU tensors beside it."""

    def precisions(self) -> tuple[Precision, ...]:
        """Precisions this engine computes in on the device, as this machine has it."""

    def device_name(self) -> str:
        """Model name of the hardware, as `estimate.peak_flops` knows it."""

    def peak_memory(self) -> int:
        """Most bytes this process has held: device memory, or resident memory on a CPU."""

    def synchronize(self) -> None:
        """Wait until everything queued is done; for timing at a logged step only."""


class CPU:
    """CPU ranks over gloo."""

    name = "cpu"

    def device_count(self) -> int:
        return sys.maxsize

    def device(self, local_rank: int) -> torch.device:
        return torch.device("cpu")

    def backend(self) -> str:
        return "gloo"

    def precisions(self) -> tuple[Precision, ...]:
        return precisions_on(self.name)

    def device_name(self) -> str:
        return "cpu"

    def peak_memory(self) -> int:
        # Linux counts in KiB, macOS in bytes.
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

    def synchronize(self) -> None:
        return None


class CUDA:
    """NVIDIA GPUs over nccl."""

    name = "cuda"

    def device_count(self) -> int:
        return torch.cuda.device_count() if torch.cuda.is_available() else 0

    def device(self, local_rank: int) -> torch.device:
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)

    def backend(self) -> str:
        return "cpu:gloo,cuda:nccl"

    def precisions(self) -> tuple[Precision, ...]:
        return precisions_on(self.name)

    def device_name(self) -> str:
        return torch.cuda.get_device_name()

    def peak_memory(self) -> int:
        return torch.cuda.max_memory_allocated()

    def synchronize(self) -> None:
        torch.cuda.synchronize()


class Neuron:
    """Trainium 2 and later through the device "neuron" that its package registers with torch."""

    name = "neuron"

    def device_count(self) -> int:
        current = torch.accelerator.current_accelerator()
        return torch.accelerator.device_count() if current is not None and current.type == "neuron" else 0

    def device(self, local_rank: int) -> torch.device:
        torch.accelerator.set_device_index(local_rank)
        return torch.device("neuron", local_rank)

    def backend(self) -> str:
        return f"cpu:gloo,neuron:{dist.get_default_backend_for_device('neuron')}"

    def precisions(self) -> tuple[Precision, ...]:
        return precisions_on(self.name)

    def device_name(self) -> str:
        return "neuron"

    def peak_memory(self) -> int:
        return torch.accelerator.max_memory_allocated()

    def synchronize(self) -> None:
        torch.accelerator.synchronize()


_KNOWN: dict[str, type[CUDA] | type[Neuron] | type[CPU]] = {"cuda": CUDA, "neuron": Neuron, "cpu": CPU}


def present() -> dict[str, int]:
    """Kinds of device in this machine with their number; the CPU is always one of them."""
    counts = {name: kind().device_count() for name, kind in _KNOWN.items()}
    return {name: count for name, count in counts.items() if count}


def select_accelerator(name: str, processes: int, precision: Precision = "fp32") -> Accelerator:
    """Choose the kind of device.

    Args:
        name: `cpu`, `cuda`, `neuron`, or `auto`: the first of cuda, neuron, cpu with a device for every process.
        processes: processes on this machine.
        precision: what the run computes in.

    Raises:
        UserError: the named kind is absent, has too few devices, or does not do the precision.
    """
    counts = present()
    listed = ", ".join(name if name == "cpu" else f"{name} ({count})" for name, count in counts.items())
    if name == "auto":
        name = next(kind for kind, count in counts.items() if count >= processes)
    if name not in counts:
        raise UserError(f"training.accelerator: {name!r} is not in this machine; present: {listed}")
    if counts[name] < processes:
        raise UserError(
            f"training.parallel.processes_per_node: {processes} processes and {counts[name]} {name} devices;"
            f" use {counts[name]} processes or training.accelerator: cpu"
        )
    accelerator = _KNOWN[name]()
    if precision not in accelerator.precisions():
        raise UserError(
            f"training.precision: {precision!r} is not to be had on {name} in this machine;"
            f" use {', '.join(accelerator.precisions())}"
        )
    return accelerator


def join_group(accelerator: Accelerator) -> tuple[int, int, torch.device]:
    """Join the process group that the launcher described in the environment.

    Returns:
        Rank, world size and this rank's device.

    Raises:
        RuntimeError: the group has another size than WORLD_SIZE. A backend that silently falls back to single
            processes would train as many unrelated models.
    """
    expected = int(os.environ["WORLD_SIZE"])
    device = accelerator.device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(accelerator.backend(), timeout=_COLLECTIVE_TIMEOUT)
    member = torch.ones(1, device=device)
    dist.all_reduce(member)
    # Both what the group claims and what a collective really sees: they have differed.
    if dist.get_world_size() != expected or int(member.item()) != expected:
        raise RuntimeError(
            f"the process group spans {int(member.item())} processes (says {dist.get_world_size()}),"
            f" WORLD_SIZE is {expected}"
        )
    return dist.get_rank(), expected, device
