"""Attention timed, weighed and checked: one shape of inputs, every kernel present."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from modelmill.components.training.accelerator import Accelerator
from modelmill.components.training.attention import AttentionNeeds, make_kernel, refusal
from modelmill.components.training.attention_kernels import Attend
from modelmill.components.training.memory_tracker import track

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_MOST_CALLS = 1000
_QUERIES_AT_ONCE = 1024  # of the reference, whose scores in float64 would not fit otherwise


@dataclass(frozen=True)
class Case:
    """One shape of attention.

    Attributes:
        dtype: fp32, bf16 or fp16.
        sequence_length: T.
        rows: B.
        head_dim: Dh.
        num_heads: H.
        kv_heads: K.
        document_length: tokens of the documents a row is cut into, the last one shorter; None for whole rows.
    """

    dtype: str
    sequence_length: int
    rows: int
    head_dim: int
    num_heads: int
    kv_heads: int
    document_length: int | None

    @property
    def lengths(self) -> list[int]:
        """Tokens of the documents of a row."""
        whole, rest = divmod(self.sequence_length, self.document_length or self.sequence_length)
        return [self.document_length or self.sequence_length] * whole + [rest] * (rest > 0)

    @property
    def forward_flops(self) -> float:
        """Floating-point operations of the two products of a forward pass, half of each counted for the causal mask.

        `4 x B x H x Dh x sum(L^2) / 2` over the documents' lengths L: FlashAttention's convention (Dao et al. 2022,
        arXiv:2205.14135), which leaves out the softmax. The backward pass counts 2.5 times as much: five products,
        one of them made again. (`LlamaConfig.flops_per_token` does not halve, which is the convention of MFU.)
        """
        pairs = sum(length**2 for length in self.lengths) / 2
        return 4 * self.rows * self.num_heads * self.head_dim * pairs

    def documents(self, device: torch.device) -> Tensor | None:
        """Document ids [B, T], or None for whole rows."""
        if self.document_length is None:
            return None
        ids = torch.arange(self.sequence_length, device=device) // self.document_length
        return ids.expand(self.rows, -1).contiguous()


@dataclass(frozen=True)
class Inputs:
    """Queries [B, H, T, Dh], keys and values [B, K, T, Dh], and the gradient of the output [B, H, T, Dh]."""

    query: Tensor
    key: Tensor
    value: Tensor
    gradient: Tensor

    @classmethod
    def draw(cls, case: Case, device: torch.device, seed: int) -> Inputs:
        """Standard normal values, laid out as a fused projection leaves them: heads within positions."""
        generator = torch.Generator().manual_seed(seed)

        def heads(count: int) -> Tensor:
            shape = (case.rows, case.sequence_length, count, case.head_dim)
            return torch.randn(shape, generator=generator).to(device, DTYPES[case.dtype]).transpose(1, 2)

        query, key, value, gradient = map(heads, (case.num_heads, case.kv_heads, case.kv_heads, case.num_heads))
        return cls(query.requires_grad_(), key.requires_grad_(), value.requires_grad_(), gradient)

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.query, self.key, self.value


def exact_row(case: Case, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output and gradients of query, key and value of the batch's first row in float64, each [heads, T, Dh]."""
    groups = case.num_heads // case.kv_heads
    query, key, value = (leaf[0].detach().double().requires_grad_() for leaf in inputs.leaves)
    documents = case.documents(query.device)
    ids = torch.zeros(case.sequence_length, device=query.device) if documents is None else documents[0]
    position = torch.arange(case.sequence_length, device=query.device)
    outputs = torch.empty_like(query, requires_grad=False)
    for begin in range(0, case.sequence_length, _QUERIES_AT_ONCE):
        part = slice(begin, min(begin + _QUERIES_AT_ONCE, case.sequence_length))
        hidden = (position[part, None] < position) | (ids[part, None] != ids)
        for head in range(case.num_heads):
            scores = query[head, part] @ key[head // groups].T / math.sqrt(case.head_dim)
            output = scores.masked_fill(hidden, -math.inf).softmax(-1) @ value[head // groups]
            output.backward(inputs.gradient[0, head, part].double())
            outputs[head, part] = output.detach()
    gradients = [leaf.grad for leaf in (query, key, value)]
    return outputs, *gradients  # type: ignore[return-value]


def measure(
    case: Case, names: tuple[str, ...], accelerator: Accelerator, *, repeats: int, min_seconds: float, **options: Any
) -> Iterator[dict[str, Any]]:
    """A record for each kernel: its figures, or under `absent` the reason why it has none.

    Args:
        case: what is computed.
        names: of the kernels.
        accelerator: where.
        repeats: timings of each pass.
        min_seconds: shortest timing.
        options: `deterministic` and `seed`.
    """
    device = accelerator.device(0)
    needs = AttentionNeeds(
        device,
        DTYPES[case.dtype],
        case.head_dim,
        grouped=case.kv_heads != case.num_heads,
        masked=case.document_length is not None,
        deterministic=options["deterministic"],
    )
    reasons = {name: refusal(name, needs) for name in names}
    inputs, documents = Inputs.draw(case, device, options["seed"]), case.documents(device)
    exact = exact_row(case, inputs)
    found: dict[str, dict[str, Any]] = {}
    calls: dict[str, Attend] = {}
    for name in names:
        if reasons[name] is None:
            try:
                calls[name] = make_kernel(name, needs, len(case.lengths)).plan(documents)
                found[name] = _errors(calls[name], inputs, exact) | _memory(calls[name], inputs, device)
            except (RuntimeError, NotImplementedError) as error:  # out of memory, or a shape it does not take
                reasons[name] = f"fails on this shape ({str(error).strip().splitlines()[0]})"
                calls.pop(name, None)
    timings = _take_turns(calls, inputs, accelerator, repeats, min_seconds)
    for name in names:
        result = {"absent": reasons[name]} if reasons[name] else {**found[name], **_speed(case, timings[name])}
        yield {"kernel": name, **asdict(case), **result}


def _both_ways(attend: Attend, inputs: Inputs) -> tuple[Tensor, ...]:
    output = attend(*inputs.leaves)
    return output, *torch.autograd.grad(output, inputs.leaves, inputs.gradient)


def _errors(attend: Attend, inputs: Inputs, exact: tuple[Tensor, ...]) -> dict[str, float]:
    """Largest difference from the exact output, and from the exact gradients over their largest value."""
    found = [tensor[0].detach().double() for tensor in _both_ways(attend, inputs)]
    gradients = zip(found[1:], exact[1:], strict=True)
    worst = max(((mine - right).abs().amax() / right.abs().amax()).item() for mine, right in gradients)
    return {"max_error": (found[0] - exact[0]).abs().amax().item(), "max_gradient_error": worst}


def _memory(attend: Attend, inputs: Inputs, device: torch.device) -> dict[str, int]:
    """Most bytes of tensors at once, inputs not counted."""
    with track(device) as forward:
        output = attend(*inputs.leaves)
    del output
    with track(device) as both:
        _both_ways(attend, inputs)
    return {"forward_peak_bytes": forward.peak, "peak_bytes": both.peak}


def _take_turns(
    calls: Mapping[str, Attend], inputs: Inputs, accelerator: Accelerator, repeats: int, min_seconds: float
) -> dict[str, dict[str, list[float]]]:
    """Seconds of a call, kernel by kernel within each round, so that a slow moment of the machine falls on all."""
    passes: dict[str, Callable[[Attend], object]] = {
        "forward": lambda attend: attend(*inputs.leaves),
        "both": lambda attend: _both_ways(attend, inputs),
    }
    seconds: dict[str, dict[str, list[float]]] = {name: {kind: [] for kind in passes} for name in calls}
    counts: dict[tuple[str, str], int] = {}
    for turn in range(repeats + 1):
        for name, attend in calls.items():
            for kind, run in passes.items():
                count = counts.get((name, kind), 1)
                accelerator.synchronize()
                began = time.perf_counter()
                for _ in range(count):
                    run(attend)
                accelerator.synchronize()
                each = (time.perf_counter() - began) / count
                if turn:
                    seconds[name][kind].append(each)
                else:  # the first one warms up, and says how often a pass must run to be timed
                    counts[name, kind] = max(1, min(_MOST_CALLS, math.ceil(min_seconds / each)))
    return seconds


def _speed(case: Case, seconds: Mapping[str, list[float]]) -> dict[str, float]:
    """Median and interquartile range of the seconds, and operations a second by `Case.forward_flops`."""
    speed = {}
    for kind, label, work in (("forward", "forward", 1.0), ("both", "forward_backward", 3.5)):
        median = statistics.median(seconds[kind])
        quarters = statistics.quantiles(seconds[kind], n=4, method="inclusive")
        speed[f"{label}_seconds"] = median
        speed[f"{label}_spread_seconds"] = quarters[2] - quarters[0]
        speed[f"{label}_tflops"] = work * case.forward_flops / median / 1e12
    return speed
