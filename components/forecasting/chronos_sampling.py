"""Sample paths of Chronos-T5 that do not depend on which series are forecast together.

The library draws for a whole batch from the global generator. Here a draw takes one uniform number and looks it up in
the cumulated probabilities of the tokens in the order of the values they stand for; the numbers of a series come from
a generator of its own. Probabilities still differ in their last bits with the shape of a batch, as any product does;
where a number lies that close to a boundary, the neighbouring bin is drawn.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional


@torch.inference_mode()
def sample_paths(
    pipeline: Any, series: Sequence[np.ndarray], names: Sequence[str], *, horizon: int, num_samples: int, seed: int
) -> np.ndarray:
    """Draw continuations of series, all at once.

    Beyond the model's prediction length the median of a series' paths is appended to it, as the library does.
    Temperature, top-k and top-p are the model's own.

    Args:
        pipeline: a `ChronosPipeline`.
        series: values, nan where missing.
        names: of the series; with the seed they decide the draws.
        horizon: points to draw.
        num_samples: paths a series.
        seed: of all draws.

    Returns:
        float64 [series, num_samples, horizon]; nan where the model's logits are not finite.
    """
    draws = torch.from_numpy(np.stack([uniforms(seed, name, num_samples, horizon) for name in names]))
    width = max(map(len, series))
    padded = [functional.pad(torch.from_numpy(values), (width - len(values), 0), value=torch.nan) for values in series]
    context, parts = torch.stack(padded).to(torch.float32), []
    for begin in range(0, horizon, pipeline.model.config.prediction_length):
        part = draws[:, :, begin : begin + pipeline.model.config.prediction_length]
        tokens, mask, scale = pipeline.tokenizer.context_input_transform(context)
        drawn = _continue(pipeline, tokens, mask, part)
        values = pipeline.tokenizer.output_transform(drawn.clamp(min=0), scale)
        values = torch.where((drawn < 0).any(dim=-1, keepdim=True), torch.nan, values)
        parts.append(values)
        context = torch.cat([context, values.median(dim=1).values], dim=-1)
    return torch.cat(parts, dim=-1).double().numpy()


def uniforms(seed: int, name: str, num_samples: int, horizon: int) -> np.ndarray:
    """The numbers in [0, 1) that a series draws with: float64 [num_samples, horizon].

    Those of a shorter horizon are the first of a longer one's.
    """
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest, "big")).random((horizon, num_samples)).T


def _continue(pipeline: Any, tokens: Tensor, mask: Tensor, draws: Tensor) -> Tensor:
    """Tokens int64 [series, samples, points] on the CPU, -1 where logits are not finite."""
    model, config = pipeline.model.model, pipeline.model.config
    count, samples, points = draws.shape
    device = model.device
    mask = mask.to(device)
    states = model.get_encoder()(input_ids=tokens.to(device), attention_mask=mask).last_hidden_state
    states, mask = states.repeat_interleave(samples, 0), mask.repeat_interleave(samples, 0)
    draws = draws.reshape(count * samples, points).to(device)
    last = torch.full((count * samples, 1), model.config.decoder_start_token_id, device=device)
    cache, found = None, []
    for point in range(points):
        output = model(
            encoder_outputs=(states,),
            attention_mask=mask,
            decoder_input_ids=last,
            past_key_values=cache,
            use_cache=True,
        )
        cache = output.past_key_values
        chosen = choose_tokens(output.logits[:, -1], config, draws[:, point])
        found.append(chosen)
        last = chosen.clamp(min=0)[:, None]
    return torch.stack(found, dim=1).reshape(count, samples, points).cpu()


def choose_tokens(logits: Tensor, config: Any, draws: Tensor) -> Tensor:
    """The next token of each row: int64 [b], or -1 where logits [b, V] are not finite; never the end token.

    Args:
        logits: [b, V].
        config: `temperature`, `top_k`, `top_p` and `eos_token_id` of a `ChronosConfig`.
        draws: numbers in [0, 1), [b].
    """
    finite = torch.isfinite(logits).all(dim=-1)
    scaled = logits.double() / config.temperature
    scaled[:, config.eos_token_id] = -torch.inf
    if config.top_k and config.top_k < scaled.shape[-1]:
        scaled = scaled.masked_fill(scaled < scaled.topk(config.top_k, dim=-1).values[:, -1:], -torch.inf)
    weights = scaled.softmax(dim=-1)
    if config.top_p is not None and config.top_p < 1:
        ordered, places = weights.sort(dim=-1, descending=True, stable=True)
        beyond = ordered.cumsum(dim=-1) - ordered >= config.top_p
        weights = weights.masked_fill(torch.zeros_like(beyond).scatter(1, places, beyond), 0.0)
    total = weights.cumsum(dim=-1)
    place = torch.searchsorted(total, draws[:, None] * total[:, -1:], right=True).squeeze(1)
    last = weights.shape[-1] - 1 - (weights > 0).flip(-1).int().argmax(dim=-1)
    return torch.where(finite, torch.minimum(place, last), -1)
