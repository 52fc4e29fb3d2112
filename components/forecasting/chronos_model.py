"""Chronos models in folders: what kind one is, loading it, making a new one.

Importing this costs nothing; torch and chronos are imported where they are used.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from modelmill.components.core.errors import UserError
from modelmill.components.forecasting.chronos_train_config import BoltConfig

if TYPE_CHECKING:
    import torch
    from chronos import BaseChronosPipeline
    from transformers import PreTrainedModel

Family = Literal["chronos-t5", "chronos-bolt", "chronos-2"]
_FAMILIES: dict[str, Family] = {
    "ChronosPipeline": "chronos-t5",
    "ChronosBoltPipeline": "chronos-bolt",
    "Chronos2Pipeline": "chronos-2",
}


@dataclass(frozen=True)
class ChronosFolder:
    """What `config.json` of a Chronos says.

    Attributes:
        family: chronos-t5 draws tokens, chronos-bolt and chronos-2 give quantiles.
        context_length: points of a series that it reads.
        prediction_length: points that it forecasts at once.
    """

    family: Family
    context_length: int
    prediction_length: int


def read_chronos(folder: Path, parameter: str = "model") -> ChronosFolder:
    """Find out what kind of Chronos lies in a folder. Torch-free.

    Raises:
        UserError: none does, or one of a kind that is not known, or the package that runs it is not installed.
    """
    if find_spec("chronos") is None:
        raise UserError(f"{parameter}: running a Chronos needs chronos-forecasting; pip install 'modelmill[forecast]'")
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{parameter}: {folder} has no readable config.json ({error}); copy it again") from None
    settings = config.get("chronos_config") if isinstance(config, dict) else None
    if not isinstance(settings, dict):
        raise UserError(
            f"{parameter}: config.json in {folder} has no chronos_config, so this is no Chronos; give a Chronos-T5,"
            " Chronos-Bolt or Chronos-2 model"
        )
    name = str(config.get("chronos_pipeline_class", "ChronosPipeline"))
    family = _FAMILIES.get(name)
    if family is None or settings.get("model_type") == "causal":
        what = "a causal model" if family else f"chronos_pipeline_class {name!r}"
        raise UserError(f"{parameter}: {folder} is {what}, which is not run here; use {', '.join(_FAMILIES.values())}")
    try:
        if family == "chronos-2":
            length = int(settings["output_patch_size"]) * int(settings.get("max_output_patches", 1))
        else:
            length = int(settings["prediction_length"])
        return ChronosFolder(family, int(settings["context_length"]), length)
    except KeyError as error:
        raise UserError(f"{parameter}: chronos_config in {folder} lacks {error}; copy the model again") from None


def load_chronos(folder: Path, dtype: torch.dtype, device: str = "cpu", parameter: str = "model") -> Any:
    """Load a pipeline of chronos-forecasting from a local folder of safetensors.

    Args:
        folder: of the model.
        dtype: of its weights.
        device: where it runs.
        parameter: how the recipe calls the model.

    Raises:
        UserError: the folder holds no Chronos, or lacks some of its weights.
    """
    import transformers
    from chronos import BaseChronosPipeline

    read_chronos(folder, parameter)
    transformers.logging.disable_progress_bar()
    try:
        pipeline: BaseChronosPipeline = BaseChronosPipeline.from_pretrained(
            str(folder), dtype=dtype, local_files_only=True, use_safetensors=True
        )
    except Exception as error:  # transformers raises whatever its parts do
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"{parameter}: {folder} cannot be loaded ({reason}); use another model") from None
    _check_weights(pipeline.inner_model, folder, parameter)
    pipeline.inner_model.to(device).eval()
    return pipeline


def _check_weights(model: PreTrainedModel, folder: Path, parameter: str) -> None:
    """The library leaves patch embeddings that a file lacks random, and says nothing."""
    from safetensors import safe_open

    held: set[str] = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            held.update(file.keys())
    parameters = dict(model.named_parameters(remove_duplicate=False))
    stored = {id(parameters[name]) for name in held if name in parameters}
    if missing := sorted(name for name, value in parameters.items() if id(value) not in stored):
        raise UserError(
            f"{parameter}: {folder} lacks tensor {missing[0]} ({len(missing)} in all), which would be random; copy it"
            " again"
        )


def new_bolt(config: BoltConfig, seed: int) -> PreTrainedModel:
    """A Chronos-Bolt with random weights, the same for the same seed."""
    import torch
    from chronos.chronos_bolt import ChronosBoltModelForForecasting
    from transformers import T5Config

    settings: dict[str, Any] = {
        "chronos_config": {
            "context_length": config.context_length,
            "prediction_length": config.prediction_length,
            "input_patch_size": config.patch_size,
            "input_patch_stride": config.patch_size,
            "quantiles": list(config.quantiles),
            "use_reg_token": True,
        },
        "chronos_pipeline_class": "ChronosBoltPipeline",
        "architectures": ["ChronosBoltModelForForecasting"],
        "decoder_start_token_id": 0,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "vocab_size": 2,
        "feed_forward_proj": "relu",
        "d_kv": config.d_model // config.num_heads,
        "dropout_rate": config.dropout,
        "initializer_factor": config.initializer_factor,
    }
    settings |= {name: getattr(config, name) for name in ("d_model", "d_ff", "num_layers", "num_decoder_layers")}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ChronosBoltModelForForecasting(T5Config(**settings, num_heads=config.num_heads))
