"""What kinds of model can be registered, and how each is loaded for `mlflow.pyfunc`.

A flavor is a module of this folder with `_load_pyfunc(path)`; a copy of the module travels with every version. It is
looked up by name and not imported, so that registering needs none of what serving needs.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelmill.components.core.errors import UserError
from modelmill.components.core.manifest import Manifest
from modelmill.components.core.recipe import suggest

if TYPE_CHECKING:
    from mlflow.models import ModelSignature

DEFAULT = "language-model"
_HORIZON = 64  # steps that a forecaster is asked for unless a request says otherwise, where it can do as many


@dataclass(frozen=True)
class Flavor:
    """How one kind of model is served.

    Attributes:
        module: name of the loader in this folder.
        requirements: packages that loading needs, pinned to what is installed when a version is made.
        signature: makes the MLflow signature of a model.
        example: an input that `predict` takes.
        usage: lines of Python in the model card, where `model` is the loaded model.
    """

    module: str
    requirements: tuple[str, ...]
    signature: Callable[[Manifest], ModelSignature]
    example: list[Any]
    usage: tuple[str, ...]

    def loader(self) -> Path:
        """File of the loader.

        Raises:
            UserError: this installation lacks it.
        """
        found = find_spec(f"{__package__}.{self.module}")
        if found is None or found.origin is None:
            raise UserError(
                f"model: its loader {self.module} is not part of this installation; install modelmill anew"
            )
        return Path(found.origin)


def flavor_of(model: Manifest) -> tuple[str, Flavor]:
    """Name and flavor of a model's manifest.

    Raises:
        UserError: there is no such flavor.
    """
    name = str(model.metadata.get("flavor", DEFAULT))
    if name not in FLAVORS:
        raise UserError(f"model: its flavor {name!r} cannot be served; {suggest(name, list(FLAVORS))}")
    return name, FLAVORS[name]


def _text_generation(model: Manifest) -> ModelSignature:
    from mlflow.models import ModelSignature
    from mlflow.types.schema import ColSpec, ParamSchema, ParamSpec, Schema

    texts = Schema([ColSpec("string")])
    params = [
        ParamSpec("max_new_tokens", "long", 64),
        ParamSpec("temperature", "double", 0.0),
        ParamSpec("top_k", "long", 50),
        ParamSpec("seed", "long", 0),
    ]
    return ModelSignature(texts, texts, ParamSchema(params))


def _embedding(model: Manifest) -> ModelSignature:
    """Texts to float32 vectors [n, dimension].

    The column has no name, so that `predict` takes a list and a server `{"inputs": [...]}`.
    """
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types.schema import ColSpec, Schema, TensorSpec

    vectors = TensorSpec(np.dtype("float32"), (-1, _dimension(model)), "vectors")
    return ModelSignature(Schema([ColSpec("string")]), Schema([vectors]))


def _dimension(model: Manifest) -> int:
    """Length of the vectors: what the manifest says, else the pooling's or the encoder's, else left open (-1)."""
    told: Any = model.counts.get("dimension", model.metadata.get("dimension"))
    names = {entry.path for entry in model.files}
    for name, key in (
        ("model/1_Pooling/config.json", "embedding_dimension"),
        ("model/1_Pooling/config.json", "word_embedding_dimension"),
        ("model/config.json", "hidden_size"),
    ):
        if told is None and name in names:
            told = json.loads(model.path(name).read_bytes()).get(key)
    return -1 if told is None else int(told)


def _forecaster(model: Manifest) -> ModelSignature:
    """A long table of series to a table of quantiles; the columns of other levels are named alike."""
    from mlflow.models import ModelSignature
    from mlflow.types.schema import ColSpec, ParamSchema, ParamSpec, Schema

    settings = json.loads(model.path("model/config.json").read_bytes()).get("chronos_config", {})
    horizon = min(int(settings.get("prediction_length", _HORIZON)), _HORIZON)
    levels = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
    table = [ColSpec("string", "item_id"), ColSpec("datetime", "timestamp")]
    quantiles = [ColSpec("double", f"{level:g}") for level in levels]
    params = [
        ParamSpec("horizon", "long", horizon),
        ParamSpec("quantile_levels", "double", levels, shape=(-1,)),
    ]
    inputs = Schema([*table, ColSpec("double", "target", required=False)])
    return ModelSignature(inputs, Schema([*table, *quantiles]), ParamSchema(params))


FLAVORS = {
    DEFAULT: Flavor(
        module="modelmill_language_model",
        requirements=("torch", "transformers", "tokenizers", "safetensors"),
        signature=_text_generation,
        example=["Once upon"],
        usage=(
            'model.predict(["Once upon"], params={"max_new_tokens": 32})',
            "model.get_raw_model()  # the transformers model",
        ),
    ),
    "embedding": Flavor(
        module="modelmill_embedding",
        requirements=("torch", "transformers", "tokenizers", "safetensors"),
        signature=_embedding,
        example=["How does a generator resume?"],
        usage=('model.predict(["How does a generator resume?"])["vectors"]  # float32 [texts, dimension]',),
    ),
    "forecaster": Flavor(
        module="modelmill_forecaster",
        requirements=("torch", "transformers", "chronos-forecasting", "pandas", "safetensors"),
        signature=_forecaster,
        example=[{"item_id": "a", "timestamp": f"2024-01-{day:02}", "target": float(day % 7)} for day in range(1, 29)],
        usage=(
            "# a table of item_id, timestamp, target to one of item_id, timestamp and a column for each level",
            'model.predict(table, params={"horizon": 12, "quantile_levels": [0.1, 0.5, 0.9]})',
        ),
    ),
}
