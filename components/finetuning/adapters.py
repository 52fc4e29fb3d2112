"""Low-rank adapters of linear layers: LoRA and DoRA, read and written in the form of `peft`.

LoRA (Hu et al. 2021, arXiv:2106.09685) adds (alpha / rank) B A to a frozen weight W, with A uniform and B zero at
the start, so that training begins at the base. DoRA (Liu et al. 2024, arXiv:2402.09353) learns the length of every row
of W + (alpha / rank) B A beside its direction; the norm it divides by counts as a constant (section 4.3).

They are modules of ours and not `peft`'s: first weights are a function of the seed and the layer's name on every
layout, sharding finds plain parameters, and a training image needs no further package.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from modelmill.components.core.errors import UserError
from modelmill.components.finetuning.config import AdapterConfig
from modelmill.components.training.initialize import init_uniform

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."  # of every name in a peft file
# Settings of peft that change what an adapter computes, and the values with which it is what it is here.
_PLAIN: dict[str, Any] = {
    "peft_type": "LORA",
    "use_rslora": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "bias": "none",
    "fan_in_fan_out": False,
    "modules_to_save": None,
    "layers_to_transform": None,
}
_OUTPUT = "lora_B.weight"  # the matrix that LoRA+ trains faster


class LoraLinear(nn.Module):
    """A frozen linear layer with a low-rank addition; same inputs and outputs as the layer."""

    def __init__(self, base_layer: nn.Linear, config: AdapterConfig) -> None:
        super().__init__()
        weight = base_layer.weight
        wide = torch.promote_types(weight.dtype, torch.float32)
        options: dict[str, Any] = {"bias": False, "device": weight.device, "dtype": wide}
        self.base_layer = base_layer
        self.lora_A = nn.Linear(base_layer.in_features, config.rank, **options)
        self.lora_B = nn.Linear(config.rank, base_layer.out_features, **options)
        self.dropout = nn.Dropout(config.dropout)
        self.scaling = config.alpha / config.rank

    def forward(self, hidden: Tensor) -> Tensor:
        return self.base_layer(hidden) + self._added(self.dropout(hidden))

    def _added(self, hidden: Tensor) -> Tensor:
        return self.lora_B(self.lora_A(hidden)) * self.scaling

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """Weight [out, in] of the plain layer that computes the same."""
        return self.base_layer.weight + self.scaling * (self.lora_B.weight @ self.lora_A.weight)


class DoraLinear(LoraLinear):
    """The same with learnt row lengths."""

    def __init__(self, base_layer: nn.Linear, config: AdapterConfig) -> None:
        super().__init__(base_layer, config)
        norms = torch.linalg.vector_norm(base_layer.weight.detach().to(self.lora_A.weight.dtype), dim=1)
        self.lora_magnitude_vector = nn.Parameter(norms)

    def forward(self, hidden: Tensor) -> Tensor:
        scale = self._scale().to(hidden.dtype)
        dropped = self.dropout(hidden)
        # Dropout is on what the adapter adds, and the change of the base's lengths is part of that.
        directions = F.linear(dropped, self.base_layer.weight)
        return self.base_layer(hidden) + (scale - 1) * directions + scale * self._added(dropped)

    def _scale(self) -> Tensor:
        with torch.no_grad():
            norms = torch.linalg.vector_norm(super().merged_weight(), dim=1)
        return self.lora_magnitude_vector / norms

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        return self._scale().unsqueeze(1) * super().merged_weight()


def add_adapters(model: PreTrainedModel, config: AdapterConfig, *, dora: bool, seed: int) -> list[str]:
    """Freeze a model of transformers and put adapters into its linear layers, in place.

    Args:
        model: with its weights, on any device, not distributed.
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
    for name in names:
        layer = (DoraLinear if dora else LoraLinear)(model.get_submodule(name), config)  # type: ignore[arg-type]
        # peft's start: uniform over +-1/sqrt(in_features), which is Kaiming's with a = sqrt(5).
        bound = 1 / math.sqrt(layer.lora_A.in_features)
        init_uniform(layer.lora_A.weight, name=f"{name}.lora_A", seed=seed, bound=bound)
        nn.init.zeros_(layer.lora_B.weight)
        _replace(model, name, layer)
    return names


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
                    f"finetune.adapter.targets: {target!r} matches no linear layer of {type(model).__name__};"
                    f" it has {known}"
                )
        found = [name for name in linear if any(_ends_with(name, target) for target in config.targets)]
    if not found:
        raise UserError(
            f"finetune.adapter.targets: {type(model).__name__} has no linear layer besides its head; use method full"
        )
    return found


def adapters(model: nn.Module) -> Iterator[tuple[str, LoraLinear]]:
    """A model's adapters by the name of the layer they stand in for."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear):
            yield name, module


def is_output_matrix(name: str) -> bool:
    """Whether a parameter is a B, which LoRA+ (Hayou et al. 2024, arXiv:2402.12354) gives a higher learning rate."""
    return name.endswith(_OUTPUT)


@torch.no_grad()
def gather_adapters(model: nn.Module, wanted: bool) -> dict[str, Tensor]:
    """The adapters' weights by `peft`'s names, on the CPU; called by all ranks together, {} where not wanted."""
    found: dict[str, Tensor] = {}
    for name, layer in adapters(model):
        for own, parameter in layer.named_parameters():
            if own.startswith("base_layer."):
                continue
            whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            if wanted:
                found[f"{_PREFIX}{name}.{own}"] = whole.detach().cpu().contiguous()
    return found


def write_adapter(
    folder: Path, weights: dict[str, Tensor], config: AdapterConfig, *, dora: bool, names: list[str], base: str
) -> None:
    """Write a folder that `peft.PeftModel.from_pretrained` reads.

    Args:
        folder: made if missing.
        weights: from `gather_adapters`.
        config: of the adapters.
        dora: whether they learnt row lengths.
        names: of the layers.
        base: how the recipe calls the base.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / WEIGHTS_NAME, metadata={"format": "pt"})
    record = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": config.rank,
        "lora_alpha": int(config.alpha) if config.alpha.is_integer() else config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": names,  # in full: the end of a name may fit other layers too
        "use_dora": dora,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    (folder / CONFIG_NAME).write_text(json.dumps(record, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def load_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Put the adapters of a folder into their base, in place.

    Args:
        model: the base, on the CPU.
        folder: from `write_adapter`, or of peft with the same settings.

    Raises:
        UserError: the folder holds no LoRA adapter, one with settings that are not implemented, or one that does not
            fit the model.
    """
    try:
        record = json.loads((folder / CONFIG_NAME).read_bytes())
        config = AdapterConfig(rank=record["r"], alpha=record["lora_alpha"], targets=record["target_modules"])
        with safe_open(folder / WEIGHTS_NAME, "pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(f"adapter: {folder} holds no LoRA adapter ({error}); give the output of finetune") from None
    for key, plain in _PLAIN.items():
        if record.get(key, plain) not in (plain, None):
            raise UserError(
                f"adapter: {folder} has {key} {record[key]!r}, which is not implemented; merge it with peft"
            )
    add_adapters(model, config, dora=bool(record.get("use_dora")), seed=0)
    targets = {
        f"{_PREFIX}{name}.{own}": parameter
        for name, layer in adapters(model)
        for own, parameter in layer.named_parameters()
        if not own.startswith("base_layer.")
    }
    wrong = sorted(targets.keys() ^ weights.keys())
    wrong += [name for name in targets if name in weights and targets[name].shape != weights[name].shape]
    if wrong:
        raise UserError(f"adapter: {folder} and its configuration differ in {wrong[0]} ({len(wrong)} in all)")
    with torch.no_grad():
        for name, parameter in targets.items():
            parameter.copy_(weights[name])


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Put the adapters into the weights and the plain layers back into their places."""
    for name, layer in list(adapters(model)):
        layer.base_layer.weight.copy_(layer.merged_weight())
        _replace(model, name, layer.base_layer)


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, module)


def _ends_with(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")
