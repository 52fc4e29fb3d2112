"""Step `score_texts`: how likely a model finds the documents of a corpus, such as those its base was made for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from modelmill.components.core import events
from modelmill.components.core.errors import UserError
from modelmill.components.core.manifest import Manifest, json_digest
from modelmill.components.core.model_folder import digest_of, model_folder
from modelmill.components.core.step import StepResult, step_options
from modelmill.components.data.documents import read_documents
from modelmill.components.data.tokenizer_files import TokenizerFiles, load_tokenizer
from modelmill.components.evaluation.batching import evenly
from modelmill.components.evaluation.config import TextScoresConfig
from modelmill.components.evaluation.likelihood_scores import Losses, write_losses

if TYPE_CHECKING:
    from modelmill.components.evaluation.likelihood import Window

_DOCUMENTS_A_CALL = 64  # of the tokenizer


@step_options(device=True)
def score_texts(config: TextScoresConfig, output: Path, *, model: Manifest, corpus: Manifest) -> StepResult:
    """Score documents with the model's own tokenizer.

    Writes `scores.jsonl` (see `records`) with `text_loss` (nats a token) and `text_bits_per_byte` of each document.
    The latter compares models with different tokenizers. Before a document stands the token that begins one in
    training: the tokenizer's start token where it adds one, else its end-of-text token. A document longer than a
    window is scored in consecutive windows, each of which begins with the last token of the one before. Without a
    token to begin with, a document's first is not scored. The metrics of the manifest are of all tokens (bytes)
    together, as `score_answers` describes.

    Args:
        config: which documents, and how intervals are drawn.
        output: an empty folder.
        model: manifest of an exported model with its tokenizer (`model/`).
        corpus: manifest of `ingest_corpus`.

    Returns:
        kind `scores`; counts `examples`, `tokens`, `bytes`; metadata `weights_digest`, `dataset_digest`, `scoring`.

    Raises:
        UserError: the split is empty, or a loss is not finite.
    """
    # Imported here, so that a reused step does not pay for torch.
    from modelmill.components.evaluation.language_model import load_language_model
    from modelmill.components.evaluation.likelihood import window_losses

    folder = model_folder(model)
    numbers, texts = _documents(corpus, config.split, config.max_documents)
    tokenizer = load_tokenizer(model)
    events.progress("loading the model")
    judge = load_language_model(folder, config)
    judge.check_vocabulary(tokenizer.vocab_size)
    limits = [limit for limit in (config.window_tokens, judge.positions) if limit is not None]
    width = min(limits, default=None)
    windows, tokens = _windows(texts, tokenizer, width)
    ids = [f"{config.split}-{number}" for number in numbers.tolist()]
    nats = np.zeros(len(ids))
    of_windows = window_losses(judge, windows, ids, config.batch_tokens)
    np.add.at(nats, [window.example for window in windows], of_windows)
    scored = tokens > 0  # all but a text of one token with nothing before it
    losses = Losses(
        ids=[identity for identity, kept in zip(ids, scored, strict=True) if kept],
        digests=[json_digest((text,))[:16] for text, kept in zip(texts, scored, strict=True) if kept],
        nats=nats[scored],
        tokens=tokens[scored],
        bytes=np.array([len(text.encode("utf-8")) for text in texts])[scored],
    )
    scoring = {"split": config.split, "window_tokens": width}
    metadata = {"weights_digest": digest_of(model), "dataset_digest": corpus.digest, "scoring": scoring}
    counts, metrics = write_losses(config, output, "text", losses, corpus)
    return StepResult("scores", counts, metrics, metadata)


def _documents(corpus: Manifest, split: str, limit: int | None) -> tuple[np.ndarray, list[str]]:
    count = corpus.counts.get(f"{split}_documents", 0)
    if not count:
        raise UserError(
            f"corpus: the {split} split holds no document; raise corpus.{split}_fraction or give it more text"
        )
    numbers = evenly(count, limit)
    wanted, place, texts = set(numbers.tolist()), 0, []
    for batch in read_documents(corpus.path(f"{split}.arrow")):
        texts += [text for number, text in enumerate(batch, place) if number in wanted]
        place += len(batch)
    return numbers, texts


def _windows(texts: list[str], tokenizer: TokenizerFiles, width: int | None) -> tuple[list[Window], np.ndarray]:
    """Windows of all documents, and how many tokens of each are scored, int64 [n]."""
    from modelmill.components.evaluation.likelihood import Window

    before = tokenizer.id_of(tokenizer.bos if tokenizer.adds_bos else tokenizer.eos)
    windows, counts = [], []
    for begin in range(0, len(texts), _DOCUMENTS_A_CALL):
        part = texts[begin : begin + _DOCUMENTS_A_CALL]
        for example, encoded in enumerate(tokenizer.encoder.encode_batch(part, add_special_tokens=False), begin):
            ids = np.array([*([] if before is None else [before]), *encoded.ids], np.int32)
            step = width or max(1, len(ids))
            for first in range(0, len(ids) - 1, step):
                tokens = ids[first : first + step + 1]
                windows.append(Window(example, tokens, np.arange(len(tokens)) > 0))
            counts.append(max(0, len(ids) - 1))
    return windows, np.array(counts)
