"""Low-rank adapters: the layers, files and merging of `peft`, and what makes them part of our training runs.

LoRA (Hu et al. 2021, arXiv:2106.09685) adds (alpha / rank) B A to a frozen weight W, with A uniform and B zero at
the start, so that training begins at the base. DoRA (Liu et al. 2024, arXiv:2402.09353) learns the length of every row
of W + (alpha / rank) B A beside its direction; the norm it divides by counts as a constant (section 4.3).

First weights are a function of the seed and the layer's name, on every layout and whatever else drew random numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from modelmill.components.core.errors import UserError
from modelmill.components.finetuning.config import AdapterConfig
from modelmill.components.training.gathering import whole
from modelmill.components.training.initialize import init_uniform

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"
_NAME = "default"  # peft's name for a model's only adapter
_PREFIX = "base_model.model."  # of every name in a peft file


def add_adapters(model: PreTrainedModel, config: AdapterConfig, *, dora: bool, seed: int) -> list[str]:
    """Freeze a model of transformers and put adapters into its linear layers, in place.

    Args:
        model: with its weights, which may be 4-bit for LoRA; on any device, not distributed.
        config: which layers, and the adapters' sizes.
        dora: whether row lengths are learnt as well.
        seed: of the first weights.

    Returns:
        Names of the layers.

    Raises:
        UserError: a target matches no linear layer.
    """
    names = find_targets(model, config)
    model.requires_grad_(False)
    inject_adapter_in_model(peft_config(config, names, dora=dora), model)
    for name, layer in adapters(model):
        _start(layer, f"{name}.lora_A", seed)
    return names


def peft_config(config: AdapterConfig, names: list[str], *, dora: bool, base: str = "") -> LoraConfig:
    """An adapter in peft's words; its layers are named in full, as the end of a name may fit other layers too."""
    settings: dict[str, Any] = {
        "r": config.rank,
        "lora_alpha": int(config.alpha) if config.alpha.is_integer() else config.alpha,
        "lora_dropout": config.dropout,
        "use_dora": dora,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
    }
    record = LoraConfig(**settings)
    record.target_modules = names  # set later, it stays a list and is written in this order
    return record


@torch.no_grad()
def _start(layer: Any, name: str, seed: int) -> None:
    """Begin at the base; adapters over narrow weights are fp32, as what is trained needs its small updates."""
    for parameter in layer.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
    # peft's start: uniform over +-1/sqrt(in_features), which is Kaiming's with a = sqrt(5).
    init_uniform(layer.lora_A[_NAME].weight, name=name, seed=seed, bound=1 / math.sqrt(layer.in_features))
    for length in layer.lora_magnitude_vector.values():
        rows = layer.get_base_layer().weight.to(length.weight.dtype)
        length.weight.copy_(torch.linalg.vector_norm(rows, dim=1))


def find_targets(model: PreTrainedModel, config: AdapterConfig) -> list[str]:
    """Names of the linear layers that get an adapter.

    Raises:
        UserError: a target matches none.
    """
    head = model.get_output_embeddings()
    linear = [n for n, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head]
    if config.targets == "all-linear":
        found = linear
    else:
        for target in config.targets:
            if not any(_ends_with(name, target) for name in linear):
                known = ", ".join(sorted({name.rpartition(".")[2] for name in linear})) or "none"
                raise UserError(
                    f"adapter.targets: {target!r} matches no linear layer of {type(model).__name__}; it has {known}"
                )
        found = [name for name in linear if any(_ends_with(name, target) for target in config.targets)]
    if not found:
        raise UserError(
            f"adapter.targets: {type(model).__name__} has no linear layer besides its head; use method full"
        )
    return found


def adapters(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """A model's adapters by the name of the layer they stand in for."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            yield name, module


@torch.no_grad()
def gather_adapters(model: PreTrainedModel, wanted: bool) -> dict[str, Tensor]:
    """The adapters' weights by `peft`'s names, on the CPU; called by all ranks together, {} where not wanted."""
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            weight = whole(parameter)
            found[name] = weight.cpu().contiguous() if wanted else torch.empty(0)
    if not wanted:
        return {}
    state = get_peft_model_state_dict(model, state_dict=found, save_embedding_layers=False)
    return {f"{_PREFIX}{name}": weight for name, weight in state.items()}


def write_adapter(folder: Path, weights: dict[str, Tensor], record: LoraConfig) -> None:
    """Write a folder that `peft.PeftModel.from_pretrained` reads, from `gather_adapters` and `peft_config`."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / WEIGHTS_NAME, metadata={"format": "pt"})
    record.inference_mode = True
    record.save_pretrained(str(folder))


def load_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Put the adapters of a folder into their base, in place.

    Args:
        model: the base, on the CPU.
        folder: from `write_adapter`, or any LoRA adapter of peft.

    Raises:
        UserError: the folder holds no LoRA adapter, or one that does not fit the model.
    """
    try:
        if not (folder / CONFIG_NAME).is_file():
            raise OSError(f"no {CONFIG_NAME}")  # peft would ask the Hub for it
        record = PeftConfig.from_pretrained(str(folder))
        weights = load_file(folder / WEIGHTS_NAME)
        if not isinstance(record, LoraConfig):
            raise TypeError(f"peft_type {record.peft_type}")
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(f"adapter: {folder} holds no LoRA adapter ({error}); give the output of finetune") from None
    try:
        inject_adapter_in_model(record, model)
        told: Any = set_peft_model_state_dict(model, weights)
    except (ValueError, RuntimeError, KeyError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(f"adapter: {folder} does not fit {type(model).__name__} ({reason})") from None
    wrong = sorted([name for name in told.missing_keys if ".lora_" in name] + told.unexpected_keys)
    if wrong:
        raise UserError(f"adapter: {folder} and its configuration differ in {wrong[0]} ({len(wrong)} in all)")


@torch.no_grad()
def merge(model: PreTrainedModel) -> None:
    """Put the adapters into the weights and the plain layers back into their places."""
    for name, layer in list(adapters(model)):
        layer.merge()
        model.set_submodule(name, layer.get_base_layer())
    del model.peft_config


def _ends_with(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")
