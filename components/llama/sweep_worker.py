"""One mode of the activation sweep in a process of its own: `python -m modelmill.components.llama.sweep_worker`.

The first line of input is the mode's job. The answer to it is what does not depend on time; every further line asks
for one timed step. Answers are JSON lines; `{"problem": ...}` is a mistake of the user's.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from modelmill.components.core.errors import UserError
from modelmill.components.llama.model import LlamaDecoder
from modelmill.components.llama.sweep_config import ActivationSweepConfig
from modelmill.components.training import activations
from modelmill.components.training.accelerator import select_accelerator
from modelmill.components.training.memory_tracker import saved_for_backward, track
from modelmill.components.training.options import ActivationMemory, MemoryBudget
from modelmill.components.training.processes import die_with_parent, leave_now

# Compiled blocks order their sums differently: relative to the largest entry of a gradient.
_TOLERANCE = {"fp32": 1e-4, "bf16-mixed": 5e-2}
_WARM_UP = 2


def _attention_flops(query: Sequence[int], key: Sequence[int], *_: Any, **__: Any) -> int:
    """Operations of the two products of attention, of shapes [B, H, T, Dh] and [B, K, S, Dh], no mask discounted."""
    batch, heads, length, size = query
    return 4 * batch * heads * length * key[2] * size


def _attention_backward_flops(
    gradient: Sequence[int], query: Sequence[int], key: Sequence[int], *_: Any, **__: Any
) -> int:
    """The scores again, and two products for each of the two of the forward pass."""
    return _attention_flops(query, key) * 5 // 2


# torch's counter knows the GPU kernels only.
_FORMULAS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}


class Measured:
    """A decoder with a mode, and what is measured of it."""

    def __init__(self, config: ActivationSweepConfig, mode: ActivationMemory) -> None:
        sweep = config.sweep
        self.mode, self.precision = mode, sweep.precision
        self.accelerator = select_accelerator(sweep.accelerator, 1, sweep.precision)
        self.device = self.accelerator.device(0)
        torch.use_deterministic_algorithms(True)
        self.model = LlamaDecoder(config.model, device=self.device, seed=sweep.seed)
        shape = (sweep.micro_batch_size, sweep.sequence_length + 1)
        generator = torch.Generator().manual_seed(sweep.seed)
        rows = torch.randint(config.model.known_vocab_size, shape, generator=generator).to(self.device)
        self.tokens, self.targets = rows[:, :-1], rows[:, 1:]
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def forward(self) -> Tensor:
        autocast = self.precision == "bf16-mixed"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=autocast):
            return self.model(self.tokens, self.targets)

    def step(self) -> None:
        """Forward and backward pass, the gradients made anew."""
        self.model.zero_grad(set_to_none=True)
        self.forward().backward()

    def properties(self) -> dict[str, Any]:
        """Everything but the time.

        Raises:
            RuntimeError: the gradients of the mode are not those of the untouched model.
            UserError: the machine cannot do the mode.
        """
        plain_flops = self._flops()
        expected = self._gradients()
        activations.apply(self.model, self.mode)
        difference = max(_difference(a, b) for a, b in zip(self._gradients(), expected, strict=True))
        del expected
        allowed = _TOLERANCE[self.precision] if isinstance(self.mode, MemoryBudget) else 0.0
        if not difference <= allowed:
            raise RuntimeError(f"the gradients differ by {difference:.2e}, more than {allowed:g}")
        self.model.zero_grad(set_to_none=True)
        loss, saved = saved_for_backward(self.forward, self.device)
        del loss
        with track(self.device) as use:
            self.step()
        # Compiled code runs past the counter.
        recomputed = None if isinstance(self.mode, MemoryBudget) else self._flops() - plain_flops
        return {
            "saved_bytes": saved,
            "peak_bytes": use.peak,
            "step_flops": plain_flops,
            "recomputed_flops": recomputed,
            "gradient_difference": difference,
            "device": self.accelerator.device_name(),
        }

    def seconds(self) -> float:
        """Time of one step."""
        self.accelerator.synchronize()
        began = time.perf_counter()
        self.step()
        self.accelerator.synchronize()
        return time.perf_counter() - began

    def _flops(self) -> int:
        with FlopCounterMode(display=False, custom_mapping=_FORMULAS) as counter:
            self.step()
        return counter.get_total_flops()

    def _gradients(self) -> list[Tensor]:
        self.step()
        return [parameter.grad.clone() for parameter in self.parameters if parameter.grad is not None]


def _difference(found: Tensor, expected: Tensor) -> float:
    """Largest difference relative to the largest entry; 0 only for the same bits."""
    if torch.equal(found, expected):
        return 0.0
    largest = expected.abs().max().clamp(min=torch.finfo(expected.dtype).tiny)
    return float((found - expected).abs().max() / largest)


def main(lines: Callable[[], str], say: Callable[[dict[str, Any]], None]) -> None:
    """Answer lines until there are no more."""
    job = json.loads(lines())
    config = ActivationSweepConfig.model_validate(job["config"])
    torch.set_num_threads(job["threads"])
    try:
        measured = Measured(config, config.sweep.modes[job["index"]])
        say(measured.properties())
    except UserError as error:
        say({"problem": str(error)})
        return
    for _ in range(_WARM_UP):
        measured.step()
    while lines():
        say({"seconds": measured.seconds()})


def _serve() -> None:
    die_with_parent()
    # Libraries print to stdout as they like; answers go out on a descriptor of their own.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    main(sys.stdin.readline, lambda answer: print(json.dumps(answer), file=out, flush=True))
    leave_now(0)


if __name__ == "__main__":
    _serve()
