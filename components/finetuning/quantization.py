"""4-bit bases: QLoRA (Dettmers et al. 2023, arXiv:2305.14314) through bitsandbytes, on CPUs and NVIDIA GPUs.

Every linear layer but the head keeps 4-bit NormalFloat weights in blocks of 64 with one scale each; a product rounds
them up to the compute precision as it runs. They are stored as bf16, of which only the bits count: that is a type that
FSDP2 can share out and gathers without a cast.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from modelmill.components.core.errors import UserError
from modelmill.components.finetuning.config import QuantizationConfig
from modelmill.components.training.pretrained import load_causal_lm, stored_dtype

_DEVICES = ("cpu", "cuda")


def load_quantized(
    folder: Path | str,
    config: QuantizationConfig,
    *,
    compute: torch.dtype,
    dtype: torch.dtype | None,
    device: torch.device,
    attention: str = "sdpa",
) -> PreTrainedModel:
    """Load a model and quantise it tensor by tensor, so that it never lies in memory whole.

    Args:
        folder: a Hugging Face folder.
        config: how.
        compute: dtype of products.
        dtype: of what is not quantised, and what 4-bit weights are rounded up to; None keeps the checkpoint's.
        device: where it will be; the devices' kernels may round ties differently.
        attention: `sdpa` or `eager`.

    Raises:
        UserError: the device has no kernels, the weights are fp64, the model has no layer to quantise, or
            `load_causal_lm` refuses the folder.
    """
    if device.type not in _DEVICES:
        raise UserError(
            f"method: bitsandbytes has no 4-bit kernels that train on {device.type!r}; use method lora, or a"
            f" device of {', '.join(_DEVICES)}"
        )
    options = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=config.double,
        bnb_4bit_compute_dtype=compute,
        bnb_4bit_quant_storage=torch.bfloat16,
    )
    if stored_dtype(folder) == torch.float64:
        raise UserError(f"method: {folder} holds fp64 weights, which qlora would narrow twice; use lora")
    # Left out, transformers takes a GPU for the device map, even where the run was told to use the CPU.
    model = load_causal_lm(
        folder,
        dtype=dtype,
        parameter="base",
        attention=attention,
        quantization_config=options,
        device_map={"": device},
    )
    layers = list(four_bit_layers(model))
    if not layers:
        raise UserError(f"method: {type(model).__name__} has no linear layer to quantise; use method full")
    for layer in layers:
        # In evaluation mode on some CPUs a product repacks the weights for good, into bf16 scales and a layout that
        # has no backward pass: a run that validates would go on with gradients of zero.
        layer.support_avx512bf16_for_cpu = False
        if layer.bias is not None:  # a product would do this to it, beside the back of FSDP2
            layer.bias.data = layer.bias.data.to(compute)
    return model


def four_bit_layers(model: nn.Module) -> Iterator[Linear4bit]:
    """The quantised layers of a model."""
    return (module for module in model.modules() if isinstance(module, Linear4bit))


def rounding_of(model: nn.Module) -> dict[str, Any]:
    """How a quantised model was rounded, for metadata and for `load_as_rounded`."""
    layer = next(four_bit_layers(model))
    weight: Any = layer.weight
    state = weight.quant_state
    return {
        "type": state.quant_type,
        "double": state.nested,
        "block_size": state.blocksize,
        "compute_dtype": _name(layer.compute_dtype),
        "weights_dtype": _name(state.dtype),
    }


def load_as_rounded(folder: Path | str, rounding: dict[str, Any]) -> PreTrainedModel:
    """The plain fp32 model that a quantised one computes: its weights rounded to 4 bits and written out again.

    Args:
        folder: the base.
        rounding: from `rounding_of`.
    """
    model = load_quantized(
        folder,
        QuantizationConfig(double=rounding["double"]),
        compute=getattr(torch, rounding["compute_dtype"]),
        dtype=getattr(torch, rounding["weights_dtype"]),
        device=torch.device("cpu"),
    )
    model.dequantize(dtype=torch.float32)
    for parameter in model.parameters():
        parameter.data = parameter.data.float()
    return model


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
