"""Which attention kernel a run uses: what is present here, and why the others are not.

`auto` takes the first one present of a fixed order and says so in the log; naming one that is absent is an error.
Every kernel computes the same attention, so the choice decides the speed and the last bits, never the model.
"""

from __future__ import annotations

import importlib.util
import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import get_args

import torch
from torch.nn.attention import SDPBackend

from modelmill.components.core.errors import UserError
from modelmill.components.training.attention_kernels import (
    AttentionKernel,
    DocumentwiseFlash,
    Flash3,
    Flex,
    ScaledDotProduct,
    Varlen,
)
from modelmill.components.training.options import GPU_ATTENTION, HALF_ATTENTION, WHOLE_ROW_ATTENTION, AttentionName

logger = logging.getLogger("modelmill")

# The order of `auto`. On a GPU cuDNN's kernel is never chosen unasked: its gradients are not reproducible. `sdpa` is
# for devices whose kernels register themselves with torch, and whose choice only torch knows.
_ORDER = {
    ("cpu", False): ("flash", "math"),
    ("cpu", True): ("flash", "math"),
    ("cuda", False): ("flash3", "flash", "efficient", "math"),
    ("cuda", True): ("flash3", "flex", "varlen", "math"),
}
_HALF = (torch.bfloat16, torch.float16)
_AMPERE, _HOPPER = (8, 0), (9, 0)


@dataclass(frozen=True)
class AttentionNeeds:
    """What a run asks of attention.

    Attributes:
        device: of the rank.
        dtype: that queries, keys and values arrive in.
        head_dim: size of a head.
        grouped: whether there are fewer key than query heads.
        masked: whether packed rows are masked by document.
        deterministic: whether the gradient must have the same bits every time.
    """

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    grouped: bool = False
    masked: bool = False
    deterministic: bool = False


def names() -> tuple[str, ...]:
    """Every kernel this package knows, present or not."""
    return tuple(name for name in get_args(AttentionName) if name != "auto")


def present(needs: AttentionNeeds) -> dict[str, str | None]:
    """Each known kernel with the reason why it cannot be used here, None when it can.

    Where only a call can tell, a tiny one is made, forward and backward; it draws no random numbers.
    """
    return {name: refusal(name, needs) for name in names()}


def refusal(name: str, needs: AttentionNeeds) -> str | None:
    """Why a kernel cannot be used here, or None."""
    return _unfit(name, needs) or _tried(name, needs)


def select(
    name: str, needs: AttentionNeeds, *, most_documents: Callable[[], int] | None = None, field: str = "training"
) -> AttentionKernel:
    """Choose the kernel of a run.

    Args:
        name: of `AttentionName`; `auto` takes the first one present of a fixed order and logs it.
        needs: what it must do here.
        most_documents: finds the number of documents a row holds at most; called only when rows are masked by a
            kernel that takes cumulative lengths, whose size must be known beforehand.
        field: section of the recipe, for messages.

    Raises:
        UserError: the named kernel cannot be used here; the line says why, and what can.
    """
    if name == "auto":
        order = _ORDER.get((needs.device.type, needs.masked), ("sdpa",))
        chosen = next((each for each in order if refusal(each, needs) is None), "math")
        logger.info("attention: %s (auto, on %s)", chosen, needs.device.type)
    elif (reason := refusal(name, needs)) is None:
        chosen = name
    else:
        usable = ", ".join(each for each, problem in present(needs).items() if problem is None)
        raise UserError(f"{field}.attention: {name!r} {reason}; present here: {usable}; use one of these or auto")
    most = most_documents() if most_documents and needs.masked and chosen in ("varlen", "flash3") else 1
    return make_kernel(chosen, needs, most)


def make_kernel(name: str, needs: AttentionNeeds, most: int = 1) -> AttentionKernel:
    """The kernel of a name, whether or not it can run here.

    Args:
        name: one of `names()`.
        needs: whose device and determinism it is made for.
        most: documents in a row at most.
    """
    if name == "flash" and needs.device.type == "cpu":
        return DocumentwiseFlash()
    if name == "flash3":
        return Flash3(most, needs.deterministic)
    others: dict[str, AttentionKernel] = {
        "math": ScaledDotProduct(SDPBackend.MATH),
        "sdpa": ScaledDotProduct(),
        "flash": ScaledDotProduct(SDPBackend.FLASH_ATTENTION),
        "efficient": ScaledDotProduct(SDPBackend.EFFICIENT_ATTENTION, grouped=False),
        "cudnn": ScaledDotProduct(SDPBackend.CUDNN_ATTENTION, grouped=False),
        "flex": Flex(),
        "varlen": Varlen(most),
    }
    return others[name]


def _unfit(name: str, needs: AttentionNeeds) -> str | None:
    """What can be told without a call."""
    kind = needs.device.type
    if name in GPU_ATTENTION and kind != "cuda":
        return f"needs an NVIDIA GPU, and this run is on {kind}" + (
            ", where it has no backward pass" if name == "flex" else ""
        )
    if name == "flash" and kind not in ("cpu", "cuda"):
        return f"needs a CPU or an NVIDIA GPU, and this run is on {kind}"
    if needs.masked and (name in WHOLE_ROW_ATTENTION or (name == "flash" and kind == "cuda")):
        return f"cannot mask documents on {kind}"
    if needs.deterministic and name == "cudnn":
        return "has no deterministic backward pass (training.deterministic)"
    if kind == "cuda" and (name in HALF_ATTENTION or name == "flash") and needs.dtype not in _HALF:
        return f"computes in bf16 or fp16, not in {str(needs.dtype).removeprefix('torch.')}"
    if kind == "cuda":
        return _missing(name, torch.cuda.get_device_capability(needs.device))
    return None


def _missing(name: str, capability: tuple[int, int]) -> str | None:
    """What a GPU of a compute capability, or its software, lacks for a kernel."""
    shown = ".".join(map(str, capability))
    if name == "flash3":
        if capability != _HOPPER:
            return f"needs a Hopper GPU (compute capability 9.0), and this one has {shown}"
        if importlib.util.find_spec("flash_attn_interface") is None:
            return "needs the package flash_attn_interface (FlashAttention-3)"
    if name in ("flash", "varlen") and capability < _AMPERE:
        return f"needs compute capability 8.0 or more, and this GPU has {shown}"
    if name == "varlen" and not _has_varlen():
        return f"needs a newer torch than {torch.__version__}"
    if name == "flex" and importlib.util.find_spec("triton") is None:
        return "needs the package triton to be compiled"
    return None


def _has_varlen() -> bool:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    return {"window_size", "enable_gqa"} <= set(inspect.signature(varlen_attn).parameters)


def _tried(name: str, needs: AttentionNeeds) -> str | None:
    """What a call on a few positions says; FlexAttention's would take a compilation and is left out."""
    if name in ("flex", "sdpa"):
        return None
    heads = (2, 1 if needs.grouped else 2)
    query, key = (
        torch.zeros(1, count, 16, needs.head_dim, dtype=needs.dtype, device=needs.device, requires_grad=True)
        for count in heads
    )
    documents = torch.zeros(1, 16, dtype=torch.int64, device=needs.device) if needs.masked else None
    try:
        with torch.enable_grad():
            make_kernel(name, needs).plan(documents)(query, key, key).sum().backward()
    except (RuntimeError, ImportError, TypeError) as error:
        return f"fails here ({str(error).strip().splitlines()[0].rstrip('.')})"
    return None
