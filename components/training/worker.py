"""The frame of every training process: join the group, run, report how it ended.

    if __name__ == "__main__":
        run_rank(train, sys.argv)

torch is imported only after the process is tied to its parent and its signals are handled.
"""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from modelmill.components.core.errors import UserError, disk_error
from modelmill.components.core.step import USER_ERROR_EXIT
from modelmill.components.training.config import TrainingConfig
from modelmill.components.training.launch import STOPPED_EXIT, RankFiles, TrainingResult
from modelmill.components.training.processes import die_with_parent, leave_now

if TYPE_CHECKING:
    import torch

    from modelmill.components.training.accelerator import Accelerator
    from modelmill.components.training.mesh import Mesh

logger = logging.getLogger("modelmill")


class StopRequestedError(Exception):
    """Raised on every rank at the same step once the checkpoint of that step is safe."""


class StopSignal:
    """Whether any rank was told to stop, agreed on by all ranks without holding up a step.

    A rank that stopped alone would leave the others waiting in a collective for ever. The flags are summed on
    the CPU beside the next step's work, so the answer is one step old.
    """

    def __init__(self, world_size: int) -> None:
        self.received = False
        self._world_size = world_size
        self._group: Any = None
        self._pending: tuple[Any, torch.Tensor] | None = None

    def install(self) -> None:
        """Handle this process's signals from now on."""
        signal.signal(signal.SIGTERM, self._receive)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the launcher turns Ctrl-C into SIGTERM

    def _receive(self, _number: int, _frame: object) -> None:
        self.received = True

    def requested(self) -> bool:
        """Call once a step on every rank; true on all of them in the same call."""
        if self._world_size == 1:
            return self.received
        import torch
        import torch.distributed as dist

        if self._group is None:
            self._group = dist.new_group(backend="gloo")  # its own, so that it cannot mix with gradient collectives
        answer = False
        if self._pending is not None:
            work, flags = self._pending
            work.wait()
            answer = bool(flags.item())
        flags = torch.tensor(int(self.received), dtype=torch.int32)
        self._pending = (dist.all_reduce(flags, group=self._group, async_op=True), flags)
        return answer


@dataclass
class RankContext:
    """What a rank knows about itself.

    Attributes:
        rank: of this process among all.
        world_size: processes on all machines.
        mesh: its place in the grid of data- and tensor-parallel ranks.
        device: of this rank.
        accelerator: the kind of device.
        stop: whether to stop after this step.
        scratch: folder for checkpoints, shared by the ranks of a machine.
    """

    rank: int
    world_size: int
    mesh: Mesh
    device: torch.device
    accelerator: Accelerator
    stop: StopSignal
    scratch: Path

    @property
    def data_rank(self) -> int:
        """Which part of a batch is this rank's, in [0, data_degree)."""
        return self.mesh.data_rank

    @property
    def data_degree(self) -> int:
        """Parts of a batch; gradients are averaged over as many."""
        return self.mesh.data_degree

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and reports."""
        return self.rank == 0


RankFunction = Callable[[RankContext, dict[str, Any], TrainingConfig], TrainingResult]


def run_rank(function: RankFunction, arguments: list[str]) -> NoReturn:
    """Run one training process and end it.

    Args:
        function: gets the context, the job's spec and the training section; what rank 0 returns is the result.
        arguments: `sys.argv`: the program and the path of the job file.
    """
    leave_now(_run(function, arguments))


def _run(function: RankFunction, arguments: list[str]) -> int:
    die_with_parent()
    files = RankFiles(Path(arguments[1]).parent)
    spec = json.loads(files.job.read_bytes())
    training = TrainingConfig.model_validate(spec.pop("training"))
    rank = int(os.environ["RANK"])
    level = logging.INFO if rank == 0 else logging.WARNING
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stderr, force=True)
    stop = StopSignal(training.parallel.world_size)
    stop.install()
    try:
        result = function(_join(training, stop, files.scratch), spec, training)
        if rank == 0:
            _write(files.result, result.model_dump_json())
        _leave()
        return 0
    except StopRequestedError as error:
        _write_failure(files, rank, "stopped", str(error))
        _leave()
        return STOPPED_EXIT
    except Exception as error:
        known = error if isinstance(error, UserError) else _disk_problem(error, files.scratch)
        if known is None:
            traceback.print_exc()
            _write_failure(files, rank, "crash", f"{type(error).__name__}: {error}")
            return 1
        _write_failure(files, rank, "user", str(known))
        return USER_ERROR_EXIT


def _join(training: TrainingConfig, stop: StopSignal, scratch: Path) -> RankContext:
    import torch

    from modelmill.components.training.accelerator import join_group, select_accelerator
    from modelmill.components.training.mesh import Mesh

    accelerator = select_accelerator(training.accelerator, training.parallel.processes_per_node, training.precision)
    rank, world_size, device = join_group(accelerator)
    if training.deterministic:
        torch.use_deterministic_algorithms(True)
        # Filling fresh buffers with nan finds bugs in kernels and costs a pass over all memory.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    return RankContext(
        rank=rank,
        world_size=world_size,
        mesh=Mesh.build(training.parallel, device.type),
        device=device,
        accelerator=accelerator,
        stop=stop,
        scratch=scratch,
    )


def _leave() -> None:
    import torch.distributed as dist

    dist.barrier()  # torchrun ends every rank as soon as one has left with an error or a stop
    dist.destroy_process_group()


def _disk_problem(error: Exception, scratch: Path) -> UserError | None:
    """A full disk in words; safetensors hides the operating system's error number in its message."""
    if isinstance(error, OSError):
        return disk_error(error, scratch)
    found = re.search(r"os error (\d+)", str(error))
    return disk_error(OSError(int(found[1]), str(error)), scratch) if found else None


def _write_failure(files: RankFiles, rank: int, kind: str, message: str) -> None:
    record = {"rank": rank, "kind": kind, "message": message, "time": time.time()}
    try:
        _write(files.failure(rank), json.dumps(record))
    except OSError:  # a full disk takes this record too; the log then has to do
        logger.error("%s", message)


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    os.replace(temporary, path)
