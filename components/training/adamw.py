"""AdamW for weights and moments that are not all fp32: stochastic rounding to bf16, and moments in 8 bits.

The update is that of Loshchilov & Hutter 2019 (arXiv:1711.05101), as `torch.optim.AdamW` computes it, in fp32 (in the
parameters' own precision when that is higher), on the part of each parameter that lies on this rank. Parameters are
updated one after the other and in pieces, so that no fp32 copy of all weights or moments ever exists.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from modelmill.components.training.config import OptimizerState
from modelmill.components.training.quantized_state import BLOCK, dequantize, quantize, quantized_zeros
from modelmill.components.training.rounding import round_stochastic
from modelmill.components.training.shards import local_part

MOMENTS = {"exp_avg": True, "exp_avg_sq": False}  # name, as torch's AdamW calls them, and whether it has a sign
MIN_QUANTIZED = 4096  # elements; of smaller tensors the moments are cheap, and often the more sensitive
# Numbers updated at once, whole blocks: about the second-level cache of a CPU core, enough to fill an accelerator.
_PIECE = {"cpu": 2**16}
_ACCELERATOR_PIECE = 2**24


class AdamW(torch.optim.Optimizer):
    """AdamW on this rank's part of each parameter.

    Its state is kept and taken back by `portable_state` and `load_portable_state`, as `Checkpoints` does. Do not use
    torch's `load_state_dict`, which casts every state tensor to the parameter's dtype.

    Attributes:
        found_inf: None, or a device scalar: while it is not zero, `step` changes no bit of weights, moments and step
            counters, whatever the gradients hold, and nothing waits for the device.
        steps: calls of `step` so far. Decides the random bits of the next one; a run that resumes sets it.
    """

    found_inf: Tensor | None

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        state: OptimizerState = "fp32",
        stochastic_rounding: bool = False,
        seed: int = 0,
    ) -> None:
        """
        Args:
            params: parameters or groups of them, plain or distributed; bf16, fp32 or fp64.
            lr: learning rate.
            betas: decay of the two moments.
            eps: added to the root of the second moment.
            weight_decay: decoupled weight decay.
            state: "8bit" keeps the moments of matrices of at least 4096 elements in 8 bits (see `quantized_state`),
                and those of vectors and small matrices in fp32.
            stochastic_rounding: round bf16 weights stochastically, and their moments, which then are bf16 too unless
                they are in 8 bits or exempt from that. Without it bf16 weights are rounded to nearest.
            seed: of the random bits, which are a function of seed, step and parameter: ranks that hold the same part
                of a parameter round it alike.
        """
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.quantized, self.stochastic_rounding, self.seed = state == "8bit", stochastic_rounding, seed
        self.found_inf, self.steps = None, 0
        self._generators: dict[torch.device, torch.Generator] = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; returns what `closure`, called first, gives."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        parameters = [(group, parameter) for group in self.param_groups for parameter in group["params"]]
        for index, (group, parameter) in enumerate(parameters):
            if parameter.grad is not None:
                self._update(parameter, group, index)
        self.steps += 1
        return loss

    def _update(self, parameter: nn.Parameter, group: dict[str, Any], index: int) -> None:
        weight, gradient = local_part(parameter), local_part(parameter.grad).reshape(-1)  # type: ignore[arg-type]
        state = self.state[parameter]
        if not state:
            state.update(self._first_state(parameter))
        skip = None if self.found_inf is None else self.found_inf.to(weight.device) != 0
        generator = self._generator(parameter, index)
        wide = torch.promote_types(weight.dtype, torch.float32)
        step = state["step"] + 1
        rule = _update_rule(group, step.to(wide))
        flat = weight.reshape(-1)  # a view, but of oddly strided parts a copy
        for part in _pieces(flat):
            moments = [_read(state, name, part).to(wide) for name in MOMENTS]
            new, *moments = rule(flat[part].to(wide), gradient[part].to(wide), *moments)
            _store(flat[part], self._narrow(new, flat.dtype, generator), skip)
            for name, moment in zip(MOMENTS, moments, strict=True):
                self._write(state, name, part, moment, skip, generator)
        if flat.data_ptr() != weight.data_ptr():
            weight.copy_(flat.view_as(weight))
        _store(state["step"], step, skip)

    def _first_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        weight = local_part(parameter)
        state = {"step": torch.zeros((), dtype=torch.float32, device=weight.device)}
        for name, signed in MOMENTS.items():
            if self.quantized and parameter.dim() > 1 and parameter.numel() >= MIN_QUANTIZED:
                state[name], state[_scale(name)] = quantized_zeros(weight.numel(), signed=signed, device=weight.device)
            else:
                narrow = self.stochastic_rounding and not self.quantized and weight.dtype == torch.bfloat16
                dtype = torch.bfloat16 if narrow else torch.promote_types(weight.dtype, torch.float32)
                state[name] = torch.zeros(weight.numel(), dtype=dtype, device=weight.device)
        return state

    def _narrow(self, value: Tensor, dtype: torch.dtype, generator: torch.Generator | None) -> Tensor:
        if dtype == torch.bfloat16 and self.stochastic_rounding:
            return round_stochastic(value, generator)
        return value.to(dtype)

    def _write(
        self,
        state: dict[str, Tensor],
        name: str,
        part: slice,
        moment: Tensor,
        skip: Tensor | None,
        generator: torch.Generator | None,
    ) -> None:
        if _scale(name) in state:
            codes, scales = quantize(moment.float(), signed=MOMENTS[name])
            _store(state[name][part], codes, skip)
            _store(state[_scale(name)][_blocks(part)], scales, skip)
        else:
            _store(state[name][part], self._narrow(moment, state[name].dtype, generator), skip)

    def _generator(self, parameter: nn.Parameter, index: int) -> torch.Generator | None:
        """Random bits for this step of this parameter's part, the same on every rank that holds the same part."""
        device = parameter.device
        if not self.stochastic_rounding or parameter.dtype != torch.bfloat16 or device.type == "neuron":
            return None
        place: list[int] = []
        if isinstance(parameter, DTensor):
            coordinates = tuple(parameter.device_mesh.get_coordinate() or ())
            placements = zip(coordinates, parameter.placements, strict=True)
            # Not is_shard, which a strided part (tensor parallelism below FSDP) denies.
            place = [coordinate for coordinate, placement in placements if not placement.is_replicate()]
        words = (self.seed, self.steps, index, *place)
        digest = hashlib.blake2b(struct.pack(f"<{len(words)}q", *words), digest_size=8).digest()
        generator = self._generators.setdefault(device, torch.Generator(device))
        return generator.manual_seed(int.from_bytes(digest, "little") >> 1)

    def portable_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """See `checkpoint.PortableOptimizer`: the moments as they are, those in 8 bits as the fp32 they stand for."""
        state = self.state.get(parameter)
        if not state:
            return {}
        part = slice(0, state["exp_avg"].numel())
        shape = local_part(parameter).shape
        return {"step": state["step"], **{name: _read(state, name, part).view(shape) for name in MOMENTS}}

    @torch.no_grad()
    def load_portable_state(self, parameter: nn.Parameter, state: dict[str, Tensor]) -> None:
        """See `checkpoint.PortableOptimizer`: moments of another layout's blocks are quantised again."""
        own = self._first_state(parameter)
        own["step"].copy_(state["step"])
        for name, signed in MOMENTS.items():
            value = state[name].reshape(-1)
            if _scale(name) not in own:
                own[name].copy_(value)
                continue
            for part in _pieces(value):
                own[name][part], own[_scale(name)][_blocks(part)] = quantize(value[part].float(), signed=signed)
        self.state[parameter] = own


def _update_rule(group: dict[str, Any], step: Tensor) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """AdamW for pieces (weight, gradient, moments) of a parameter, to new ones; `step` counts from 1 on the device."""
    rate, eps, decay = group["lr"], group["eps"], group["weight_decay"]
    beta1, beta2 = group["betas"]
    # expm1 keeps the digits that 1 - beta^step loses when beta is near 1.
    logs = (math.log(beta) if beta else -math.inf for beta in (beta1, beta2))
    correction1, correction2 = (-torch.expm1(step * log) for log in logs)
    size, root = rate / correction1, correction2.sqrt()

    def rule(weight: Tensor, gradient: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        first = first.lerp(gradient, 1 - beta1)
        second = (second * beta2).addcmul_(gradient, gradient, value=1 - beta2)
        change = first / (second.sqrt() / root + eps)
        return (weight * (1 - rate * decay)).sub_(change.mul_(size)), first, second

    return rule


def _pieces(flat: Tensor) -> Iterator[slice]:
    size = _PIECE.get(flat.device.type, _ACCELERATOR_PIECE)
    for start in range(0, flat.numel(), size):
        yield slice(start, min(start + size, flat.numel()))


def _blocks(part: slice) -> slice:
    """Blocks of a piece, which begins with a block."""
    return slice(part.start // BLOCK, -(-part.stop // BLOCK))


def _scale(name: str) -> str:
    return f"{name}_scale"


def _read(state: dict[str, Tensor], name: str, part: slice) -> Tensor:
    if _scale(name) in state:
        return dequantize(state[name][part], state[_scale(name)][_blocks(part)], signed=MOMENTS[name])
    return state[name][part]


def _store(target: Tensor, value: Tensor, skip: Tensor | None) -> None:
    """Copy, but not where `skip`, a scalar on the device, is true."""
    target.copy_(value if skip is None else torch.where(skip, target, value))
