"""What a training recipe will need: layout, memory, tokens, operations, time and cost, with every assumption named."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from modelmill.components.core.errors import UserError
from modelmill.components.core.home import Home
from modelmill.components.core.recipe import Recipe, suggest
from modelmill.components.training import estimate
from modelmill.components.training.config import TrainingConfig
from modelmill.pipelines.plan import StepPlan

CPU = "cpu"
# Devices the cluster accelerators stand for when none is named: those of the published runs the presets follow.
_TYPICAL = {"cuda": "h100", "neuron": "trn1-core"}
# Model FLOPs utilisation assumed without a measured run: dense decoders reach 0.3 to 0.5 on GPUs (arXiv:2407.21783,
# table 4: 0.38 to 0.43); the demo's small matrices reached 0.32 of a large product on a busy 2-core machine.
_MFU = {CPU: 0.3}
_USUAL_MFU = 0.4
_MATRIX_PRODUCT = """
import time, numpy
size, best, deadline = 768, float("inf"), time.perf_counter() + 0.2
matrix = numpy.ones((size, size), dtype=numpy.float32)
while time.perf_counter() < deadline:
    began = time.perf_counter()
    matrix @ matrix
    best = min(best, time.perf_counter() - began)
print(2 * size**3 / best)
"""
_DEPENDENT = ("model", "packing")  # sections that decide the cost of a token, besides the fields of `_pace`


@dataclass(frozen=True)
class Outlook:
    """What the training step of a recipe will need.

    Attributes:
        layout: processes and how they share the work.
        devices: processes in all, one a device (on a laptop they share the CPU).
        parameters: of the model.
        tokens_per_step: tokens of one optimizer step; tokens: of the whole run.
        flops: of the whole run, forward and backward.
        memory: bytes on one device by what they hold.
        device_bytes: memory of one device, when it is known.
        seconds: predicted training time, None when nothing is known about the device.
        cost: in the currency of the price, None without a price.
        assumptions: what the figures rest on, one sentence each.
    """

    layout: dict[str, int]
    devices: int
    parameters: int
    tokens_per_step: int
    tokens: int
    flops: int
    memory: dict[str, int]
    device: str
    device_bytes: int | None
    seconds: float | None
    cost: float | None
    assumptions: list[str] = field(default_factory=list)


def outlook(
    recipe: Recipe,
    steps: Sequence[StepPlan],
    home: Home,
    *,
    device: str | None = None,
    mfu: float | None = None,
    price_per_hour: float | None = None,
    elsewhere: bool = False,
) -> Outlook | None:
    """What the training of a recipe will need, or None for a recipe without `model`, `training` and `packing`.

    Args:
        recipe: the recipe.
        steps: its plan; a tokenizer that exists gives the vocabulary size.
        home: where a measured run of the same kind is looked for.
        device: `cpu` or one of `estimate.known_devices()`; default by the recipe's accelerator.
        mfu: model FLOPs utilisation in (0, 1] to assume instead of a measured or usual one.
        price_per_hour: of one node.
        elsewhere: it would train on another machine, about whose CPU nothing is known.

    Raises:
        UserError: the device is not known.
    """
    model, training, packing = (getattr(recipe, name, None) for name in ("model", "training", "packing"))
    if training is None or packing is None or not hasattr(model, "num_parameters"):
        return None
    assumptions: list[str] = []
    model = _with_vocabulary(recipe, model, steps, assumptions)
    name = _device(training.accelerator, device, assumptions)
    parallel, length = training.parallel, packing.sequence_length
    memory = estimate.estimate_memory(model, training, length)
    tokens_per_step = training.global_batch_size * length
    flops = estimate.training_flops(model, training, length)
    pace = None if device or mfu or elsewhere else _measured_pace(recipe, home, assumptions)
    tokens = tokens_per_step * training.steps
    if pace:
        seconds: float | None = tokens / pace
    elif elsewhere and name == CPU:
        seconds = None
    else:
        seconds = _seconds(flops, parallel.world_size, name, training.precision, mfu, assumptions)
    gib = estimate.device_gib(name)
    return Outlook(
        layout=_layout(training),
        devices=parallel.world_size,
        parameters=model.num_parameters(),
        tokens_per_step=tokens_per_step,
        tokens=tokens,
        flops=flops,
        memory={
            "weights": memory.weights,
            "gradients": memory.gradients,
            "optimizer": memory.optimizer,
            "activations": memory.activations,
        },
        device=name,
        device_bytes=int(gib * 2**30) if gib else None,
        seconds=seconds,
        cost=None if price_per_hour is None or seconds is None else price_per_hour * parallel.nodes * seconds / 3600,
        assumptions=assumptions,
    )


def _layout(training: TrainingConfig) -> dict[str, int]:
    parallel = training.parallel
    return {
        "nodes": parallel.nodes,
        "processes_per_node": parallel.processes_per_node,
        "tensor": parallel.tensor,
        "pipeline": parallel.pipeline,
        "data": parallel.data_degree,
        "shard": parallel.shard,
        "micro_batch_size": training.micro_batch_size,
        "accumulation_steps": training.accumulation_steps,
    }


def _with_vocabulary(recipe: Recipe, model: Any, steps: Sequence[StepPlan], assumptions: list[str]) -> Any:
    """The model with its vocabulary size: its own, that of a tokenizer that exists, or the one asked for."""
    if model.vocab_size is not None:
        return model
    made = [
        plan.manifest.counts["vocab_size"] for plan in steps if plan.manifest and plan.manifest.kind == "tokenizer"
    ]
    size = made[0] if made else getattr(getattr(recipe, "tokenizer", None), "vocab_size", None)
    if size is None:
        raise UserError("model.vocab_size: is not set and the tokenizer is not made yet; set it to plan the model")
    if not made:
        assumptions.append(f"vocabulary: the {size} tokens asked of the tokenizer (a small corpus may give fewer)")
    return model.model_copy(update={"vocab_size": size})


def _device(accelerator: str, device: str | None, assumptions: list[str]) -> str:
    known = [CPU, *estimate.known_devices()]
    if device is not None:
        if device not in known:
            raise UserError(f"--device: {device!r} is not known; {suggest(device, known)}")
        return device
    name = _TYPICAL.get(accelerator, CPU)
    if name != CPU:
        assumptions.append(f"device: {name}, the usual one for accelerator {accelerator} (--device names another)")
    return name


def _seconds(
    flops: int, devices: int, device: str, precision: Any, mfu: float | None, assumptions: list[str]
) -> float | None:
    share = mfu or _MFU.get(device, _USUAL_MFU)
    if device == CPU:
        peak, devices = _measured_cpu_flops(), 1  # the processes share one CPU
        source = f"this CPU's {peak / 1e9:.0f} GFLOP/s, measured now with a matrix product on one core"
    else:
        peak = estimate.peak_flops(device, precision) or 0.0
        source = f"{devices} x {device} at {peak / 1e12:.4g} TFLOP/s dense peak ({precision})"
    assumptions.append(f"time: FLOPs / ({source}) at {share:.0%} model FLOPs utilisation (--mfu sets another)")
    assumptions.append("time: training only; start, validation, checkpoints and lost work come on top")
    return estimate.training_seconds(flops, devices, peak, share) if peak else None


def _measured_cpu_flops() -> float:
    """FLOP/s of fp32 matrix products on all cores, 0 without numpy.

    Measured on one core and multiplied: the best of several products on one core is hardly disturbed by what else
    runs, while threads of one product wait for each other. In a process of its own, since the number of threads is
    fixed when numpy is imported.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [sys.executable, "-c", _MATRIX_PRODUCT]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    return cores * float(done.stdout) if done.returncode == 0 else 0.0


def _measured_pace(recipe: Recipe, home: Home, assumptions: list[str]) -> float | None:
    """Tokens per second of the newest run here with the same model, rows, layout, batch and precision."""
    from modelmill.pipelines.launch.runs import all_runs
    from modelmill.pipelines.launch.watch import RunView

    wanted = _pace(recipe.model_dump(mode="json"))
    for run in reversed(all_runs(home)):
        try:
            same = _pace(yaml.safe_load((run.folder / "recipe.yaml").read_text())) == wanted
        except (OSError, yaml.YAMLError, TypeError, KeyError):
            continue
        if not same:
            continue
        view = RunView(run.folder, run.record.steps)
        view.refresh()
        for step in view.steps.values():
            if pace := step.metrics.get("tokens_per_second"):
                assumptions.append(f"time: {pace:.0f} tokens/s as measured in {run.id}; training only")
                return pace
    return None


def _pace(values: dict[str, Any]) -> tuple[Any, ...]:
    """What decides how fast a token is trained, besides the machine."""
    training = values["training"]
    batch = ("parallel", "micro_batch_size", "global_batch_size")
    arithmetic = ("precision", "accelerator", "deterministic", "attention", "document_masking")
    return (*(values[name] for name in _DEPENDENT), *(training[name] for name in (*batch, *arithmetic)))
