"""The `evaluation` section of a recipe."""

from __future__ import annotations

from pydantic import Field

from modelmill.components.core.recipe import Section


class EvaluationConfig(Section):
    """How a model is judged on held-out text."""

    max_rows: int | None = Field(
        default=1024, ge=1, description="Test rows to score, evenly spaced over the split; null scores all of them."
    )
    batch_size: int = Field(default=8, ge=1, description="Rows a forward pass; it changes memory and speed only.")
    baseline_tokens: int = Field(
        default=100_000_000, ge=1, description="Training tokens the n-gram baselines count at most."
    )
    prompts: tuple[str, ...] = Field(
        default=(), description="Texts to continue; empty takes beginnings of held-out documents."
    )
    num_prompts: int = Field(
        default=4, ge=0, le=64, description="Held-out beginnings to continue when no prompt is given."
    )
    prompt_tokens: int = Field(default=16, ge=1, description="Tokens of a held-out document shown to the model.")
    num_samples: int = Field(
        default=1, ge=0, le=16, description="Sampled continuations of each prompt, besides the greedy one."
    )
    max_new_tokens: int = Field(default=64, ge=1, description="Length of a continuation, unless the text ends before.")
    temperature: float = Field(default=0.8, gt=0, le=10, description="Divides the logits before sampling.")
    top_k: int | None = Field(default=50, ge=1, description="Sample among the k most likely tokens; null among all.")
    seed: int = Field(default=0, ge=0, lt=2**63, description="Seed of the sampled continuations.")
