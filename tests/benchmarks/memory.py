"""Memory and time of the chunked head against full logits, and of the activation memory modes against none.

    python -m tests.benchmarks.memory [--rounds 5]

Peaks are counted where torch hands out memory, to the byte (`memory_tracker`), never by the size of the process: of
the head the most that its forward and backward pass held at once beside weights and hidden states, of a mode the
same for a whole step of a decoder, gradients included. First the results are compared: loss and gradients of both
heads in float32, and of every mode bit by bit. Then everything is timed in turns, round by round; medians are
reported, with the smallest and largest ratio of a round as the spread.

The decoder computes in bf16-mixed, as it would on an accelerator. In fp32 on a CPU its hand-written gradients keep as
little by themselves as `selective` does (`--precision fp32` shows it).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from modelmill.components.llama.activation_sweep import measure
from modelmill.components.llama.config import LlamaConfig
from modelmill.components.llama.sweep_config import ActivationSweepConfig, SweepConfig
from modelmill.components.training.loss import linear_cross_entropy
from modelmill.components.training.memory_tracker import track

TOKENS, HIDDEN, VOCAB = 2048, 256, 32000
BATCH, LENGTH = 4, 512
MODEL = LlamaConfig(
    vocab_size=4096,
    hidden_size=256,
    intermediate_size=768,
    num_layers=6,
    num_heads=8,
    num_kv_heads=4,
    max_sequence_length=LENGTH,
)
MODES: tuple[Any, ...] = ("none", "selective", "selective_matmul", {"every_n_layers": 2}, "full")
_MIB = 2**20


def full_logits(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight), targets)


class Head:
    """A head with its inputs: N tokens of D dimensions and V vocabulary entries."""

    def __init__(self, loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        generator = torch.Generator().manual_seed(1)
        self.loss = loss
        self.hidden = torch.randn(TOKENS, HIDDEN, generator=generator).requires_grad_()
        self.weight = (torch.randn(VOCAB, HIDDEN, generator=generator) / 16).requires_grad_()
        self.targets = torch.randint(VOCAB, (TOKENS,), generator=generator)

    def step(self) -> Tensor:
        self.hidden.grad = self.weight.grad = None
        loss = self.loss(self.hidden, self.weight, self.targets)
        loss.backward()
        return loss.detach()

    def seconds(self) -> float:
        began = time.perf_counter()
        self.step()
        return time.perf_counter() - began

    def peak(self) -> int:
        self.hidden.grad = self.weight.grad = None
        with track() as use:
            self.step()
        return use.peak


def compare_heads(rounds: int) -> float:
    """Peak of the chunked head as a part of the peak with full logits; prints both with their times."""
    heads = {"chunked": Head(linear_cross_entropy), "full logits": Head(full_logits)}
    losses = [head.step() for head in heads.values()]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0)
    chunked, full = heads.values()
    for name in ("hidden", "weight"):
        torch.testing.assert_close(getattr(chunked, name).grad, getattr(full, name).grad, rtol=1e-4, atol=1e-8)
    peaks = {name: head.peak() for name, head in heads.items()}
    times: dict[str, list[float]] = {name: [] for name in heads}
    for turn in range(rounds):
        for name in sorted(heads, reverse=bool(turn % 2)):
            times[name].append(heads[name].seconds())
    print(f"\nhead and loss, forward and backward, {TOKENS} tokens x {HIDDEN}, vocabulary {VOCAB}, fp32; same results")
    print(f"{'':<18}{'peak MiB':>10}{'/ full':>9}{'ms':>9}{'/ full':>9}  spread of the rounds")
    for name in heads:
        print(_row(name, peaks[name], peaks["full logits"], times[name], times["full logits"]))
    return peaks["chunked"] / peaks["full logits"]


def compare_modes(rounds: int, precision: str, threads: int) -> dict[str, float]:
    """Ratios of the modes to none; prints the table."""
    sweep = SweepConfig.model_validate(
        {
            "modes": MODES,
            "sequence_length": LENGTH,
            "micro_batch_size": BATCH,
            "precision": precision,
            "repeats": rounds,
            "accelerator": "cpu",
            "threads": threads,
        }
    )
    rows = {row["mode"]: row for row in measure(ActivationSweepConfig(model=MODEL, sweep=sweep))}
    none = rows["none"]
    print(f"\nstep of a Llama of {MODEL.num_parameters() / 1e6:.1f}M parameters, {MODEL.num_layers} layers,", end=" ")
    print(f"batch {BATCH} x {LENGTH}, {precision}; same gradients")
    print(f"{'':<18}{'peak MiB':>10}{'/ none':>9}{'ms':>9}{'/ none':>9}  spread of the rounds; saved MiB, again GFLOP")
    for name, row in rows.items():
        again = f"{row['saved_bytes'] / _MIB:.0f}, {row['recomputed_flops'] / 1e9:.1f}"
        times = (row["all_step_seconds"], none["all_step_seconds"])
        print(f"{_row(name, row['peak_bytes'], none['peak_bytes'], *times)}; {again}")
    selective = rows["selective"]
    return {
        "full_vs_none_memory": rows["full"]["peak_bytes"] / none["peak_bytes"],
        "selective_vs_none_memory": selective["peak_bytes"] / none["peak_bytes"],
        "selective_vs_none_time": statistics.median(_ratios(selective["all_step_seconds"], none["all_step_seconds"])),
    }


def _ratios(times: list[float], base: list[float]) -> list[float]:
    return [mine / theirs for mine, theirs in zip(times, base, strict=True)]


def _row(name: str, peak: int, base_peak: int, times: list[float], base_times: list[float]) -> str:
    ratios = _ratios(times, base_times)
    sizes = f"{peak / _MIB:>10,.1f}{peak / base_peak:>9.3f}"
    speeds = f"{statistics.median(times) * 1e3:>9,.1f}{statistics.median(ratios):>9.3f}"
    return f"{name:<18}{sizes}{speeds}  {min(ratios):.3f} to {max(ratios):.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="times everything is timed (default 5)")
    parser.add_argument("--precision", choices=("bf16-mixed", "fp32"), default="bf16-mixed", help="of the decoder")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads (default: all cores)")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    torch.set_num_threads(options.threads)
    print(f"Python {platform.python_version()}, torch {version('torch')}; {options.threads} threads")
    print(f"load average {os.getloadavg()[0]:.1f}: above 0.5, other processes disturb the times", flush=True)
    figures = {"head_peak_ratio": compare_heads(options.rounds)}
    figures |= compare_modes(options.rounds, options.precision, options.threads)
    print(json.dumps({name: round(value, 4) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
