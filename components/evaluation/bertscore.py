"""BERTScore: how well each token of one text is matched by a token of the other in an encoder's hidden states.

Zhang et al. (2020), arXiv:1904.09675, as the `bert_score` package computes it: the cosine of contextual embeddings,
greedy matching, tokens that the tokenizer adds match but do not count, optionally tokens weighed by their inverse
document frequency among the references. The package's rescaling to a baseline is left out: its baselines were measured
for published encoders and layers, and mean nothing for another folder.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor

from modelmill.components.core import events
from modelmill.components.core.errors import UserError
from modelmill.components.evaluation.config import BertScoreConfig
from modelmill.components.evaluation.encoder_folder import encoder_folder

_UNLIMITED = 1 << 24  # tokenizers without a limit state numbers beyond any model


@dataclass(frozen=True)
class EncodedText:
    """Token ids of a text, and for each whether it counts: those that the tokenizer adds do not."""

    ids: tuple[int, ...]
    counts: tuple[bool, ...]


class Encoder:
    """A transformers encoder that turns texts into normalized hidden states."""

    def __init__(self, config: BertScoreConfig) -> None:
        """Load the encoder on the best device of this machine.

        Raises:
            UserError: the folder holds no usable encoder, its weights are incomplete, or it has fewer blocks.
        """
        from transformers import AutoModel, AutoTokenizer

        folder = encoder_folder(config.encoder)
        try:
            self._tokenizer = _with_leading_space(AutoTokenizer, folder)
            model, report = AutoModel.from_pretrained(
                folder,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                dtype=torch.float32,
                output_loading_info=True,
            )
        except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
            raise UserError(f"bertscore.encoder: {config.encoder} cannot be loaded ({error})") from None
        missing = sorted(name for name in report["missing_keys"] if "pooler" not in name)  # the pooler is not used
        if missing:
            raise UserError(
                f"bertscore.encoder: {config.encoder} lacks {len(missing)} weights, the first is {missing[0]};"
                " save the whole encoder"
            )
        if model.config.is_encoder_decoder:
            model = model.get_encoder()
        blocks = getattr(model.config, "num_hidden_layers", None)
        if config.layer is not None and blocks is not None and config.layer > blocks:
            raise UserError(f"bertscore.layer: {config.layer} is more than the encoder's {blocks} blocks; lower it")
        self._layer = config.layer
        readable = _readable(self._tokenizer, model.config)
        if config.max_length is not None and readable is not None and config.max_length > readable:
            raise UserError(
                f"bertscore.max_length: {config.max_length} is more than the {readable} tokens the encoder can read;"
                " lower it or leave it out"
            )
        self._max_length = config.max_length or readable or 512
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model = model.to(self._device).eval()
        self.truncated = 0  # texts that were cut, so far

    def tokenize(self, texts: Sequence[str]) -> list[EncodedText]:
        """Ids of texts without space around them, cut to what the encoder can read."""
        batch = self._tokenizer(
            [text.strip() for text in texts],
            truncation=True,
            max_length=self._max_length,
            return_special_tokens_mask=True,
            return_overflowing_tokens=False,
            return_attention_mask=False,
        )
        encoded = [
            EncodedText(tuple(ids), tuple(not added for added in mask))
            for ids, mask in zip(batch["input_ids"], batch["special_tokens_mask"], strict=True)
        ]
        if batch.encodings is not None:
            self.truncated += sum(bool(each.overflowing) for each in batch.encodings)
        else:  # a tokenizer in Python does not tell what it cut, so a text that just fits counts too
            self.truncated += sum(len(each.ids) >= self._max_length for each in encoded)
        return encoded

    def embed(self, batch: Sequence[EncodedText]) -> tuple[Tensor, Tensor]:
        """Unit vectors [b, t, d] of texts, and which of them are tokens rather than padding [b, t]."""
        length = max(1, *(len(each.ids) for each in batch))  # a tokenizer that adds nothing leaves "" empty
        padding = self._tokenizer.pad_token_id or 0
        ids = torch.tensor([[*each.ids, *[padding] * (length - len(each.ids))] for each in batch])
        present = torch.arange(length) < torch.tensor([len(each.ids) for each in batch])[:, None]
        ids, present = ids.to(self._device), present.to(self._device)
        with torch.inference_mode():
            output = self._model(
                input_ids=ids, attention_mask=present.long(), output_hidden_states=self._layer is not None
            )
            hidden = output.last_hidden_state if self._layer is None else output.hidden_states[self._layer]
        return torch.nn.functional.normalize(hidden.float(), dim=-1), present


def bert_scores(
    encoder: Encoder, references: Sequence[Sequence[str]], predictions: Sequence[str], *, idf: bool, batch_size: int
) -> NDArray[np.float64]:
    """Precision, recall and F1 of each prediction against its best reference (by F1): [n, 3].

    A prediction without a token scores 0. Pairs are sorted by length, so that little is padded, and no more than one
    batch of hidden states is held.

    Args:
        encoder: see `Encoder`.
        references: one or more for each prediction.
        predictions: texts, [n].
        idf: weigh a token by `log((N + 1) / (n + 1))`, with N references of which n hold it.
        batch_size: pairs a forward pass.

    Raises:
        UserError: the encoder's hidden states are not finite.
    """
    flat = [text for texts in references for text in texts]
    owners = np.repeat(np.arange(len(predictions)), [len(texts) for texts in references])
    targets, predicted = encoder.tokenize(flat), encoder.tokenize(predictions)
    weights = _Weights(targets if idf else None)
    lengths = [(len(predicted[owner].ids), len(target.ids)) for owner, target in zip(owners, targets, strict=True)]
    order = sorted(range(len(flat)), key=lambda pair: (max(lengths[pair]), lengths[pair]))
    scores = np.zeros((len(flat), 3))
    for begin in range(0, len(order), batch_size):
        pairs = order[begin : begin + batch_size]
        ours = _embedded(encoder, [predicted[owners[pair]] for pair in pairs])
        theirs = _embedded(encoder, [targets[pair] for pair in pairs])
        scores[pairs] = _matched(ours, theirs, weights)
        events.progress("comparing hidden states", begin + len(pairs), len(order))
    if not np.isfinite(scores).all():
        raise UserError("bertscore.encoder: its hidden states are not finite; its weights are damaged, save it again")
    best = np.full((len(predictions), 3), -np.inf)
    for owner, score in zip(owners, scores, strict=True):
        if score[2] > best[owner, 2]:
            best[owner] = score
    return best


@dataclass(frozen=True)
class _Embedded:
    texts: Sequence[EncodedText]
    vectors: Tensor
    present: Tensor


def _embedded(encoder: Encoder, texts: Sequence[EncodedText]) -> _Embedded:
    """Hidden states of texts; the same text, such as a reference of several predictions, passes the encoder once."""
    unique = list(dict.fromkeys(texts))
    places = {text: place for place, text in enumerate(unique)}
    vectors, present = encoder.embed(unique)
    rows = torch.tensor([places[text] for text in texts], device=vectors.device)
    return _Embedded(texts, vectors[rows], present[rows])


class _Weights:
    """Weight of each token of a text, adding up to 1, or 0 for a text without tokens."""

    def __init__(self, references: Sequence[EncodedText] | None) -> None:
        self._number = len(references) if references is not None else 0
        self._held: Mapping[int, int] | None = None
        if references is not None:
            self._held = Counter(token for each in references for token in set(each.ids))

    def of(self, text: EncodedText) -> list[float]:
        weights = [float(counts) for counts in text.counts]
        if self._held is not None:
            rare = [
                weight * math.log((self._number + 1) / (self._held.get(token, 0) + 1))
                for weight, token in zip(weights, text.ids, strict=True)
            ]
            weights = rare if any(rare) else weights  # of tokens that every reference has, none is rarer
        total = sum(weights)
        return [weight / total for weight in weights] if total else weights

    def rows(self, texts: Iterable[EncodedText], like: Tensor) -> Tensor:
        """[b, t] for texts padded to the width of `like`."""
        width = like.shape[1]
        padded = [[*row, *[0.0] * (width - len(row))] for row in map(self.of, texts)]
        return torch.tensor(padded, dtype=torch.float32, device=like.device)


def _matched(ours: _Embedded, theirs: _Embedded, weights: _Weights) -> NDArray[np.float64]:
    """Precision, recall and F1 of pairs of texts: [b, 3]."""
    similarity = ours.vectors @ theirs.vectors.transpose(1, 2)
    both = ours.present[:, :, None] & theirs.present[:, None, :]
    similarity = similarity.masked_fill(~both, -torch.inf)
    our_weights, their_weights = weights.rows(ours.texts, ours.present), weights.rows(theirs.texts, theirs.present)
    # Padding has the weight 0, but 0 times minus infinity is no number.
    precision = torch.where(our_weights > 0, our_weights * similarity.amax(2), 0.0).sum(1).double()
    recall = torch.where(their_weights > 0, their_weights * similarity.amax(1), 0.0).sum(1).double()
    wordless = (our_weights.sum(1) == 0) | (their_weights.sum(1) == 0)
    f1 = torch.where(precision + recall == 0, 0.0, 2 * precision * recall / (precision + recall))
    scores = torch.stack([precision, recall, f1], dim=1).masked_fill(wordless[:, None], 0.0)
    return scores.cpu().numpy()


def _with_leading_space(loader: Any, folder: object) -> Any:
    """The tokenizer; byte-level ones read a text's first word like those behind a space, as `bert_score` has it."""
    tokenizer = loader.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if getattr(tokenizer, "add_prefix_space", None) is False:
        tokenizer = loader.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, add_prefix_space=True
        )
    return tokenizer


def _readable(tokenizer: Any, config: Any) -> int | None:
    """How many tokens the encoder can read at once, None where neither it nor its tokenizer says."""
    limits = [tokenizer.model_max_length]
    positions = getattr(config, "max_position_embeddings", None)
    if positions:
        # RoBERTa and its kin number positions from the padding id on.
        offset = config.pad_token_id + 1 if "roberta" in config.model_type or config.model_type == "camembert" else 0
        limits.append(positions - offset)
    limit = min(limits)
    return int(limit) if limit < _UNLIMITED else None
