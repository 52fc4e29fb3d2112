"""Checkpoints: model, optimizer, random state and the place in the data, committed by one rename.

    step-00000120/
        model-<rank>.safetensors       parts of parameters and persistent buffers by name; no frozen parameters
        optimizer-<rank>.safetensors   parts of "<parameter>/<state>" for each state tensor, scalars on rank 0
        random.safetensors             "<device type>.<rank>" generator states
        checkpoint.json                written last: step, tokens, digests and sizes of the files above, and which
                                       part of which tensor lies where

A rank writes the parts that no rank before it holds, and reads of the files just what overlaps its own parts, so a
checkpoint of one layout loads on any other. A folder is written under another name, its files are flushed to the
disk, and then it gets its name. One without a sound `checkpoint.json` is no checkpoint. The learning rate and the
data order are functions of the step.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from modelmill.components.core.errors import UserError
from modelmill.components.core.verified import file_digest
from modelmill.components.training.shards import (
    Box,
    StoredTensors,
    is_first_holder,
    local_box,
    local_part,
    open_tensors,
)

_MARKER = "checkpoint.json"
_FORMAT = 2
logger = logging.getLogger("modelmill")


@dataclass(frozen=True)
class Progress:
    """How far training is. A field that a checkpoint lacks keeps its default.

    Attributes:
        step: optimizer steps done, those whose update was skipped included.
        tokens: tokens seen in them.
        skipped_batches: batches that rollbacks left out.
        rollbacks: times the run went back to a checkpoint because it was unstable.
        stability: what the stability monitor remembers, as JSON values.
    """

    step: int = 0
    tokens: int = 0
    skipped_batches: int = 0
    rollbacks: int = 0
    stability: dict[str, Any] = field(default_factory=dict)

    @property
    def cursor(self) -> int:
        """The batch of the next step, counted from 0."""
        return self.step + self.skipped_batches


@runtime_checkable
class PortableOptimizer(Protocol):
    """An optimizer whose state tensors are not shaped like their parameters, as quantised moments are not.

    A checkpoint holds tensors that can be cut along any layout's boundaries. An optimizer that keeps its state in
    another form gives it out, and takes it back, as such tensors; one whose state tensors are scalars and tensors
    of the parameter's shape (plain, or distributed as the parameter is) needs neither method.
    """

    def portable_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """State of one parameter on this rank, {} before its first step.

        Returns:
            By a name without "/": scalars (the same on every rank, such as the step counter) and plain tensors of
            the shape of the rank's own part of the parameter (`shards.local_part(parameter)`; the rank's part may
            be empty), in a precision from which `load_portable_state` makes the same state again, bit for bit,
            when the part is the same.
        """

    def load_portable_state(self, parameter: nn.Parameter, state: dict[str, Tensor]) -> None:
        """Take the state of one parameter: the names, dtypes and shapes that `portable_state` gives on this layout.

        The tensors lie on the parameter's device, scalars on the CPU, and belong to the optimizer from here on.
        """


class Checkpoints:
    """The checkpoints of one training job. Every method is called by all ranks together."""

    def __init__(self, folder: Path, *, digest: str, keep: int, rank: int, world_size: int) -> None:
        """
        Args:
            folder: where they lie; a file system all ranks share.
            digest: of everything that decides the weights; a checkpoint of another digest is refused.
            keep: how many of the newest stay.
            rank: of this process.
            world_size: processes in the group.
        """
        self.folder, self.digest, self.keep = folder, digest, keep
        self.rank, self.world_size = rank, world_size

    def save(self, progress: Progress, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Write a checkpoint; on return it is complete on the disk, and older ones are pruned.

        Raises:
            OSError, safetensors.SafetensorError: it could not be written, on whichever rank; every rank raises, and
                nothing half written stays.
        """
        name = f"step-{progress.step:08d}"
        partial, final = self.folder / f".{name}.partial", self.folder / name
        generators = self._gather_generators()
        try:
            self._together(lambda: self._begin(partial))
            written = self._together(lambda: self._write(partial, model, optimizer, generators))
            self._together(lambda: self._commit(partial, final, progress, self._gather(written)))
        except BaseException:
            if self.rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
            raise
        if self.rank == 0:
            self._prune(final)

    def load_latest(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Progress:
        """Load the newest sound checkpoint; without one, do nothing and return the start.

        Corrupt and incomplete ones are skipped with a warning. The random state is restored on as many ranks as
        the checkpoint was written by.

        Raises:
            UserError: the newest sound checkpoint belongs to another configuration.
        """
        if (folder := self._newest()) is None:
            return Progress()
        marker = json.loads((folder / _MARKER).read_bytes())
        if marker["digest"] != self.digest:
            raise UserError(
                f"checkpoints: {folder} was written by another configuration; restore that one or remove {self.folder}"
            )
        with StoredTensors(folder, marker["tensors"]) as parts:
            _load_model(parts, model)
            _load_optimizer(parts, model, optimizer)
        self._load_generators(folder / "random.safetensors")
        return Progress(**{own.name: marker[own.name] for own in fields(Progress) if own.name in marker})

    def _begin(self, partial: Path) -> None:
        if self.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            for path in self.folder.glob(".*.partial"):
                shutil.rmtree(path)
            partial.mkdir()

    def _write(
        self, folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, generators: dict[str, Tensor]
    ) -> dict[str, Any]:
        """Write this rank's files; returns its entries of the marker."""
        files: dict[str, Any] = {}
        index: dict[str, Any] = {}
        for kind, entries in (("model", _model_parts(model)), ("optimizer", _optimizer_parts(model, optimizer))):
            path = folder / f"{kind}-{self.rank}.safetensors"
            mine: dict[str, Tensor] = {}
            for name, part, whole in entries:
                box = local_box(whole) if part.dim() else Box((), ())
                first = is_first_holder(whole, self.rank, self.world_size) if part.dim() else self.rank == 0
                if first and (box.volume or not whole.numel()):
                    mine[name] = part.contiguous()
                    index[f"{kind}/{name}"] = {
                        "dtype": str(part.dtype).removeprefix("torch."),
                        "shape": list(whole.shape) if part.dim() else [],
                        "parts": [{"file": path.name, "offset": box.offset, "size": box.size}],
                    }
            if mine:
                files[path.name] = _save(mine, path)
        if self.rank == 0:
            path = folder / "random.safetensors"
            files[path.name] = _save(generators, path)
        return {"files": files, "tensors": index}

    def _commit(self, partial: Path, final: Path, progress: Progress, written: list[dict[str, Any]]) -> None:
        if self.rank != 0:
            return
        files: dict[str, Any] = {}
        tensors: dict[str, Any] = {}
        for record in written:
            files |= record["files"]
            for name, entry in record["tensors"].items():
                tensors.setdefault(name, {**entry, "parts": []})["parts"] += entry["parts"]
        marker = {"format": _FORMAT, **asdict(progress), "digest": self.digest, "world_size": self.world_size}
        (partial / _MARKER).write_text(json.dumps({**marker, "files": files, "tensors": tensors}, indent=1))
        _flush(partial / _MARKER)
        _flush(partial)
        if final.exists():  # it was there and could not be read, or we would have started after it
            shutil.rmtree(final)
        os.rename(partial, final)
        _flush(self.folder)

    def _together(self, work: Callable[[], Any]) -> Any:
        """Do a part of the work on every rank; raise on all of them when it fails on one.

        A rank that raised alone would leave the others waiting for it.
        """
        result, failure = None, None
        try:
            result = work()
        except Exception as error:
            failure = error
        mine = failure and (getattr(failure, "errno", None), str(failure))
        every = self._all(mine)
        if failure is not None:
            raise failure
        for rank, told in enumerate(every):
            if told is not None:  # in the same words, so that every rank reports the same cause
                number, text = told
                raise OSError(number, f"rank {rank}: {text}") if number else RuntimeError(f"rank {rank}: {text}")
        return result

    def _all(self, mine: Any) -> list[Any]:
        """What every rank has, on every rank."""
        every = [mine]
        if self.world_size > 1:
            every = [None] * self.world_size
            dist.all_gather_object(every, mine)
        return every

    def _gather(self, mine: Any) -> list[Any]:
        """What every rank has, on rank 0; nothing on the others."""
        if self.world_size == 1:
            return [mine]
        every: list[Any] = [None] * self.world_size if self.rank == 0 else []
        dist.gather_object(mine, every if self.rank == 0 else None)
        return every

    def _steps(self) -> list[Path]:
        return sorted(self.folder.glob("step-*"))

    def _prune(self, newest: Path) -> None:
        steps = self._steps()
        last = steps.index(newest)
        # Later ones were found unsound, or this run would have started after them: they must not count as kept.
        for path in (*steps[: max(0, last + 1 - self.keep)], *steps[last + 1 :]):
            shutil.rmtree(path)

    def _newest(self) -> Path | None:
        """The newest sound checkpoint; the ranks share the reading of its files."""
        for name in reversed(self._all([path.name for path in self._steps()] if self.rank == 0 else [])[0]):
            folder = self.folder / name
            problems = self._all(_problem(folder, self.rank, self.world_size))
            if not any(problems):
                return folder
            if self.rank == 0:
                logger.warning("skipping checkpoint %s: %s", name, next(filter(None, problems)))
        return None

    def _gather_generators(self) -> dict[str, Tensor]:
        mine = {"cpu": torch.get_rng_state()}
        accelerator = torch.accelerator.current_accelerator()
        if accelerator is not None:
            mine[accelerator.type] = torch.get_device_module(accelerator.type).get_rng_state()
        every = self._gather(mine)
        return {f"{kind}.{rank}": state for rank, states in enumerate(every) for kind, state in states.items()}

    def _load_generators(self, path: Path) -> None:
        with open_tensors(path) as file:
            for name in file.keys():  # noqa: SIM118  (not a dict)
                kind, _, rank = name.partition(".")
                if int(rank) == self.rank:
                    state = file.get_tensor(name)
                    if kind == "cpu":
                        torch.set_rng_state(state)
                    else:
                        torch.get_device_module(kind).set_rng_state(state)


def _problem(folder: Path, rank: int, world_size: int) -> str | None:
    """What is wrong with a checkpoint folder, as far as this rank reads it, or None."""
    try:
        marker = json.loads((folder / _MARKER).read_bytes())
        if marker["format"] != _FORMAT:
            return f"format {marker['format']}, this version reads {_FORMAT}"
        for name, entry in sorted(marker["files"].items())[rank::world_size]:
            if (folder / name).stat().st_size != entry["bytes"] or file_digest(folder / name) != entry["sha256"]:
                return f"{name} is corrupt"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"incomplete ({type(error).__name__}: {error})"
    return None


def _model_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters that are trained (a tied one once) and persistent buffers by name."""
    persistent = model.state_dict(keep_vars=True)
    yield from ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)
    for name, buffer in model.named_buffers():
        if name in persistent:
            yield name, buffer


def _model_parts(model: nn.Module) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name, this rank's part, and the tensor that says where the part lies."""
    for name, tensor in _model_tensors(model):
        yield name, local_part(tensor), tensor


def _optimizer_parts(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor, Tensor]]:
    for name, parameter in model.named_parameters():
        if isinstance(optimizer, PortableOptimizer):
            state = optimizer.portable_state(parameter)
        else:
            state = {key: local_part(value) for key, value in optimizer.state.get(parameter, {}).items()}
        for key, value in state.items():
            if value.dim() and value.shape != local_part(parameter).shape:
                raise TypeError(f"{name}/{key} {tuple(value.shape)} is not shaped as its parameter: PortableOptimizer")
            yield f"{name}/{key}", value, parameter


@torch.no_grad()
def _load_model(parts: StoredTensors, model: nn.Module) -> None:
    targets = dict(_model_tensors(model))
    if differing := targets.keys() ^ set(parts.names("model")):
        raise KeyError(f"{parts.folder} and the model differ in {', '.join(sorted(differing))}")
    for name, tensor in targets.items():
        parts.fill(local_part(tensor), f"model/{name}", local_box(tensor))


def _load_optimizer(parts: StoredTensors, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    states: dict[str, dict[str, Tensor]] = {}
    parameters = dict(model.named_parameters())
    for name in parts.names("optimizer"):
        owner, _, key = name.rpartition("/")
        parameter, dtype = parameters[owner], parts.dtype(f"optimizer/{name}")
        scalar = parts.is_scalar(f"optimizer/{name}")
        value = torch.empty((), dtype=dtype) if scalar else torch.empty_like(local_part(parameter), dtype=dtype)
        parts.fill(value, f"optimizer/{name}", Box((), ()) if scalar else local_box(parameter))
        states.setdefault(owner, {})[key] = value
    for owner, state in states.items():
        parameter = parameters[owner]
        if isinstance(optimizer, PortableOptimizer):
            optimizer.load_portable_state(parameter, state)
        else:
            # AdamW keeps its step counters on the CPU unless fused or capturable; moments lie beside the parameter.
            device = parameter.device if optimizer.defaults.get("fused") else torch.device("cpu")
            for key, value in state.items():
                optimizer.state[parameter][key] = _like(parameter, value) if value.dim() else value.to(device)


def _like(parameter: Tensor, local: Tensor) -> Tensor:
    """A state tensor with this part, distributed as its parameter is."""
    if not isinstance(parameter, DTensor):
        return local
    mesh, placements = parameter.device_mesh, parameter.placements
    return DTensor.from_local(
        local, mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
    )


def _save(tensors: dict[str, Tensor], path: Path) -> dict[str, Any]:
    """Write a file through to the disk; returns its entry of the marker."""
    save_file(tensors, path)
    _flush(path)
    return {"bytes": path.stat().st_size, "sha256": file_digest(path)}


def _flush(path: Path) -> None:
    """Have the operating system write a file or a folder's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
