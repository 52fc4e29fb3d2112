"""Our training loop against the Hugging Face Trainer and a bare hand loop over `LlamaForCausalLM`.

    python -m tests.benchmarks.pretraining [--rounds 5] [--steps 16]

All three start from the same weights, read the same batches in the same order, and use AdamW (fused), the same
schedule, clipping at 1.0, fp32 and the same number of threads. First their losses over 50 steps are compared: a
comparison of speed means nothing between runs that compute different things. Then they run in turn, each time in a
process of its own; a ratio is taken within a round, and the median over rounds is reported.

Memory is tensor-level: the height of what torch's CPU allocator handed out, model and optimizer included, from the
profiler's allocation records of a few steps in a separate process. The growth of the process's resident memory is
shown beside it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from modelmill.components.llama.config import LlamaConfig
from modelmill.components.training.config import TrainingConfig

if TYPE_CHECKING:
    import torch

PEERS = ("ours", "hf_trainer", "bare_loop")
BATCH, LENGTH, TOLERANCE = 4, 512, 1e-5
WARM_UP, CHECKED_STEPS, MEASURED_STEPS = 3, 50, 6
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


# What runs in a process of its own ------------------------------------------------------------------------------


class Records:
    """Losses, and the time after each optimizer step, taken in the same way from every peer."""

    def __init__(self, keep_losses: bool) -> None:
        self.stamps: list[float] = []
        self.losses: list[float] = []
        self.keep_losses = keep_losses

    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        optimizer.register_step_post_hook(lambda *_: self.stamps.append(time.perf_counter()))

    def loss(self, value: torch.Tensor) -> None:
        if self.keep_losses:
            self.losses.append(value.item())

    def tokens_per_second(self) -> float:
        timed = len(self.stamps) - WARM_UP
        return timed * BATCH * LENGTH / (self.stamps[-1] - self.stamps[WARM_UP - 1])


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
            ranks=RankContext(0, 1, 0, 1, torch.device("cpu"), CPU(), StopSignal(1), scratch),
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
        kind = Recording if records.keep_losses else Trainer
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


def worker(peer: str, mode: str, folder: Path, steps: int) -> dict[str, Any]:
    """Run one peer in this process: `check` for losses, `time` for speed and resident memory, `memory` for tensors."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    run = RUNNERS[peer]
    records = Records(keep_losses=mode == "check")
    if mode == "memory":
        return {"tensor_bytes": allocated_height(lambda: run(folder, steps, records))}
    from transformers import LlamaForCausalLM, Trainer  # noqa: F401  (their import is not the run's memory)

    before = resident_bytes()
    run(folder, steps, records)
    if mode == "check":
        return {"losses": records.losses}
    # Linux counts in KiB, macOS in bytes.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {
        "tokens_per_second": records.tokens_per_second(),
        "resident_bytes": peak - before,
        "threads": torch.get_num_threads(),
    }


# The comparison -------------------------------------------------------------------------------------------------


def measure(peer: str, mode: str, folder: Path, steps: int, threads: int) -> dict[str, Any]:
    """Run one peer in a process of its own and read its last line."""
    command = [sys.executable, "-m", "tests.benchmarks.pretraining", "--worker", peer, mode, str(folder)]
    threads_of = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    environment = {**os.environ, **threads_of, "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [*command, "--steps", str(steps)], capture_output=True, text=True, env=environment, check=False
    )
    if done.returncode:
        raise SystemExit(f"{done.stderr}\n{peer} ({mode}) failed with exit code {done.returncode}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def prepare(folder: Path, steps: int) -> None:
    """Write the first weights as a Hugging Face folder, and batches of text-like statistics."""
    from modelmill.components.llama.huggingface import export_huggingface
    from modelmill.components.llama.model import LlamaDecoder

    export_huggingface(LlamaDecoder(MODEL, seed=1), folder / "model")
    generator = np.random.default_rng(1)
    shape = (steps, BATCH, LENGTH + 1)
    # Zipf's law over the vocabulary, and every third token follows from the one before: something to learn.
    tokens = np.minimum(generator.zipf(1.2, shape), MODEL.known_vocab_size) - 1
    tokens[..., 2::3] = (tokens[..., 1::3][..., : tokens[..., 2::3].shape[-1]] * 7 + 3) % MODEL.known_vocab_size
    np.save(folder / "rows.npy", tokens)


def largest_loss_difference(folder: Path, threads: int) -> float:
    """Largest relative difference of our loss to a peer's at any checked step; a large one ends the program."""
    losses = {peer: measure(peer, "check", folder, CHECKED_STEPS, threads)["losses"] for peer in PEERS}
    assert all(len(values) == CHECKED_STEPS for values in losses.values()), losses
    differences = {
        peer: max(abs(a - b) / b for a, b in zip(losses["ours"], losses[peer], strict=True)) for peer in PEERS[1:]
    }
    print(f"losses over {CHECKED_STEPS} steps: {losses['ours'][0]:.5f} -> {losses['ours'][-1]:.5f}; largest relative")
    print("difference " + ", ".join(f"to {peer} {value:.1e}" for peer, value in differences.items()), flush=True)
    worst = max(differences.values())
    if not worst <= TOLERANCE:
        raise SystemExit(
            f"the losses differ by {worst:.1e}, more than {TOLERANCE:g}: these are different computations"
        )
    return worst


def rounds(folder: Path, number: int, steps: int, threads: int) -> Iterator[dict[str, dict[str, Any]]]:
    """Every peer once a round, the order turning so that none is always the first."""
    for index in range(number):
        order = [*PEERS[index % 3 :], *PEERS[: index % 3]]
        found = {peer: measure(peer, "time", folder, steps, threads) for peer in order}
        speeds = ", ".join(f"{peer} {found[peer]['tokens_per_second']:,.0f}" for peer in PEERS)
        print(f"round {index + 1}: tokens/s {speeds}", flush=True)
        yield found


def compare(number: int, steps: int, threads: int) -> dict[str, float]:
    """Run the whole comparison and print its table."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, max(steps, CHECKED_STEPS))
        difference = largest_loss_difference(folder, threads)
        heights = {peer: measure(peer, "memory", folder, MEASURED_STEPS, threads)["tensor_bytes"] for peer in PEERS}
        found = list(rounds(folder, number, steps, threads))
    print(
        f"\n{'':<12}{'tokens/s':>10}{'tensors MiB':>13}{'resident MiB':>14}{'ours / it':>11}{'  spread over rounds'}"
    )
    ratios: dict[str, float] = {}
    for peer in PEERS:
        speed = statistics.median(one[peer]["tokens_per_second"] for one in found)
        resident = statistics.median(one[peer]["resident_bytes"] for one in found) / 2**20
        pairs = [one["ours"]["tokens_per_second"] / one[peer]["tokens_per_second"] for one in found]
        ratios[peer] = statistics.median(pairs)
        spread = f"  {min(pairs):.3f} to {max(pairs):.3f}" if peer != "ours" else ""
        row = f"{peer:<12}{speed:>10,.0f}{heights[peer] / 2**20:>13,.0f}{resident:>14,.0f}{ratios[peer]:>11.3f}"
        print(row + spread)
    return {
        "vs_hf_trainer": round(ratios["hf_trainer"], 4),
        "vs_bare_loop": round(ratios["bare_loop"], 4),
        "peak_memory_vs_hf": round(heights["ours"] / heights["hf_trainer"], 4),
        "max_loss_difference": float(f"{difference:.3g}"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="times every peer is timed (default 5)")
    parser.add_argument("--steps", type=int, default=16, help=f"steps of a timed run, {WARM_UP} of them warm-up")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads (default: all cores)")
    parser.add_argument("--worker", nargs=3, metavar=("PEER", "MODE", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        peer, mode, folder = options.worker
        print(json.dumps(worker(peer, mode, Path(folder), options.steps)))
        return
    if options.steps <= WARM_UP or options.rounds < 1:
        parser.error(f"--steps must be more than the {WARM_UP} of warm-up and --rounds at least 1")
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "accelerate"))
    print(f"Python {platform.python_version()}, {libraries}; {options.threads} threads, fp32")
    parameters = MODEL.num_parameters()
    print(f"Llama of {parameters / 1e6:.1f}M parameters, vocabulary {MODEL.vocab_size}, batch {BATCH} x {LENGTH}")
    print(f"a loss of ln V would be {math.log(MODEL.known_vocab_size):.2f}", flush=True)
    print(json.dumps(compare(options.rounds, options.steps, options.threads)))


if __name__ == "__main__":
    main()
