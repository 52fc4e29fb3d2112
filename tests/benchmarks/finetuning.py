"""LoRA fine-tuning on our loop against TRL's `SFTTrainer` with peft: padded, as it comes, and with its bfd packing.

    python -m tests.benchmarks.finetuning [--rounds 5] [--steps 16]

All learn the same prepared questions and answers about installed packages (answers only), from the same weights and
the same first adapter, with AdamW (fused), the same schedule, clipping at 1.0, fp32 and the same number of threads.
A step holds 16 conversations where they are padded and 4 rows of 256 tokens where they are packed, which is about the
same. TRL runs without its default recomputation of activations, which ours does not do here either, and in fp32.

First the losses are compared: each of TRL's runs writes down which conversations it learnt in which step, and a run of
ours learns the same ones in the same steps, packed by us. A comparison of speed means nothing between runs that
compute different things. Then ours learns from the rows as `prepare_instructions` packed them; every peer starts in a
process of its own and they take turns step by step, so that whatever else the machine does hits all alike. Counted
are real tokens, prompts and answers without padding. The ratio of a turn is our tokens/s over those of a peer; the
median over all turns is reported, and as its spread the medians of the rounds.
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
from typing import Any

from modelmill.components.core.manifest import Manifest
from modelmill.components.core.step import StepFunction
from modelmill.components.data.instruction_rows import open_instructions
from tests.benchmarks._finetuning_peers import ADAPTER, CONVERSATIONS, LENGTH, ROWS, SEED, conversations_of
from tests.benchmarks._rounds import measure, one_round

WARM_UP, CHECKED_STEPS, TOLERANCE = 3, 40, 1e-5
DISTRIBUTIONS = ["numpy", "pydantic", "click", "Flask", "fsspec"]
TEMPLATE = "### Question:\n{prompt}\n\n### Answer:\n{completion}"
SIZES: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": LENGTH,
}
PEERS = ("ours", "trl_padded", "trl_bfd")


def command(peer: str) -> list[str]:
    """How a peer is started."""
    return [sys.executable, "-m", "tests.benchmarks._finetuning_peers", peer]


def prepare(folder: Path) -> None:
    """Questions and answers through the pipeline's own steps, a model with random weights and a first adapter."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from modelmill.components.data.config import CorpusConfig, TokenizerConfig
    from modelmill.components.data.corpus import ingest_corpus
    from modelmill.components.data.instruction_config import InstructionsConfig
    from modelmill.components.data.instructions import prepare_instructions
    from modelmill.components.data.tokenizer import train_tokenizer
    from modelmill.components.finetuning import adapters

    def produce(name: str, step: StepFunction, config: Any, **upstream: Manifest) -> Manifest:
        output = folder / name
        output.mkdir()
        result = step(config, output, **upstream)
        return Manifest.describe(output, kind=result.kind, counts=result.counts, metadata=result.metadata)

    source = {"type": "installed-docs", "distributions": DISTRIBUTIONS}
    corpus = produce("corpus", ingest_corpus, CorpusConfig.model_validate({"source": source}))
    sizes = TokenizerConfig(vocab_size=SIZES["vocab_size"])
    tokenizer = produce("tokenizer", train_tokenizer, sizes, corpus=corpus)
    asked = {
        "source": {"type": "installed-docs-qa", "distributions": DISTRIBUTIONS},
        "template": {"kind": "prompt", "text": TEMPLATE},
        "sequence_length": LENGTH,
    }
    chosen = InstructionsConfig.model_validate(asked)
    prepared = produce("instructions", prepare_instructions, chosen, tokenizer=tokenizer)
    (folder / "instructions.json").write_text(prepared.model_dump_json())
    torch.manual_seed(SEED)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, bos_token_id=0, eos_token_id=0))
    model.save_pretrained(str(folder / "model"))
    names = adapters.add_adapters(model, ADAPTER, dora=False, seed=SEED)
    record = adapters.peft_config(ADAPTER, names, dora=False, base=str(folder / "model"))
    adapters.write_adapter(folder / "adapter", adapters.gather_adapters(model, True), record)


def describe(folder: Path) -> None:
    """Say what is learnt."""
    rows = open_instructions(Manifest.model_validate_json((folder / "instructions.json").read_bytes()), "train")
    lengths = [len(ids) for ids, _ in conversations_of(rows)]
    whole = len(lengths) // CONVERSATIONS * CONVERSATIONS
    batches = [lengths[first : first + CONVERSATIONS] for first in range(0, whole, CONVERSATIONS)]
    padded = sum(lengths[:whole]) / sum(max(batch) * len(batch) for batch in batches)
    targets = int(rows.targets.sum()) / sum(lengths)
    print(f"{len(lengths)} conversations of {min(lengths)} to {max(lengths)} tokens, {100 * targets:.0f} % answers;")
    fill = sum(lengths) / (len(rows) * (LENGTH + 1))
    print(f"of what is computed, {100 * padded:.0f} % are real where padded and {100 * fill:.0f} % in our rows")


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
    rounds: list[dict[str, list[float]]] = []  # tokens/s of each turn
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        describe(folder)
        difference = max(loss_difference(peer, folder, threads) for peer in PEERS[1:])
        commands = {peer: command(peer) for peer in PEERS}
        for index in range(number):
            seconds, _ = one_round(commands, folder, steps, threads, index, WARM_UP)
            tokens = {peer: json.loads((folder / f"{peer}.tokens.json").read_bytes())[WARM_UP:] for peer in PEERS}
            rounds.append({peer: [n / s for n, s in zip(tokens[peer], seconds[peer], strict=True)] for peer in PEERS})
            shown = ", ".join(f"{peer} {statistics.median(speeds):,.0f}" for peer, speeds in rounds[-1].items())
            print(f"round {index + 1}: tokens/s {shown}", flush=True)
    print(f"\n{'':<12}{'tokens/s':>10}{'ours / it':>11}  medians of the rounds")
    ratios: dict[str, float] = {}
    for peer in PEERS:
        turns = [[ours / theirs for ours, theirs in zip(one["ours"], one[peer], strict=True)] for one in rounds]
        ratios[peer] = statistics.median(ratio for ratios_of_round in turns for ratio in ratios_of_round)
        medians = [statistics.median(ratios_of_round) for ratios_of_round in turns]
        speed = statistics.median(value for one in rounds for value in one[peer])
        row = f"{peer:<12}{speed:>10,.0f}{ratios[peer]:>11.3f}"
        print(row if peer == "ours" else f"{row}  {min(medians):.3f} to {max(medians):.3f}")
    return {
        **{f"vs_{peer}": round(ratios[peer], 4) for peer in PEERS[1:]},
        "final_loss_difference": float(f"{difference:.3g}"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="times every peer is timed (default 5)")
    parser.add_argument("--steps", type=int, default=16, help=f"steps of a timed run, {WARM_UP} of them warm-up")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads (default: all cores)")
    options = parser.parse_args()
    if options.steps <= WARM_UP or options.rounds < 1:
        parser.error(f"--steps must be more than the {WARM_UP} of warm-up and --rounds at least 1")
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft", "trl"))
    print(f"Python {platform.python_version()}, {libraries}; {options.threads} threads, fp32")
    layers, width = SIZES["num_hidden_layers"], SIZES["hidden_size"]
    print(f"Llama of {layers} layers of {width}, vocabulary {SIZES['vocab_size']}; LoRA of rank {ADAPTER.rank} on all")
    print(f"linear layers; {CONVERSATIONS} padded conversations or {ROWS} packed rows of {LENGTH} a step")
    print(f"load average {os.getloadavg()[0]:.1f}: above 0.5, other processes disturb the figures", flush=True)
    print(json.dumps(compare(options.rounds, options.steps, options.threads)))


if __name__ == "__main__":
    main()
