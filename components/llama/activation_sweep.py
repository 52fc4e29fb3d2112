"""The activation sweep: what each mode of activation memory saves, holds and costs for one model on this machine.

The step's own process stays without torch: every mode runs in a fresh process (`sweep_worker`), and for the timed
steps the processes take turns, so that whatever else the machine does hits all modes alike.
"""

from __future__ import annotations

import csv
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

from modelmill.components.core import events, tracking
from modelmill.components.core.errors import UserError
from modelmill.components.core.step import StepResult, step_options
from modelmill.components.llama.sweep_config import ActivationSweepConfig
from modelmill.components.training import estimate
from modelmill.components.training.options import activation_label
from modelmill.components.training.processes import PARENT_VARIABLE, available_cores

WORKER = "modelmill.components.llama.sweep_worker"
METRICS = ("saved_bytes", "peak_bytes", "step_seconds", "tokens_per_second", "recomputed_flops")
_COLUMNS = (
    "mode",
    "saved_bytes",
    "estimated_saved_bytes",
    "peak_bytes",
    "step_seconds",
    "step_seconds_low",
    "step_seconds_high",
    "tokens_per_second",
    "recomputed_flops",
    "gradient_difference",
    "pareto",
)


@step_options(reuse=False, device=True)
def activation_sweep(config: ActivationSweepConfig, output: Path) -> StepResult:
    """Measure what each mode of activation memory saves, holds at its height and costs in time.

    Before anything is timed, the gradients of every mode are compared with those of the untouched model: the same
    bits, or for compiled blocks a small tolerance. Writes `results.json`, `results.csv` and `report.html`. What is
    measured depends on the machine and the moment, so the step is never reused and its files differ from run to run.

    Args:
        config: model and modes.
        output: the artifact's folder.

    Raises:
        UserError: this machine cannot do what is asked.
        RuntimeError: a mode's process failed, or its gradients are other ones.
    """
    from modelmill.components.llama.sweep_report import render_report

    rows = measure(config)
    results = {"config": config.model_dump(mode="json"), "modes": rows}
    (output / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    (output / "results.csv").write_text(table(rows))
    (output / "report.html").write_text(render_report(config, rows))
    for name in ("results.json", "results.csv", "report.html"):
        tracking.log_artifact(output / name)
    metrics = {f"{row['mode']}_{name}": float(row[name]) for row in rows for name in METRICS if row[name] is not None}
    tracking.log_metrics(metrics)
    optimal = [row["mode"] for row in rows if row["pareto"]]
    tracking.set_tags({"pareto_modes": ", ".join(optimal)})
    counts = {"modes": len(rows), "pareto_modes": len(optimal), "parameters": config.model.num_parameters()}
    return StepResult(kind="activation_sweep", counts=counts, metrics=metrics, metadata={"pareto_modes": optimal})


def measure(config: ActivationSweepConfig) -> list[dict[str, Any]]:
    """One record a mode in the order of the recipe; the columns of `results.csv`, and every timed step.

    Raises:
        UserError: this machine cannot do a mode.
        RuntimeError: a process failed.
    """
    sweep = config.sweep
    labels = [activation_label(mode) for mode in sweep.modes]
    turns = len(labels) * sweep.repeats
    seconds: list[list[float]] = [[] for _ in labels]
    with ExitStack() as stack:
        workers, properties = [], []
        for index, label in enumerate(labels):  # one after the other: compiling takes all cores
            events.progress(f"{label}: gradients and memory", index, len(labels) + turns)
            workers.append(stack.enter_context(_Worker(config, index, label)))
            properties.append(workers[-1].ask(workers[-1].job))
        for turn in range(turns):
            # Another one begins each round, so that none always follows the same.
            index = (turn + turn // len(labels)) % len(labels)
            events.progress(f"{labels[index]}: timing", len(labels) + turn + 1, len(labels) + turns)
            seconds[index].append(workers[index].ask({"turn": turn})["seconds"])
    tokens = sweep.micro_batch_size * sweep.sequence_length
    rows = []
    for mode, label, known, times in zip(sweep.modes, labels, properties, seconds, strict=True):
        middle = statistics.median(times)
        rows.append(
            {
                "mode": label,
                **known,
                "estimated_saved_bytes": estimate.saved_bytes(
                    config.model, config.training(mode), sweep.sequence_length
                ),
                "step_seconds": middle,
                "step_seconds_low": min(times),
                "step_seconds_high": max(times),
                "tokens_per_second": tokens / middle,
                "all_step_seconds": times,
            }
        )
    optimal = pareto([(row["saved_bytes"], row["step_seconds"]) for row in rows])
    return [{**row, "pareto": index in optimal} for index, row in enumerate(rows)]


def pareto(points: Sequence[tuple[float, float]]) -> set[int]:
    """Indices of the points (memory, time) that no other point beats in one without losing in the other."""
    return {
        index
        for index, (memory, time) in enumerate(points)
        if not any(
            other_memory <= memory and other_time <= time and (other_memory, other_time) != (memory, time)
            for other_memory, other_time in points
        )
    }


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The records as CSV; what is not known stays empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, _COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


class _Worker:
    """A process that measures one mode."""

    def __init__(self, config: ActivationSweepConfig, index: int, label: str) -> None:
        self.label, threads = label, config.sweep.threads or available_cores()
        self.job = {"config": config.model_dump(mode="json"), "index": index, "threads": threads}

    def __enter__(self) -> _Worker:
        self.log: IO[str] = tempfile.TemporaryFile("w+")
        # Kept waiting, threads of one process must not spin while another one's turn is timed.
        environment = {**os.environ, PARENT_VARIABLE: str(os.getpid()), "OMP_WAIT_POLICY": "PASSIVE"}
        environment.setdefault("OMP_NUM_THREADS", str(self.job["threads"]))
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            [sys.executable, "-m", WORKER], stdin=pipe, stdout=pipe, stderr=self.log, text=True, env=environment
        )
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()  # it holds nothing that must be put away
        self.process.communicate()
        self.log.close()

    def ask(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """Send a line, wait for the answer.

        Raises:
            UserError: the process says that the machine cannot do it.
            RuntimeError: it ended without an answer; its last words are in the message.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(question) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self.process.wait()
            self.log.seek(0)
            words = self.log.read().strip().splitlines()[-15:]
            raise RuntimeError("\n".join([f"activation mode {self.label} failed", *words]))
        answer = json.loads(line)
        if "problem" in answer:
            raise UserError(answer["problem"])
        return answer
