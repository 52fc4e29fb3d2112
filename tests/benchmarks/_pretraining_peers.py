"""The runs that the pretraining benchmark compares, each in a process of its own.

    python -m tests.benchmarks._pretraining_peers PEER MODE FOLDER STEPS

PEER is `ours`, `hf_trainer` or `bare_loop`; MODE is one of `_turns.measure`.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from modelmill.components.llama.config import LlamaConfig
from modelmill.components.training.config import TrainingConfig
from tests.benchmarks._turns import Losses, Records, measure

if TYPE_CHECKING:
    import torch

BATCH, LENGTH = 4, 512
MODEL = LlamaConfig(
    vocab_size=8192,
    hidden_size=256,
    intermediate_size=768,
    num_layers=6,
    num_heads=8,
    num_kv_heads=4,
    max_sequence_length=LENGTH,
)


def training_config(steps: int) -> TrainingConfig:
    """The same for all three: the peers take the numbers from here."""
    return TrainingConfig.model_validate(
        {
            "steps": steps,
            "global_batch_size": BATCH,
            "micro_batch_size": BATCH,
            "parallel": {"processes_per_node": 1},
            "learning_rate": 1e-3,
            "min_learning_rate": 1e-4,
            "warmup_steps": 5,
            "log_every": 10,
            "validate_every": None,
            "validation_rows": 0,
            "checkpoint_every": None,
            "accelerator": "cpu",
        }
    )


class FixedBatches:
    """The benchmark's batches, int64 [steps, B, T + 1], as the engine reads batches."""

    def __init__(self, rows: np.ndarray) -> None:
        self.rows = rows

    def batch(self, step: int, rank: int, world: int) -> np.ndarray:
        share = BATCH // world
        return np.array(self.rows[step, rank * share : (rank + 1) * share])


def run_ours(folder: Path, steps: int, records: Records) -> None:
    import torch
    from torch import Tensor, nn

    from modelmill.components.llama.huggingface import load_huggingface
    from modelmill.components.llama.pretrain import next_token_loss
    from modelmill.components.training.accelerator import CPU
    from modelmill.components.training.checkpoint import Checkpoints
    from modelmill.components.training.journal import Journal
    from modelmill.components.training.loop import TrainingData, TrainingLoop
    from modelmill.components.training.mesh import Mesh
    from modelmill.components.training.worker import RankContext, StopSignal

    torch.use_deterministic_algorithms(True)  # as the engine runs; the peers run as they come
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]

    def objective(model: nn.Module, rows: Tensor) -> Tensor:
        loss = next_token_loss(model, rows)
        records.loss(loss)
        return loss

    rows = np.load(folder / "rows.npy", mmap_mode="r")
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        loop = TrainingLoop(
            model=load_huggingface(folder / "model"),
            objective=objective,
            data=TrainingData(FixedBatches(rows), np.empty((0, LENGTH + 1), np.int64)),
            config=training_config(steps),
            ranks=RankContext(0, 1, Mesh(), torch.device("cpu"), CPU(), StopSignal(1), scratch),
            checkpoints=Checkpoints(scratch / "checkpoints", digest="", keep=1, rank=0, world_size=1),
            journal=Journal(scratch / "history.jsonl", steps, enabled=True),
        )
        records.watch(loop.optimizer)
        loop.run()


def hf_parts(folder: Path, steps: int) -> tuple[Any, torch.optim.Optimizer, Any, np.ndarray]:
    """The peers' model, optimizer, schedule and batches."""
    import torch
    from transformers import LlamaForCausalLM

    from modelmill.components.training.optimizer import make_optimizer
    from modelmill.components.training.schedule import learning_rate

    config = training_config(steps)
    model = LlamaForCausalLM.from_pretrained(folder / "model", use_cache=False)
    optimizer = make_optimizer(model, config)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate(step, config) / config.learning_rate
    )
    return model, optimizer, scheduler, np.load(folder / "rows.npy", mmap_mode="r")


def run_bare_loop(folder: Path, steps: int, records: Records) -> None:
    import torch

    model, optimizer, scheduler, batches = hf_parts(folder, steps)
    records.watch(optimizer)
    model.train()
    for step in range(steps):
        rows = torch.from_numpy(np.array(batches[step]))
        targets = rows[:, 1:]
        loss = model(input_ids=rows[:, :-1], labels=targets, shift_labels=targets.contiguous()).loss
        records.loss(loss)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()


def run_hf_trainer(folder: Path, steps: int, records: Records) -> None:
    import torch
    from transformers import Trainer, TrainingArguments

    model, optimizer, scheduler, batches = hf_parts(folder, steps)
    records.watch(optimizer)

    class Rows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
        def __len__(self) -> int:
            return steps * BATCH

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            row = torch.from_numpy(np.array(batches[index // BATCH, index % BATCH]))
            return {"input_ids": row[:-1], "labels": row[1:], "shift_labels": row[1:]}

    class Recording(Trainer):
        def compute_loss(self, *arguments: Any, **options: Any) -> Any:
            loss = super().compute_loss(*arguments, **options)
            records.loss(loss)
            return loss

    with tempfile.TemporaryDirectory() as name:
        arguments = TrainingArguments(
            output_dir=name,
            max_steps=steps,
            per_device_train_batch_size=BATCH,
            max_grad_norm=1.0,
            logging_steps=10,
            train_sampling_strategy="sequential",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
            remove_unused_columns=False,
        )
        kind = Recording if isinstance(records, Losses) else Trainer
        kind(model=model, args=arguments, train_dataset=Rows(), optimizers=(optimizer, scheduler)).train()


RUNNERS: dict[str, Callable[[Path, int, Records], None]] = {
    "ours": run_ours,
    "hf_trainer": run_hf_trainer,
    "bare_loop": run_bare_loop,
}


def worker(peer: str, mode: str, folder: Path, steps: int) -> None:
    """Run one peer in this process."""
    import transformers
    from transformers import LlamaForCausalLM, Trainer  # noqa: F401  (their import is not the run's memory)

    transformers.logging.set_verbosity_error()
    measure(RUNNERS[peer], mode, folder, steps)


if __name__ == "__main__":
    worker(sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]))
