"""The section of the step that compares attention kernels. Torch-free."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from modelmill.components.core.recipe import Section
from modelmill.components.training.layout import divisors, joined

AttentionDtype = Literal["fp32", "bf16", "fp16"]


class IncoherenceConfig(Section):
    """The experiment on fp8 with and without incoherent processing; see `training/incoherence.py`.

    The defaults are the published experiment as far as it is published (FlashAttention-3, arXiv:2407.08608: 0.1 % of
    entries from N(0, 100) on top of N(0, 1)) with a length and a head size of our own. There the error became 2.6
    times smaller, with the softmax and the values in fp8 too; here these stay exact.
    """

    sequence_length: PositiveInt = Field(default=1024, description="Positions, each seeing every other.")
    head_dim: PositiveInt = Field(default=128, description="Size of the head; a power of two.")
    outlier_share: float = Field(default=0.001, ge=0, le=1, description="Share of the entries that are outliers.")
    outlier_std: PositiveFloat = Field(default=10.0, description="Standard deviation of what makes them so.")
    draws: PositiveInt = Field(default=8, description="Independent draws of queries, keys, values and signs.")

    @model_validator(mode="after")
    def _head_is_a_power_of_two(self) -> Self:
        if self.head_dim & (self.head_dim - 1):
            raise ValueError(f"head_dim {self.head_dim} is no power of two, as a Hadamard matrix needs; use 64 or 128")
        return self


class AttentionBenchmarkConfig(Section):
    """What attention is measured on: every combination of the lists, by every kernel present."""

    sequence_lengths: tuple[PositiveInt, ...] = Field(min_length=1, description="Positions of a row.")
    tokens: PositiveInt = Field(
        default=16384, description="Positions of a batch; a row longer than this is a batch by itself."
    )
    num_heads: PositiveInt = Field(default=16, description="Query heads.")
    kv_heads: tuple[PositiveInt, ...] = Field(default=(4,), min_length=1, description="Key and value heads.")
    head_dims: tuple[PositiveInt, ...] = Field(default=(128,), min_length=1, description="Size of a head.")
    dtypes: tuple[AttentionDtype, ...] = Field(
        default=("bf16",), min_length=1, description="Types of queries, keys and values: fp32, bf16, fp16."
    )
    document_lengths: tuple[PositiveInt | None, ...] = Field(
        default=(None,),
        min_length=1,
        description="Tokens of the documents that rows are cut into and masked by; null: rows are whole.",
    )
    repeats: int = Field(default=5, ge=3, description="Timings of each pass; kernels take turns, the median counts.")
    min_seconds: float = Field(
        default=0.02, ge=0, le=10, description="Shortest timing; a faster pass is called several times in each."
    )
    deterministic: bool = Field(
        default=True, description="Only kernels whose gradients have the same bits every time, as in training."
    )
    seed: NonNegativeInt = Field(default=0, description="Decides queries, keys, values and gradients.")
    incoherence: IncoherenceConfig | None = Field(
        default=IncoherenceConfig(), description="The experiment on fp8, which runs on the CPU; null: none."
    )

    @model_validator(mode="after")
    def _heads_share_keys(self) -> Self:
        for count in self.kv_heads:
            if self.num_heads % count:
                raise ValueError(
                    f"kv_heads {count} does not divide num_heads {self.num_heads};"
                    f" use {joined(divisors(self.num_heads))}"
                )
        return self

    @model_validator(mode="after")
    def _documents_fit(self) -> Self:
        shortest = min(self.sequence_lengths)
        for length in self.document_lengths:
            if length is not None and length >= shortest:
                raise ValueError(
                    f"document_lengths {length} leaves a row of {shortest} tokens whole; use less than {shortest},"
                    " or null"
                )
        return self
