"""Section of the step that scores pairs of answers. Torch-free."""

from __future__ import annotations

from pydantic import Field

from modelmill.components.evaluation.config import LikelihoodConfig


class PreferenceScoresConfig(LikelihoodConfig):
    """How likely a model finds the better answer of a pair, against the worse one."""

    max_pairs: int | None = Field(
        default=None, ge=1, description="Pairs, evenly spaced over the split; null scores all of them."
    )
