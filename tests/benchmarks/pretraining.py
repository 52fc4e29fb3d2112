"""Our training loop against the Hugging Face Trainer, a bare hand loop over `LlamaForCausalLM`, and litgpt.

    python -m tests.benchmarks.pretraining [--rounds 5] [--steps 16]

litgpt does not install beside the rest: `make bench-peers` gives it an environment of its own, and without that the
benchmark leaves it out and says so. All start from the same weights, read the same batches in the same order, and use
AdamW (fused), the same schedule, clipping at 1.0, fp32 and the same number of threads. First their losses over 50
steps are compared: a comparison of speed means nothing between runs that compute different things. Then, in every
round, each of them starts in a process of its own and they take turns step by step, so that whatever else the machine
does hits all alike. The ratio of a turn is one step of a peer over one step of ours; the median over all turns is
reported, and as its spread the medians of the rounds.

Memory is tensor-level: the height of what torch's CPU allocator handed out, model and optimizer included, from the
profiler's allocation records of a few steps in a separate process. The growth of the process's resident memory is
shown beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np

from modelmill.components.training.schedule import learning_rate
from tests.benchmarks._pretraining_peers import BATCH, LENGTH, MODEL, training_config
from tests.benchmarks._rounds import ROOT, measure, one_round

WARM_UP, CHECKED_STEPS, MEASURED_STEPS, TOLERANCE = 3, 50, 6, 1e-5
LITGPT = ROOT / ".venv" / "litgpt" / "bin" / "python"
PEERS = ("ours", "hf_trainer", "bare_loop", *(["litgpt"] if LITGPT.exists() else []))


def command(peer: str) -> list[str]:
    """How a peer is started."""
    python, module = (LITGPT, "_litgpt_peer") if peer == "litgpt" else (sys.executable, "_pretraining_peers")
    return [str(python), "-m", f"tests.benchmarks.{module}", peer]


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
    config = training_config(steps)
    settings = config.model_dump(mode="json", include={"weight_decay", "betas", "eps", "clip_norm"})
    settings["learning_rates"] = [learning_rate(step, config) for step in range(steps)]
    (folder / "settings.json").write_text(json.dumps(settings))


def largest_loss_difference(folder: Path, threads: int) -> float:
    """Largest relative difference of our loss to a peer's at any checked step; a large one ends the program."""
    losses = {peer: measure(command(peer), "check", folder, CHECKED_STEPS, threads) for peer in PEERS}
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


def compare(number: int, steps: int, threads: int) -> dict[str, float]:
    """Run the whole comparison and print its table."""
    rounds, residents = [], []
    commands = {peer: command(peer) for peer in PEERS}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, max(steps, CHECKED_STEPS))
        difference = largest_loss_difference(folder, threads)
        heights = {peer: measure(command(peer), "memory", folder, MEASURED_STEPS, threads) for peer in PEERS}
        for index in range(number):
            seconds, resident = one_round(commands, folder, steps, threads, index, WARM_UP)
            rounds.append(seconds)
            residents.append(resident)
            speeds = {peer: BATCH * LENGTH / statistics.median(seconds[peer]) for peer in PEERS}
            shown = ", ".join(f"{peer} {speed:,.0f}" for peer, speed in speeds.items())
            print(f"round {index + 1}: tokens/s {shown}", flush=True)
    print(f"\n{'':<12}{'tokens/s':>10}{'tensors MiB':>13}{'resident MiB':>14}{'ours / it':>11}  medians of the rounds")
    ratios: dict[str, float] = {}
    for peer in PEERS:
        turns = [[theirs / ours for ours, theirs in zip(one["ours"], one[peer], strict=True)] for one in rounds]
        ratios[peer] = statistics.median(ratio for ratios_of_round in turns for ratio in ratios_of_round)
        medians = [statistics.median(ratios_of_round) for ratios_of_round in turns]
        speed = BATCH * LENGTH / statistics.median(value for one in rounds for value in one[peer])
        resident_mib = statistics.median(one[peer] for one in residents) / 2**20
        row = f"{peer:<12}{speed:>10,.0f}{heights[peer] / 2**20:>13,.0f}{resident_mib:>14,.0f}{ratios[peer]:>11.3f}"
        print(row if peer == "ours" else f"{row}  {min(medians):.3f} to {max(medians):.3f}")
    return {
        **{f"vs_{peer}": round(ratios[peer], 4) for peer in PEERS[1:]},
        "peak_memory_vs_hf": round(heights["ours"] / heights["hf_trainer"], 4),
        "max_loss_difference": float(f"{difference:.3g}"),
    }


def litgpt_versions() -> str:
    """Versions in litgpt's environment."""
    names = "('litgpt', 'lightning', 'torch')"
    code = f"from importlib.metadata import version as v; print(*(f'{{n}} {{v(n)}}' for n in {names}), sep=', ')"
    done = subprocess.run([LITGPT, "-c", code], capture_output=True, text=True, check=True)
    return "its own environment: " + done.stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="times every peer is timed (default 5)")
    parser.add_argument("--steps", type=int, default=16, help=f"steps of a timed run, {WARM_UP} of them warm-up")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads (default: all cores)")
    options = parser.parse_args()
    if options.steps <= WARM_UP or options.rounds < 1:
        parser.error(f"--steps must be more than the {WARM_UP} of warm-up and --rounds at least 1")
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "accelerate"))
    print(f"Python {platform.python_version()}, {libraries}; {options.threads} threads, fp32")
    print(litgpt_versions() if "litgpt" in PEERS else "litgpt left out: `make bench-peers` installs it")
    parameters = MODEL.num_parameters()
    print(f"Llama of {parameters / 1e6:.1f}M parameters, vocabulary {MODEL.vocab_size}, batch {BATCH} x {LENGTH}")
    print(f"load average {os.getloadavg()[0]:.1f}: above 0.5, other processes disturb the figures", flush=True)
    print(json.dumps(compare(options.rounds, options.steps, options.threads)))


if __name__ == "__main__":
    main()
