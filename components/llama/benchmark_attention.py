"""Compare the attention kernels of this machine: time, operations a second, memory and error."""

from __future__ import annotations

import csv
import itertools
import json
import logging
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelmill.components.core import events, tracking
from modelmill.components.core.step import StepResult, step_options
from modelmill.components.llama.attention_config import AttentionBenchmarkConfig, IncoherenceConfig

if TYPE_CHECKING:
    from modelmill.components.llama.attention_measures import Case

TABLE, REPORT, PLOT = "attention.csv", "attention.json", "attention.svg"
_SHAPE = ("dtype", "sequence_length", "rows", "head_dim", "num_heads", "kv_heads", "document_length")
_FIGURES = (
    "forward_seconds",
    "forward_spread_seconds",
    "forward_tflops",
    "forward_backward_seconds",
    "forward_backward_spread_seconds",
    "forward_backward_tflops",
    "share_of_peak",
    "forward_peak_bytes",
    "peak_bytes",
    "max_error",
    "max_gradient_error",
)
logger = logging.getLogger("modelmill")


@step_options(reuse=False, device=True)  # a measurement of another time, or of another machine, is not this one
def benchmark_attention(config: AttentionBenchmarkConfig, output: Path) -> StepResult:
    """Measure every attention kernel present on every shape asked for.

    Writes `attention.csv` (a line for each kernel and shape), `attention.json` (the same with the device, the kernels
    that are absent and why, and the experiment on fp8) and `attention.svg`. Columns: median seconds and their
    interquartile range, TFLOP/s (see `Case.forward_flops`), the share of the device's dense peak when that is known,
    the most bytes of tensors at once, and the largest error against float64: of the output, and of a gradient relative
    to its largest value.

    Args:
        config: shapes, repeats, and the experiment on fp8.
        output: an empty folder.
    """
    # Imported here, so that whoever reads this module's names does not pay for torch and matplotlib.
    from modelmill.components.llama.attention_plot import plot
    from modelmill.components.training.accelerator import select_accelerator

    accelerator = select_accelerator("auto", 1)
    with _determinism(config.deterministic):
        records = list(_measured(config))
    measured = [record for record in records if "absent" not in record]
    absent = _absent(records)
    fp8 = _incoherence(config.incoherence) if config.incoherence else None
    report = {"device": accelerator.device_name(), "measured": measured, "absent": absent, "incoherence": fp8}
    (output / REPORT).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    _write_table(output / TABLE, measured)
    (output / PLOT).write_text(plot(measured, accelerator.device_name()), encoding="utf-8")
    metrics = _summary(measured, fp8)
    _track(output, metrics, measured, absent)
    return StepResult("benchmark", {"cases": len(list(cases(config))), "kernels": len(_kernels(measured))}, metrics)


def cases(config: AttentionBenchmarkConfig) -> Iterator[Case]:
    """Every combination of the lists, longer rows last."""
    from modelmill.components.llama.attention_measures import Case

    lists = (config.sequence_lengths, config.dtypes, config.head_dims, config.kv_heads, config.document_lengths)
    for length, dtype, head_dim, kv_heads, document in itertools.product(*lists):
        rows = max(1, config.tokens // length)
        yield Case(dtype, length, rows, head_dim, config.num_heads, kv_heads, document)


def _measured(config: AttentionBenchmarkConfig) -> Iterator[dict[str, Any]]:
    from modelmill.components.llama.attention_measures import measure
    from modelmill.components.training.accelerator import select_accelerator
    from modelmill.components.training.attention import names
    from modelmill.components.training.estimate import peak_flops

    accelerator, every = select_accelerator("auto", 1), list(cases(config))
    for number, case in enumerate(every):
        events.progress(f"case {number + 1} of {len(every)}: {_name(case.__dict__)}", number, len(every))
        peak = peak_flops(accelerator.device_name(), "fp32" if case.dtype == "fp32" else "bf16-mixed")
        for record in measure(
            case,
            names(),
            accelerator,
            repeats=config.repeats,
            min_seconds=config.min_seconds,
            deterministic=config.deterministic,
            seed=config.seed,
        ):
            if peak and "absent" not in record:
                record["share_of_peak"] = record["forward_backward_tflops"] * 1e12 / peak
            yield record


@contextmanager
def _determinism(wanted: bool) -> Iterator[None]:
    import torch

    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(wanted)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def _name(record: dict[str, Any]) -> str:
    """A shape in words, as in the plot and in metric names."""
    document = f", documents of {record['document_length']}" if record["document_length"] else ""
    heads = f"{record['num_heads']}/{record['kv_heads']} heads of {record['head_dim']}"
    return f"{record['dtype']}, {record['sequence_length']} positions, {heads}{document}"


def _kernels(records: Sequence[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(record["kernel"] for record in records))


def _absent(records: Sequence[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """Kernel to the reasons it gave, each with the number of shapes."""
    found: dict[str, dict[str, int]] = {}
    for record in records:
        if reason := record.get("absent"):
            reasons = found.setdefault(record["kernel"], {})
            reasons[reason] = reasons.get(reason, 0) + 1
    return found


def _incoherence(config: IncoherenceConfig) -> dict[str, Any]:
    """Errors of fp8 attention over the draws, with and without incoherent processing."""
    from modelmill.components.training.incoherence import fp8_errors

    events.progress("fp8 with and without incoherent processing")
    sizes = (config.sequence_length, config.head_dim, config.outlier_share, config.outlier_std)
    errors = [fp8_errors(*sizes, seed) for seed in range(config.draws)]
    ratios = [error.ratio for error in errors]
    return {
        **config.model_dump(),
        "plain_rmse": statistics.fmean(error.plain for error in errors),
        "rotated_rmse": statistics.fmean(error.rotated for error in errors),
        "ratio": statistics.fmean(ratios),
        "smallest_ratio": min(ratios),
        "largest_ratio": max(ratios),
    }


def _write_table(path: Path, measured: Sequence[dict[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, ("kernel", *_SHAPE, *_FIGURES), restval="")
        table.writeheader()
        table.writerows(measured)


def _summary(measured: Sequence[dict[str, Any]], fp8: dict[str, Any] | None) -> dict[str, float]:
    """For each kernel its best rate and its worst errors; of fp8 the mean ratio of the errors."""
    summary = {}
    for kernel in _kernels(measured):
        own = [record for record in measured if record["kernel"] == kernel]
        summary[f"{kernel}_tflops"] = max(record["forward_backward_tflops"] for record in own)
        summary[f"{kernel}_max_error"] = max(record["max_error"] for record in own)
        summary[f"{kernel}_max_gradient_error"] = max(record["max_gradient_error"] for record in own)
    if fp8:
        summary["incoherence_error_ratio"] = fp8["ratio"]
    return summary


def _track(
    output: Path, metrics: dict[str, float], measured: Sequence[dict[str, Any]], absent: dict[str, dict[str, int]]
) -> None:
    """Figures by sequence length, so that MLflow draws them over it; then the summary and the files."""
    for kernel, reasons in absent.items():
        for reason, count in reasons.items():
            logger.info("attention kernel %s %s (%d shapes)", kernel, reason, count)
    tracking.set_tags({f"attention.absent.{kernel}": "; ".join(reasons) for kernel, reasons in absent.items()})
    for record in measured:
        document = f"/documents-{record['document_length']}" if record["document_length"] else ""
        place = f"{record['kernel']}/{record['dtype']}/d{record['head_dim']}/kv{record['kv_heads']}{document}"
        values = {f"{place}/{name}": record[name] for name in ("forward_tflops", "forward_backward_tflops")}
        values[f"{place}/peak_mib"] = record["peak_bytes"] / 2**20
        tracking.log_metrics(values, step=record["sequence_length"])
    tracking.log_metrics(metrics)
    for name in (TABLE, REPORT, PLOT):
        tracking.log_artifact(output / name)
