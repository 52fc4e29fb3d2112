"""Section `chronos` of a recipe: which Chronos is trained, and on which windows. Torch-free."""

from __future__ import annotations

from typing import Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from modelmill.components.core.recipe import Section
from modelmill.components.training.config import TrainingConfig


class BoltConfig(Section):
    """Sizes of a Chronos-Bolt: a T5 that reads patches of a series and answers with quantiles (Ansari et al. 2024,
    arXiv:2403.07815, and the authors' library)."""

    d_model: PositiveInt = Field(default=64, description="Width of the hidden states.")
    d_ff: PositiveInt = Field(default=256, description="Width of the feed-forward layers.")
    num_layers: PositiveInt = Field(default=2, description="Blocks of the encoder.")
    num_decoder_layers: PositiveInt = Field(default=2, description="Blocks of the decoder.")
    num_heads: PositiveInt = Field(default=4, description="Attention heads; they share d_model evenly.")
    dropout: NonNegativeFloat = Field(default=0.0, lt=1, description="Share of activations set to zero in training.")
    context_length: PositiveInt = Field(default=512, description="Points of a series that are read, the latest ones.")
    prediction_length: PositiveInt = Field(default=64, description="Points forecast at once.")
    patch_size: PositiveInt = Field(default=16, description="Points that make one position of the encoder.")
    quantiles: tuple[float, ...] = Field(
        default=(0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
        description="Levels that are forecast, rising, 0.5 among them.",
    )
    initializer_factor: PositiveFloat = Field(
        default=0.05, description="Scale of the first weights; the published models' is 0.05."
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.d_model % self.num_heads:
            raise ValueError(f"num_heads: {self.num_heads} do not share d_model {self.d_model} evenly; use a divisor")
        if self.context_length % self.patch_size:
            raise ValueError(
                f"context_length: {self.context_length} is no multiple of patch_size {self.patch_size}; use one"
            )
        levels = self.quantiles
        if list(levels) != sorted(set(levels)) or not all(0 < level < 1 for level in levels) or 0.5 not in levels:
            raise ValueError(
                f"quantiles: {list(levels)} must rise, lie between 0 and 1 and hold 0.5; write [0.1, 0.5, 0.9]"
            )
        return self


class ChronosTrainConfig(Section):
    """Section of the step that trains a Chronos: from random weights (`model`), or all weights of a given base."""

    model: BoltConfig | None = Field(
        default=None, description="Sizes of a new Chronos-Bolt; null tunes the base that the step is given."
    )
    horizon: PositiveInt | None = Field(
        default=None,
        description="Points after the origin that count in the loss; null takes all that the model forecasts at once.",
    )
    min_context: PositiveInt = Field(
        default=16, description="Points before the origin of a window at least; shorter series are not trained on."
    )
    short_contexts: float = Field(
        default=0.25,
        ge=0,
        le=1,
        description="Share of windows whose context is cut to a random length, so that short series are known too.",
    )
    training: TrainingConfig = Field(
        description="Batch (in windows), layout, optimizer, schedule. With validation_rows above 0 the last `horizon`"
        " points of every series are held back and used for validation."
    )

    @model_validator(mode="after")
    def _engine_can(self) -> Self:
        training = self.training
        training.check_any_model()
        if training.attention != "auto" or training.document_masking:
            raise ValueError(
                "training.attention, training.document_masking: a Chronos has its own attention and no documents;"
                " leave both out"
            )
        return self
