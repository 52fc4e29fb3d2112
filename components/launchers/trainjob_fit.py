"""Whether a training section fits the nodes of a profile. Asks no cluster and imports no torch."""

from __future__ import annotations

import logging

from modelmill.components.core.errors import UserError
from modelmill.components.launchers.trainjob_config import TrainJobConfig
from modelmill.components.launchers.trainjob_render import accelerator_kind, cores
from modelmill.components.training.config import TrainingConfig
from modelmill.components.training.options import GPU_ATTENTION

logger = logging.getLogger("modelmill")


def check_fit(training: TrainingConfig, config: TrainJobConfig) -> None:
    """Refuse what the nodes cannot run; a slow network between them is only said.

    Raises:
        UserError: one line naming the parameter, its value and the fix.
    """
    parallel, kind = training.parallel, accelerator_kind(config)
    if parallel.pipeline > 1:
        raise UserError(
            f"training.parallel.pipeline: {parallel.pipeline} is not implemented, the engine has no pipeline"
            " schedule; use 1, and shard or tensor to spread the weights"
        )
    if training.accelerator not in ("auto", kind):
        raise UserError(
            f"training.accelerator: {training.accelerator!r} is not what the nodes have ({kind}); use auto or"
            f" {kind}, or another profile"
        )
    wanted = config.devices_per_node * config.processes_per_device
    if kind != "cpu" and parallel.processes_per_node != wanted:
        raise UserError(
            f"training.parallel.processes_per_node: {parallel.processes_per_node} is not the"
            f" {config.devices_per_node} devices of a node x {config.processes_per_device} processes; use"
            f" {wanted}, or set trainjob.devices_per_node in the profile"
        )
    if kind == "cpu" and parallel.processes_per_node > max(1.0, cores(config.cpu)):
        raise UserError(
            f"training.parallel.processes_per_node: {parallel.processes_per_node} is more than the {config.cpu}"
            " CPUs of a node; use fewer, or raise trainjob.cpu in the profile"
        )
    if training.attention in GPU_ATTENTION and kind != "cuda":
        raise UserError(
            f"training.attention: {training.attention!r} needs an NVIDIA GPU, and the nodes have {kind};"
            f" use auto, math, sdpa{' or flash' if kind == 'cpu' else ''}"
        )
    if training.precision == "fp8-mixed" and kind == "neuron":
        raise UserError("training.precision: 'fp8-mixed' does not run on Neuron devices; use bf16-mixed")
    if parallel.nodes > 1 and kind != "cpu" and not config.efa_per_node:
        logger.warning("trainjob.efa_per_node: 0, so %d nodes talk over TCP, which is slow", parallel.nodes)
