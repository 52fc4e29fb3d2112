"""Loads a registered embedding model for `mlflow.pyfunc`; a copy of this file travels with every version.

It imports nothing of modelmill, so that whoever loads the model needs only transformers and torch. The weights are
the tuned folder, byte for byte: no pickle is written or read. The vectors are those of sentence-transformers: mean (or
CLS) pooling of the last hidden states, scaled to length 1.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_BATCH = 32
_UNLIMITED = 1 << 20  # tokenizers without a limit claim an astronomical one


class EmbeddingModel:
    """An encoder and its tokenizer, as `mlflow.pyfunc` wants them."""

    def __init__(self, folder: str) -> None:
        from transformers import AutoModel, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self.model = AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True).float().eval()
        self.pooling = _pooling(Path(folder))
        limits = [_settings(Path(folder) / "sentence_bert_config.json").get("max_seq_length")]
        limits += [self.tokenizer.model_max_length, getattr(self.model.config, "max_position_embeddings", None)]
        self.max_length = min([limit for limit in limits if limit and limit < _UNLIMITED], default=None)

    def get_raw_model(self) -> Any:
        """The `transformers` model; MLflow returns it from `PyFuncModel.get_raw_model()`."""
        return self.model

    def predict(self, model_input: Any, params: dict[str, Any] | None = None) -> dict[str, Any]:
        """Turn texts into vectors.

        Args:
            model_input: texts: a list, a mapping whose `inputs` holds one text or several, or a table whose first
                column holds them.
            params: none are known.

        Returns:
            `vectors`: float32 [texts, dimension], each of length 1, in the order of the texts.
        """
        import numpy as np

        texts = _texts(model_input)
        vectors = np.zeros((len(texts), self.model.config.hidden_size), np.float32)
        order = sorted(range(len(texts)), key=lambda place: len(texts[place]))  # a batch pads to its longest
        for begin in range(0, len(order), _BATCH):
            places = order[begin : begin + _BATCH]
            vectors[places] = self._embed([texts[place] for place in places])
        return {"vectors": vectors}

    def _embed(self, texts: list[str]) -> Any:
        import torch

        options: dict[str, Any] = {"padding": True, "return_tensors": "pt"}
        tokens = self.tokenizer(texts, truncation=self.max_length is not None, max_length=self.max_length, **options)
        with torch.inference_mode():
            states = self.model(**tokens).last_hidden_state
            mask = tokens["attention_mask"].unsqueeze(-1).to(states.dtype)
            if self.pooling == "cls":
                first = mask.squeeze(-1).argmax(dim=1)  # padding may stand before it
                pooled = states[torch.arange(len(texts)), first]
            else:
                pooled = (states * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1e-9)
            return torch.nn.functional.normalize(pooled, dim=1).numpy()


def _texts(model_input: Any) -> list[str]:
    if hasattr(model_input, "iloc"):
        model_input = model_input.iloc[:, 0].tolist()
    elif isinstance(model_input, Mapping):
        model_input = model_input["inputs"]
    cells = [model_input] if isinstance(model_input, str) else list(model_input)
    # MLflow makes one cell of the list in {"inputs": [...]}.
    return [str(text) for cell in cells for text in ([cell] if isinstance(cell, str) else cell)]


def _pooling(folder: Path) -> str:
    settings = _settings(folder / "1_Pooling" / "config.json")
    mode = settings.get("pooling_mode")
    if mode is None:
        names = {"pooling_mode_cls_token": "cls", "pooling_mode_mean_tokens": "mean"}
        mode = next((name for key, name in names.items() if settings.get(key)), "mean")
    if mode not in ("mean", "cls"):
        raise ValueError(f"1_Pooling: {mode!r} is not computed here; serve a model that pools by mean or cls")
    return str(mode)


def _settings(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_bytes())) if path.is_file() else {}


def _load_pyfunc(path: str) -> EmbeddingModel:
    """Entry point of `mlflow.pyfunc.load_model`; `path` is the folder the version was registered with."""
    folder = Path(path)
    return EmbeddingModel(str(folder / "model" if (folder / "model").is_dir() else folder))
