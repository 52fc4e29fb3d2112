"""The model as a rank trains it: loaded, given adapters where the method has them, and written out at the end.

peft and bitsandbytes are imported where a method needs them: training all weights does without.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from modelmill.components.finetuning import causal_lm
from modelmill.components.finetuning.causal_lm import SupervisedModel
from modelmill.components.finetuning.config import AdapterConfig, QuantizationConfig
from modelmill.components.finetuning.folders import ADAPTER_FOLDER, MODEL_FOLDER, copy_tokenizer
from modelmill.components.finetuning.packed_attention import attend_by_conversation
from modelmill.components.training.config import TrainingConfig
from modelmill.components.training.gathering import save_whole
from modelmill.components.training.pretrained import load_causal_lm

_CPU = torch.device("cpu")


def load(
    spec: Mapping[str, Any], training: TrainingConfig, *, packed: bool, device: torch.device = _CPU
) -> tuple[PreTrainedModel, list[str]]:
    """The base, with adapters where the method has them, and the names of the layers that got one.

    It lies on the CPU, except for 4-bit weights, which are made on `device`.
    """
    method, folder, dtype = spec["method"], spec["base"]["folder"], _dtype(spec["method"], training)
    attention = "eager" if training.attention == "math" else "sdpa"
    if method == "qlora":
        from modelmill.components.finetuning import quantization

        compute = torch.float32 if training.precision == "fp32" else torch.bfloat16
        config = QuantizationConfig.model_validate(spec["quantization"])
        model = quantization.load_quantized(
            folder, config, compute=compute, dtype=dtype, attention=attention, device=device
        )
    else:
        model = load_causal_lm(folder, dtype=dtype, parameter="base", attention=attention)
    causal_lm.check_model(model, packed=packed)
    if packed and device.type == "cpu":
        attend_by_conversation(model)
    if method == "full":
        return model, []
    from modelmill.components.finetuning import adapters

    adapter = AdapterConfig.model_validate(spec["adapter"])
    return model, adapters.add_adapters(model, adapter, dora=method == "dora", seed=training.seed)


def _dtype(method: str, training: TrainingConfig) -> torch.dtype | None:
    """Of the loaded base: what will be trained begins in full precision, a frozen base may stay as it was stored."""
    if method == "full" or training.precision == "fp32":
        return torch.float32
    # Without autocast the base must compute in what the adapters are in.
    return torch.bfloat16 if training.precision == "bf16-stochastic" else None


def export(supervised: SupervisedModel, names: list[str], spec: Mapping[str, Any], *, wanted: bool) -> Path:
    """Write what was trained; returns its folder. Called by all ranks together, one of them writes."""
    output, base, method = Path(spec["output"]), spec["base"], spec["method"]
    if method == "full":
        export_model(supervised, output / MODEL_FOLDER, Path(base["folder"]), wanted=wanted)
        return output / MODEL_FOLDER
    from modelmill.components.finetuning import adapters

    weights, folder = adapters.gather_adapters(supervised.model, wanted), output / ADAPTER_FOLDER
    if wanted:
        config = AdapterConfig.model_validate(spec["adapter"])
        record = adapters.peft_config(config, names, dora=method == "dora", base=base["name"])
        adapters.write_adapter(folder, weights, record)
    return folder


def is_output_matrix(name: str) -> bool:
    """Whether a parameter is a B, which LoRA+ (Hayou et al. 2024, arXiv:2402.12354) gives a higher learning rate."""
    return ".lora_B." in name


def sizes(model: PreTrainedModel) -> dict[str, int]:
    """Elements of all parameters, and of those that are trained; before the model is spread over ranks."""
    parameters = list(model.parameters())
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    return {"parameters": sum(map(_elements, parameters)), "trained_parameters": trained}


def _elements(parameter: nn.Parameter) -> int:
    """Weights that a parameter stands for; one of 4-bit weights is shaped as their bytes."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else int(state.shape.numel())


def describe(model: PreTrainedModel, method: str) -> dict[str, Any]:
    """Metadata of what is made of a model, before it is spread over ranks."""
    if method != "qlora":
        return {}
    from modelmill.components.finetuning import quantization

    return {"quantization": quantization.rounding_of(model)}


def export_model(supervised: SupervisedModel, folder: Path, base: Path, *, wanted: bool) -> None:
    """Write a Hugging Face folder with the base's tokenizer; called by all ranks together, one of them writes.

    Args:
        supervised: on any layout.
        folder: made if missing.
        base: whose tokenizer is copied.
        wanted: whether this rank writes.
    """
    save_whole(supervised.model, folder, wanted=wanted)
    if wanted:
        copy_tokenizer(base, folder)
