"""Sections of the fine-tuning and merging steps. Torch-free."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, field_validator, model_validator

from modelmill.components.core.recipe import Section
from modelmill.components.training.config import TrainingConfig

Method = Literal["full", "lora", "dora", "qlora"]


class AdapterConfig(Section):
    """A low-rank adapter (LoRA, Hu et al. 2021, arXiv:2106.09685): what is added to the weights of linear layers."""

    rank: PositiveInt = Field(default=16, description="Rank of the added matrices.")
    alpha: PositiveFloat = Field(default=32.0, description="The added product is multiplied by alpha / rank.")
    dropout: NonNegativeFloat = Field(
        default=0.0, lt=1.0, description="Share of the adapter's inputs that is set to zero while training."
    )
    targets: Literal["all-linear"] | list[str] = Field(
        default="all-linear",
        description="Layers that get an adapter: all-linear (all but the output head), or ends of their names.",
    )
    learning_rate_ratio: PositiveFloat = Field(
        default=1.0,
        description="Learning rate of the output matrices (B) over that of the input matrices (A); LoRA+ suggests 16.",
    )

    @field_validator("targets")
    @classmethod
    def _some_targets(cls, value: Literal["all-linear"] | list[str]) -> Literal["all-linear"] | list[str]:
        if not value or (isinstance(value, list) and not all(name.strip(".") for name in value)):
            raise ValueError("names no layer; use all-linear or names such as [q_proj, v_proj]")
        return value


class QuantizationConfig(Section):
    """The base of method qlora: 4-bit NormalFloat weights (Dettmers et al. 2023, arXiv:2305.14314)."""

    double: bool = Field(
        default=True,
        description="Whether the scales of the 4-bit blocks are quantised too: 4.13 bits a weight, not 4.5.",
    )


class FinetuneConfig(Section):
    """Section of the fine-tuning step."""

    method: Method = Field(
        default="lora",
        description="full (all weights), lora, dora (lengths and low-rank directions), or qlora (over 4-bit weights).",
    )
    adapter: AdapterConfig = Field(default=AdapterConfig(), description="The adapter; method full has none.")
    quantization: QuantizationConfig = Field(
        default=QuantizationConfig(), description="The 4-bit weights of method qlora; other methods have none."
    )
    training: TrainingConfig = Field(
        description="Batch, layout, optimizer, schedule. Conversations packed into a row never see each other."
    )

    @model_validator(mode="after")
    def _full_has_no_adapter(self) -> Self:
        if self.method == "full" and self.adapter != AdapterConfig():
            raise ValueError(
                "adapter: method full trains all weights and has no adapter; remove it or use method lora"
            )
        return self

    @model_validator(mode="after")
    def _only_qlora_quantises(self) -> Self:
        if self.method != "qlora" and self.quantization != QuantizationConfig():
            raise ValueError(f"quantization: method {self.method} trains on unquantised weights; use method qlora")
        if self.method == "qlora" and self.training.accelerator == "neuron":
            raise ValueError(
                "training.accelerator: bitsandbytes has no 4-bit kernels for 'neuron'; use method lora with"
                " training.parallel.shard to fit a large base"
            )
        return self

    @model_validator(mode="after")
    def _engine_can(self) -> Self:
        training = self.training
        training.check_any_model()
        if training.attention not in ("auto", "math", "sdpa"):
            raise ValueError(
                f"training.attention: {training.attention!r} is a kernel of our own decoder; use auto, sdpa or math"
            )
        return self


class MergeConfig(Section):
    """Section of the step that merges an adapter into its base."""

    rows: PositiveInt = Field(
        default=4, description="Held-out rows on which the merged model must give the logits of base and adapter."
    )
    into: Literal["trained", "original"] = Field(
        default="trained",
        description="What an adapter of method qlora is added to: trained (the 4-bit weights it was trained on, so the"
        " model that training judged) or original (the base's own). Others have one kind only.",
    )
    tolerance: PositiveFloat = Field(
        default=1e-5,
        description="Largest difference of two logits, relative to the largest logit where that is over 1.",
    )
