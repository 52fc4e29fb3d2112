"""The runs that the pretraining benchmark compares, each in a process of its own.

    python -m tests.benchmarks._pretraining_peers PEER MODE FOLDER STEPS

PEER is `ours`, `hf_trainer` or `bare_loop`; MODE is `check` (the losses of all steps), `memory` (the height of what
torch's CPU allocator handed out) or `turns` (one step a line of input, answered with its seconds).
"""

from __future__ import annotations

import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from modelmill.components.llama.config import LlamaConfig
from modelmill.components.training.config import TrainingConfig

if TYPE_CHECKING:
    import torch

PEERS = ("ours", "hf_trainer", "bare_loop")
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


class Turns:
    """Makes a training run wait for its turn after every optimizer step; the same hook serves every peer.

    A turn is everything from one update of the weights to the next: fetching data, logging, all of it.
    """

    def __init__(self, steps: int) -> None:
        self.left = steps
        self.began: float | None = None
        # Libraries print to stdout as they like; the turns are spoken on a descriptor of their own.
        self.out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        optimizer.register_step_post_hook(lambda *_: self._step_done())

    def loss(self, value: torch.Tensor) -> None:
        """Losses are compared in a run of their own."""

    def say(self, value: Any) -> None:
        print(json.dumps(value), file=self.out, flush=True)

    def _step_done(self) -> None:
        self.say(None if self.began is None else time.perf_counter() - self.began)
        self.left -= 1
        if self.left:
            sys.stdin.readline()
        self.began = time.perf_counter()


class Losses:
    """Keeps the loss of every step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        """Nothing to do after a step."""

    def loss(self, value: torch.Tensor) -> None:
        self.values.append(value.item())


Records = Turns | Losses


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


def allocated_height(run: Callable[[], None]) -> int:
    """Largest number of bytes torch's CPU allocator had handed out at once while `run` ran."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    held = height = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            height = max(height, held)
    return height


def resident_bytes() -> int:
    import psutil

    return psutil.Process().memory_info().rss


def worker(peer: str, mode: str, folder: Path, steps: int) -> None:
    """Run one peer in this process: `check` for losses, `turns` for speed, `memory` for tensors."""
    import transformers
    from transformers import LlamaForCausalLM, Trainer  # noqa: F401  (their import is not the run's memory)

    transformers.logging.set_verbosity_error()
    if mode == "check":
        losses = Losses()
        RUNNERS[peer](folder, steps, losses)
        print(json.dumps(losses.values))
    elif mode == "memory":
        print(json.dumps(allocated_height(lambda: RUNNERS[peer](folder, steps, Losses()))))
    else:
        turns, before = Turns(steps), resident_bytes()
        RUNNERS[peer](folder, steps, turns)
        # Linux counts in KiB, macOS in bytes.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        turns.say(peak - before)


if __name__ == "__main__":
    worker(sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]))
