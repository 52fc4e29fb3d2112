"""Run every benchmark and rewrite the table of figures in README.md.

    python -m tests.benchmarks                 # all
    python -m tests.benchmarks orchestration   # some

A benchmark is a module beside this one that ends with one JSON line of named figures.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

README = Path(__file__).resolve().parents[2] / "README.md"
BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"

# figure -> (what it says, what it is compared with or bounded by)
MEANING = {
    "vs_bare_loop": ("tokens/s of our loop / a bare hand loop over `LlamaForCausalLM`", "aim 1.0 or more"),
    "vs_hf_trainer": ("tokens/s of our loop / Hugging Face `Trainer`", "aim 1.10 or more"),
    "vs_litgpt": ("tokens/s of our loop / litgpt's `pretrain.fit`", "aim 1.0 or more"),
    "peak_memory_vs_hf": ("peak memory of our loop / Hugging Face `Trainer`", "aim 0.6 or less"),
    "max_loss_difference": ("largest difference of the loss against `LlamaForCausalLM`, same weights", "1e-5 or less"),
    "vs_trl_padded": ("tokens/s of our LoRA fine-tuning / TRL's `SFTTrainer` with peft, padded", "aim 2.0 or more"),
    "vs_trl_bfd": ("tokens/s of our LoRA fine-tuning / the same with its bfd packing", "aim 1.05 or more"),
    "final_loss_difference": ("difference of the loss after 12 steps against TRL, same conversations", "1e-5 or less"),
    "head_peak_ratio": ("peak memory of head and loss in chunks / of full logits, V = 32k", "aim 0.15 or less"),
    "full_vs_none_memory": ("peak memory of a step, every block checkpointed / none", "below 1"),
    "selective_vs_none_memory": ("peak memory of a step, selective checkpointing / none", "below 1"),
    "selective_vs_none_time": ("time of a step, selective checkpointing / none", "near 1"),
    "rouge_vs_rouge_score": ("time of `rouge_score` / ours, all four ROUGE of the same texts", "aim 10 or more"),
    "rouge_max_difference": ("largest difference of any of these scores against `rouge_score`", "0"),
    "predict_vs_upstream_1024_series": (
        "time of chronos-forecasting's Chronos-2 / ours, 1024 series of 64 to 2048 points",
        "aim 2.0 or more",
    ),
    "max_forecast_difference": (
        "largest difference of these quantiles, standard deviations of a series",
        "1e-5 or less",
    ),
    "kernel_synthesis_vs_upstream": ("time of KernelSynth as published / ours, a series of 1024", "aim 15 or more"),
    "fev_metric_difference": ("largest relative difference of the backtest's metrics from fev's", "1e-9 or less"),
    "tuned_vs_untuned": ("loss of `chronos-demo`'s tuned model / untuned, the worst of 3 seeds", "below 1"),
    "tuned_vs_seasonal_naive": ("loss of the same / Seasonal Naive, the worst of 3 seeds", "below 1"),
    "compile_all_s": ("`modelmill compile --all`, seconds", "10 or less"),
    "submit_to_follow_requests": ("requests of `run --on kfp` until the run is first seen", ""),
    "image_mb": ("MB of an image, by family (on a base that stands in for the official one)", ""),
    "per_step_overhead_s": ("orchestration and tracking a pipeline step, seconds", "0.15 or less"),
    "help_s": ("`modelmill --help`, seconds", "0.3 or less"),
    "core_import_s": ("`import modelmill.components.core`, seconds", "0.15 or less"),
}


Figure = float | dict[str, float | None]


def run(name: str) -> dict[str, Figure]:
    """Run one benchmark, show its output, and return its figures."""
    print(f"== {name}", flush=True)
    command = [sys.executable, "-m", f"tests.benchmarks.{name}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        last = ""
        for line in process.stdout:
            print(line, end="", flush=True)
            last = line.strip() or last
    if process.returncode:
        raise SystemExit(f"tests.benchmarks.{name} ended with exit code {process.returncode}")
    return json.loads(last)


def rows_of(text: str) -> dict[str, str]:
    """Rows of the present table by figure, so that running one benchmark keeps the others."""
    table = text[text.index(BEGIN) : text.index(END)]
    rows = [line for line in table.splitlines() if line.startswith("| `")]
    return {row.split("`")[1]: row for row in rows}


def _by_family(values: dict[str, float | None]) -> str:
    return ", ".join(f"{name} {'not built' if value is None else f'{value:.4g}'}" for name, value in values.items())


def rewrite(figures: dict[str, Figure]) -> None:
    """Put figures into the README's table."""
    text = README.read_text()
    rows = rows_of(text)
    for name, value in figures.items():
        what, bound = MEANING[name]
        shown = f"{value:.3g}" if isinstance(value, float | int) else _by_family(value)
        rows[name] = f"| `{name}` | {what} | {shown} | {bound} |"
    ordered = [rows[name] for name in MEANING if name in rows]
    head = ["| figure | what it says | measured | bound |", "| --- | --- | ---: | --- |"]
    table = "\n".join([BEGIN, *head, *ordered, END])
    README.write_text(text[: text.index(BEGIN)] + table + text[text.index(END) + len(END) :])


def main(names: list[str]) -> None:
    known = sorted(path.stem for path in Path(__file__).parent.glob("[a-z]*.py"))
    if unknown := set(names) - set(known):
        raise SystemExit(f"no benchmark called {', '.join(sorted(unknown))}; choose from {', '.join(known)}")
    figures: dict[str, Figure] = {}
    for name in names or known:
        figures |= run(name)
    rewrite(figures)


if __name__ == "__main__":
    main(sys.argv[1:])
