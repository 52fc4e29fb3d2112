"""Checkpoints: model, optimizer, random state and the place in the data, committed by one rename.

    step-00000120/
        model.safetensors       parameters and persistent buffers by name
        optimizer.safetensors   "<parameter>/<state>" for each state tensor
        random.safetensors      "<device type>.<rank>" generator states
        checkpoint.json         written last: step, tokens, digests and sizes of the files above

A folder is written under another name, its files are flushed to the disk, and then it gets its name. One without a
sound `checkpoint.json` is no checkpoint. The learning rate and the data order are functions of the step.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from modelmill.components.core.errors import UserError
from modelmill.components.core.manifest import file_digest

_MARKER = "checkpoint.json"
_FORMAT = 1
logger = logging.getLogger("modelmill")


@dataclass(frozen=True)
class Progress:
    """How far training is: optimizer steps done and tokens seen."""

    step: int = 0
    tokens: int = 0


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
            OSError, safetensors.SafetensorError: it could not be written; nothing half written stays.
        """
        generators = self._gather_generators()
        if self.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._sweep()
            name = f"step-{progress.step:08d}"
            partial = self.folder / f".{name}.partial"
            partial.mkdir()
            try:
                self._write(partial, progress, model, optimizer, generators)
                final = self.folder / name
                if final.exists():  # it was there and could not be read, or we would have started after it
                    shutil.rmtree(final)
                os.rename(partial, final)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
            _flush(self.folder)
            self._prune(final)

    def load_latest(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Progress:
        """Load the newest sound checkpoint; without one, do nothing and return the start.

        Corrupt and incomplete ones are skipped with a warning. The random state is restored on as many ranks as
        the checkpoint was written by.

        Raises:
            UserError: the newest sound checkpoint belongs to another configuration.
        """
        chosen: list[Path | None] = [self._newest() if self.rank == 0 else None]
        if self.world_size > 1:
            dist.broadcast_object_list(chosen)
        if (folder := chosen[0]) is None:
            return Progress()
        marker = json.loads((folder / _MARKER).read_bytes())
        if marker["digest"] != self.digest:
            raise UserError(
                f"checkpoints: {folder} was written by another configuration; restore that one or remove {self.folder}"
            )
        _load_model(folder / "model.safetensors", model)
        _load_optimizer(folder / "optimizer.safetensors", model, optimizer)
        self._load_generators(folder / "random.safetensors")
        return Progress(marker["step"], marker["tokens"])

    def _write(
        self,
        folder: Path,
        progress: Progress,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        generators: dict[str, Tensor],
    ) -> None:
        parts = {"model": dict(_model_tensors(model)), "optimizer": dict(_optimizer_tensors(model, optimizer))}
        files = {}
        for name, tensors in {**parts, "random": generators}.items():
            path = folder / f"{name}.safetensors"
            save_file({key: tensor.detach().contiguous() for key, tensor in tensors.items()}, path)
            _flush(path)
            files[path.name] = {"bytes": path.stat().st_size, "sha256": file_digest(path)}
        marker = {"format": _FORMAT, "step": progress.step, "tokens": progress.tokens, "digest": self.digest}
        marker |= {"world_size": self.world_size, "files": files}
        (folder / _MARKER).write_text(json.dumps(marker, indent=1))
        _flush(folder / _MARKER)
        _flush(folder)

    def _steps(self) -> list[Path]:
        return sorted(self.folder.glob("step-*"))

    def _sweep(self) -> None:
        for path in self.folder.glob(".*.partial"):
            shutil.rmtree(path)

    def _prune(self, newest: Path) -> None:
        steps = self._steps()
        last = steps.index(newest)
        # Later ones were found unsound, or this run would have started after them: they must not count as kept.
        for path in (*steps[: max(0, last + 1 - self.keep)], *steps[last + 1 :]):
            shutil.rmtree(path)

    def _newest(self) -> Path | None:
        for folder in reversed(self._steps()):
            if problem := _problem(folder):
                logger.warning("skipping checkpoint %s: %s", folder.name, problem)
            else:
                return folder
        return None

    def _gather_generators(self) -> dict[str, Tensor]:
        mine = {"cpu": torch.get_rng_state()}
        accelerator = torch.accelerator.current_accelerator()
        if accelerator is not None:
            mine[accelerator.type] = torch.get_device_module(accelerator.type).get_rng_state()
        every: list[Any] = [mine]
        if self.world_size > 1:
            every = [None] * self.world_size if self.rank == 0 else []
            dist.gather_object(mine, every if self.rank == 0 else None)
        return {f"{kind}.{rank}": state for rank, states in enumerate(every) for kind, state in states.items()}

    def _load_generators(self, path: Path) -> None:
        for name, state in _read(path):
            kind, _, rank = name.partition(".")
            if int(rank) == self.rank:
                if kind == "cpu":
                    torch.set_rng_state(state)
                else:
                    torch.get_device_module(kind).set_rng_state(state)


def _problem(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None."""
    try:
        marker = json.loads((folder / _MARKER).read_bytes())
        if marker["format"] != _FORMAT:
            return f"format {marker['format']}, this version reads {_FORMAT}"
        for name, entry in marker["files"].items():
            if (folder / name).stat().st_size != entry["bytes"] or file_digest(folder / name) != entry["sha256"]:
                return f"{name} is corrupt"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"incomplete ({type(error).__name__}: {error})"
    return None


def _model_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters (a tied one once) and persistent buffers by name."""
    persistent = model.state_dict(keep_vars=True)
    yield from model.named_parameters()
    for name, buffer in model.named_buffers():
        if name in persistent:
            yield name, buffer


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            yield f"{name}/{key}", value


@torch.no_grad()
def _load_model(path: Path, model: nn.Module) -> None:
    targets = dict(_model_tensors(model))
    for name, tensor in _read(path):
        targets.pop(name).copy_(tensor)
    if targets:
        raise KeyError(f"{path} lacks {', '.join(targets)}")


def _load_optimizer(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    parameters = dict(model.named_parameters())
    for name, tensor in _read(path):
        parameter, _, key = name.rpartition("/")
        owner = parameters[parameter]
        # AdamW keeps its step counters on the CPU unless fused or capturable; moments lie beside the parameter.
        counter = tensor.dim() == 0 and not optimizer.defaults.get("fused")
        optimizer.state[owner][key] = tensor if counter else tensor.to(owner.device)


def _read(path: Path) -> Iterator[tuple[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  (not a dict)
                yield name, file.get_tensor(name)
    except SafetensorError as error:
        raise RuntimeError(f"{path}: {error}") from error


def _flush(path: Path) -> None:
    """Have the operating system write a file or a folder's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
