"""LoRA fine-tuning on our loop against TRL's `SFTTrainer` with peft: padded, as it comes, and with its bfd packing.

    python -m tests.benchmarks.finetuning [--rounds 5] [--steps 12]

All learn the same prepared questions and answers about installed packages (answers only; `_finetuning_data` says how
their lengths vary), from the same weights and the same first adapter, with AdamW (fused), the same schedule, clipping
at 1.0, fp32 and the same number of threads. A step holds 8 padded conversations, TRL's default, or 2 packed rows of
512 tokens, which is about the same. With packing TRL runs twice, with the rows of a step side by side and one after
the other, and the faster one counts: which that is depends on the machine's attention. TRL's default recomputation of
activations is off: ours does not recompute here either, and it would cost TRL a forward pass more.

First the losses are compared: each of TRL's runs writes down which conversations it learnt in which step, and a run of
ours learns the same ones in the same steps, packed by us. A comparison of speed means nothing between runs that
compute different things. Then ours learns from the rows as `prepare_instructions` packed them; every peer starts in a
process of its own and they take turns step by step, so that whatever else the machine does hits all alike. Counted
are real tokens, prompts and answers without padding. Where the conversations of a step differ, so do its tokens; the
speed of a round is therefore its tokens over its seconds, and its ratio ours over that of a peer. The median of the
rounds is reported, with the least and the largest.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from tests.benchmarks._finetuning_data import SIZES, describe, prepare
from tests.benchmarks._finetuning_peers import ADAPTER, CONVERSATIONS, ROW, ROWS
from tests.benchmarks._rounds import measure, one_round

WARM_UP, CHECKED_STEPS, TOLERANCE = 3, 12, 1e-5
PEERS = ("ours", "trl_padded", "trl_bfd", "trl_bfd_by_row")


def command(peer: str) -> list[str]:
    """How a peer is started."""
    return [sys.executable, "-m", "tests.benchmarks._finetuning_peers", peer]


def loss_difference(peer: str, folder: Path, threads: int) -> float:
    """Relative difference of our loss to a peer's after the last checked step; a large one at any ends the program."""
    theirs = measure(command(peer), "check", folder, CHECKED_STEPS, threads)
    sums = measure(command(f"ours_as_{peer}"), "check", folder, CHECKED_STEPS, threads)
    learnt = json.loads((folder / f"{peer}.conversations.json").read_bytes())
    counts = [sum(label >= 0 for _, labels in step for label in labels) for step in learnt]
    assert len(sums) == len(theirs) == len(counts) == CHECKED_STEPS, (len(sums), len(theirs))
    ours = [total / count for total, count in zip(sums, counts, strict=True)]
    differences = [abs(a - b) / b for a, b in zip(ours, theirs, strict=True)]
    print(f"{peer}, the same conversations in each of {CHECKED_STEPS} steps: loss {ours[0]:.5f} -> {ours[-1]:.5f},")
    print(f"relative difference {differences[-1]:.1e} at the last, {max(differences):.1e} at most", flush=True)
    if not max(differences) <= TOLERANCE:
        raise SystemExit(f"the losses differ by more than {TOLERANCE:g}: these are different computations")
    return differences[-1]


def compare(number: int, steps: int, threads: int) -> dict[str, float]:
    """Run the whole comparison and print its table."""
    speeds: dict[str, list[float]] = {peer: [] for peer in PEERS}  # tokens/s of each round
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        describe(folder)
        difference = max(loss_difference(peer, folder, threads) for peer in PEERS[1:])
        commands = {peer: command(peer) for peer in PEERS}
        for index in range(number):
            seconds, _ = one_round(commands, folder, steps, threads, index, WARM_UP)
            for peer in PEERS:
                tokens = json.loads((folder / f"{peer}.tokens.json").read_bytes())[WARM_UP:]
                speeds[peer].append(sum(tokens) / sum(seconds[peer]))
            shown = ", ".join(f"{peer} {speeds[peer][-1]:,.0f}" for peer in PEERS)
            print(f"round {index + 1}: tokens/s {shown}", flush=True)
    print(f"\n{'':<16}{'tokens/s':>10}{'ours / it':>11}  medians of the rounds; least to largest")
    ratios: dict[str, float] = {}
    for peer in PEERS:
        found = [ours / theirs for ours, theirs in zip(speeds["ours"], speeds[peer], strict=True)]
        ratios[peer] = statistics.median(found)
        row = f"{peer:<16}{statistics.median(speeds[peer]):>10,.0f}{ratios[peer]:>11.3f}"
        print(row if peer == "ours" else f"{row}  {min(found):.3f} to {max(found):.3f}")
    return {
        "vs_trl_padded": round(ratios["trl_padded"], 4),
        "vs_trl_bfd": round(min(ratios["trl_bfd"], ratios["trl_bfd_by_row"]), 4),
        "final_loss_difference": float(f"{difference:.3g}"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="times every peer is timed (default 5)")
    parser.add_argument("--steps", type=int, default=12, help=f"steps of a timed run, {WARM_UP} of them warm-up")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads (default: all cores)")
    options = parser.parse_args()
    if options.steps <= WARM_UP or options.rounds < 1:
        parser.error(f"--steps must be more than the {WARM_UP} of warm-up and --rounds at least 1")
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft", "trl"))
    print(f"Python {platform.python_version()}, {libraries}; {options.threads} threads, fp32")
    layers, width = SIZES["num_hidden_layers"], SIZES["hidden_size"]
    print(f"Llama of {layers} layers of {width}, vocabulary {SIZES['vocab_size']}; LoRA of rank {ADAPTER.rank} on all")
    print(f"linear layers; {CONVERSATIONS} padded conversations or {ROWS} packed rows of {ROW} a step")
    print("TRL's recomputation of activations, on by default, is off")
    print(f"load average {os.getloadavg()[0]:.1f}: above 0.5, other processes disturb the figures", flush=True)
    print(json.dumps(compare(options.rounds, options.steps, options.threads)))


if __name__ == "__main__":
    main()
