"""Log-probabilities of the reference: computed once by all ranks before training, and kept beside the checkpoints."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from modelmill.components.core import events
from modelmill.components.data.preference_rows import PreferenceRows
from modelmill.components.finetuning.dpo_objective import PreferenceModel, pack_pairs
from modelmill.components.training.config import TrainingConfig
from modelmill.components.training.precision import autocast
from modelmill.components.training.worker import RankContext


def reference_log_probs(
    model: PreferenceModel,
    splits: Sequence[tuple[PreferenceRows, np.ndarray]],
    ranks: RankContext,
    training: TrainingConfig,
    key: str,
) -> Tensor:
    """Log-probabilities of pairs under the model as it is, read from an earlier attempt's file where there is one.

    Called by all ranks together, before training changes anything: adapters begin as nothing, so the model is the
    base, and no second one is needed. Each rank computes its share.

    Args:
        model: laid out, on its device.
        splits: rows, and numbers of the pairs that are needed.
        ranks: who this rank is; its scratch folder keeps `reference-<key>.npy`.
        training: precision, and pairs that fit in one forward pass.
        key: hex digest of everything that the numbers depend on.

    Returns:
        float64 [pairs of all splits, 2] on the rank's device; nan for pairs that are not needed.
    """
    path = ranks.scratch / f"reference-{key[:16]}.npy"
    shape = (sum(len(rows) for rows, _ in splits), 2)
    table = torch.zeros(shape, dtype=torch.float64, device=ranks.device)
    known = torch.tensor(0, device=ranks.device)
    if ranks.is_main and (kept := _read(path, shape)) is not None:
        known.fill_(1)
        table.copy_(torch.from_numpy(kept))
    if ranks.world_size > 1:
        dist.broadcast(known, 0)
    if known.item():
        if ranks.world_size > 1:
            dist.broadcast(table, 0)
        return table
    first, needed = 0, np.zeros(shape[0], bool)
    for rows, numbers in splits:
        _compute(model, rows, numbers, first, table, ranks, training)
        needed[first + numbers] = True
        first += len(rows)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # the root keeps what it gathered until a backward pass, which there was none of
    if ranks.world_size > 1:
        dist.all_reduce(table)
    table[torch.from_numpy(~needed).to(ranks.device)] = torch.nan
    if ranks.is_main:
        _write(path, table.cpu().numpy())
    return table


@torch.no_grad()
def _compute(
    model: PreferenceModel,
    rows: PreferenceRows,
    numbers: np.ndarray,
    first: int,
    table: Tensor,
    ranks: RankContext,
    training: TrainingConfig,
) -> None:
    """Put this rank's share of a split into the table, the longest pairs first."""
    if not len(numbers):
        return
    order = numbers[np.argsort(-rows.sizes[numbers].max(1), kind="stable")]
    mine, size = order[ranks.data_rank :: ranks.data_degree], training.micro_batch_size
    was_training = model.training
    model.eval()
    # As many forward passes on every rank, since a sharded model gathers its weights in each.
    for start in range(0, -(-len(order) // ranks.data_degree), size):
        part = mine[start : start + size]
        pairs = part if len(part) else order[:1]
        packed = torch.from_numpy(pack_pairs(rows, pairs, rows.width(pairs))).to(ranks.device)
        with autocast(training.precision, ranks.device.type):
            found = model(packed)
        if len(part):
            table[torch.from_numpy(first + part).to(ranks.device)] = found.double()
        events.progress("reference log-probabilities", start * ranks.data_degree, len(order))
    model.train(was_training)


def _read(path: Path, shape: tuple[int, int]) -> np.ndarray | None:
    """What an earlier attempt left, or None."""
    try:
        table = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return table if table.shape == shape and table.dtype == np.float64 else None


def _write(path: Path, table: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("wb") as file:
        np.save(file, table)
    os.replace(temporary, path)
