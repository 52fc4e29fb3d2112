"""An embedding model from a folder, and texts turned to vectors. Importing this costs the import of torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from transformers.utils.logging import disable_progress_bar

from modelmill.components.core.errors import UserError

POOLINGS = ("mean", "cls")  # what the serving of `modelmill_embedding` computes


def load_encoder(folder: Path, device: str, max_sequence_length: int | None = None) -> SentenceTransformer:
    """The model of a Hugging Face or sentence-transformers folder in fp32, its vectors of length 1.

    A folder without `modules.json` gets mean pooling. Prompts that the folder names are left out, for whoever asks a
    served model would have to repeat them: they belong to the texts.

    Args:
        folder: configuration, safetensors and tokenizer.
        device: such as cpu.
        max_sequence_length: tokens read of a text; None keeps the folder's.

    Raises:
        UserError: the model has other parts than encoder, mean or CLS pooling and normalisation, or fewer positions.
    """
    disable_progress_bar()
    options = {"dtype": torch.float32, "use_safetensors": True}
    model = SentenceTransformer(str(folder), device=device, local_files_only=True, model_kwargs=options)
    encoder, pooling, *_ = [*model, None, None]
    rest = [type(part).__name__ for part in list(model)[2:] if not isinstance(part, Normalize)]
    if not isinstance(encoder, Transformer) or not isinstance(pooling, Pooling) or rest:
        parts = ", ".join(type(part).__name__ for part in model)
        raise UserError(f"model: {folder} is made of {parts}; use one of encoder, pooling and normalisation only")
    if pooling.pooling_mode not in POOLINGS:
        raise UserError(
            f"model: {folder} pools by {pooling.pooling_mode}; use one that pools by {' or '.join(POOLINGS)}"
        )
    if not isinstance(list(model)[-1], Normalize):
        model.append(Normalize())
    model.prompts, model.default_prompt_name = {}, None
    room = getattr(encoder.model.config, "max_position_embeddings", None)
    if max_sequence_length is not None:
        if room is not None and max_sequence_length > room:
            raise UserError(
                f"training.max_sequence_length: {max_sequence_length} is more than the {room} positions of the base;"
                f" use {room} or less"
            )
        model.max_seq_length = max_sequence_length
    elif room is not None and (model.max_seq_length is None or model.max_seq_length > room):
        model.max_seq_length = room
    return model


def embed(model: SentenceTransformer, texts: Sequence[str], batch_size: int) -> NDArray[np.float32]:
    """Vectors of length 1 of texts, [n, dimension], computed in batches of texts of similar length."""
    with torch.inference_mode():
        vectors = model.encode(list(texts), batch_size=batch_size, convert_to_numpy=True, show_progress_bar=False)
    return np.asarray(vectors, dtype=np.float32)
