"""The Llama architecture as a validated, torch-free value.

Sources: Llama 2 (Touvron et al. 2023, arXiv:2307.09288), Llama 3 (Grattafiori et al. 2024, arXiv:2407.21783),
FLOPs convention of PaLM (Chowdhery et al. 2022, arXiv:2204.02311, appendix B).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError, model_validator

from modelmill.components.core.errors import UserError
from modelmill.components.core.recipe import Section
from modelmill.components.training.config import TrainingConfig
from modelmill.components.training.layout import divisors, joined


class RopeScaling(BaseModel):
    """Llama 3 stretching of the rotary wavelengths beyond the pretraining context (arXiv:2407.21783, section 3.4).

    Wavelengths (in positions) longer than `original_max_position / low_frequency_factor` are multiplied by
    `factor`, those shorter than `original_max_position / high_frequency_factor` are kept, and those between
    are interpolated. Other scaling types (linear, dynamic, yarn, longrope) are not implemented.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    type: Literal["llama3"] = "llama3"
    factor: float = Field(ge=1.0)
    low_frequency_factor: PositiveFloat = 1.0
    high_frequency_factor: PositiveFloat = 4.0
    original_max_position: PositiveInt = 8192

    @model_validator(mode="after")
    def _band_is_not_empty(self) -> Self:
        if self.high_frequency_factor <= self.low_frequency_factor:
            raise ValueError(
                f"high_frequency_factor: {self.high_frequency_factor} must be greater than"
                f" low_frequency_factor {self.low_frequency_factor}"
            )
        return self


class LlamaConfig(BaseModel):
    """Shape and constants of a Llama decoder.

    `vocab_size` None means "the tokenizer decides": fill it with `config.model_copy(update={"vocab_size": n})`
    before building a model or counting parameters. `num_kv_heads` defaults to `num_heads` (multi-head
    attention); fewer gives grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245).

    Raises:
        pydantic.ValidationError: a field is missing, unknown or out of range, or the sizes do not fit together;
            the message names the field, its value and the values that would do.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    vocab_size: PositiveInt | None = None
    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    num_layers: PositiveInt
    num_heads: PositiveInt
    num_kv_heads: PositiveInt = Field(default_factory=lambda data: data.get("num_heads", 1))
    max_sequence_length: PositiveInt
    rope_theta: PositiveFloat = 10000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: PositiveFloat = 1e-5
    tie_embeddings: bool = False
    init_std: PositiveFloat = 0.02

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        if self.hidden_size % 2:
            raise ValueError(
                f"hidden_size: {self.hidden_size} is odd, and rotary embeddings pair up the dimensions"
                f" of a head; use an even number such as {self.hidden_size + 1}"
            )
        if self.hidden_size % self.num_heads or self.head_dim % 2:
            raise ValueError(
                f"num_heads: {self.num_heads} does not divide hidden_size {self.hidden_size} into heads of an even"
                f" size; use {joined(divisors(self.hidden_size // 2))}"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads: {self.num_kv_heads} does not divide num_heads {self.num_heads};"
                f" use {joined(divisors(self.num_heads))}"
            )
        return self

    @property
    def head_dim(self) -> int:
        """Dimension of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def feed_forward_groups(self) -> int:
        """Groups of gate and up rows in the fused projection: the finest that both tensor-parallel cuts allow."""
        return math.gcd(self.num_kv_heads, self.intermediate_size)

    @property
    def known_vocab_size(self) -> int:
        """`vocab_size` once it is known.

        Raises:
            UserError: it is still None.
        """
        if self.vocab_size is None:
            raise UserError("vocab_size: is not set; give it a number, or fill it from the tokenizer")
        return self.vocab_size

    def num_non_embedding_parameters(self) -> int:
        """Parameters of the layers and the final norm: no token embedding, no output head."""
        attention = 2 * self.hidden_size * (self.num_heads + self.num_kv_heads) * self.head_dim
        feed_forward = 3 * self.hidden_size * self.intermediate_size
        return self.num_layers * (attention + feed_forward + 2 * self.hidden_size) + self.hidden_size

    def num_parameters(self) -> int:
        """All trainable parameters; a tied head is counted once.

        Raises:
            UserError: `vocab_size` is None.
        """
        tables = 1 if self.tie_embeddings else 2
        return self.num_non_embedding_parameters() + tables * self.known_vocab_size * self.hidden_size

    def flops_per_token(self, sequence_length: int) -> int:
        """Floating-point operations to train on one token: forward and backward, multiply and add counted apart.

        `6 * N_matmul + 12 * num_layers * num_heads * head_dim * sequence_length`, where `N_matmul` counts the
        weights that enter a matrix product (projections and output head, tied or not; no lookup, no norm). The
        attention term is that of the full `sequence_length x sequence_length` scores, not halved for the causal
        mask, and nothing recomputed is counted: PaLM's convention for model FLOPs utilisation (arXiv:2204.02311,
        appendix B), which makes figures comparable with published ones.

        Raises:
            UserError: `vocab_size` is None.
        """
        norms = (2 * self.num_layers + 1) * self.hidden_size
        matmul = self.num_non_embedding_parameters() - norms + self.known_vocab_size * self.hidden_size
        return 6 * matmul + 12 * self.num_layers * self.num_heads * self.head_dim * sequence_length

    def to_huggingface(self) -> dict[str, Any]:
        """The `config.json` of `transformers.LlamaForCausalLM`, without dtype and special token ids.

        Both generations of keys are written, `rope_parameters` (transformers 5) and `rope_theta` with
        `rope_scaling` (transformers 4, vLLM, llama.cpp), because each reader knows only one of them.

        Raises:
            UserError: `vocab_size` is None.
        """
        scaling = None
        if self.rope_scaling is not None:
            scaling = {
                "rope_type": "llama3",
                "factor": self.rope_scaling.factor,
                "low_freq_factor": self.rope_scaling.low_frequency_factor,
                "high_freq_factor": self.rope_scaling.high_frequency_factor,
                "original_max_position_embeddings": self.rope_scaling.original_max_position,
            }
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.known_vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": self.max_sequence_length,
            "rope_theta": self.rope_theta,
            "rope_scaling": scaling,
            "rope_parameters": {"rope_theta": self.rope_theta, **(scaling or {"rope_type": "default"})},
            "rms_norm_eps": self.norm_eps,
            "tie_word_embeddings": self.tie_embeddings,
            "initializer_range": self.init_std,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "attention_dropout": 0.0,
        }

    @classmethod
    def from_huggingface(cls, config: Mapping[str, Any]) -> Self:
        """Read a Hugging Face `config.json` of model type `llama`, of transformers 4 or 5.

        Args:
            config: the parsed JSON. Keys that do not change the computation are ignored; optional keys take
                the defaults of `transformers.LlamaConfig`.

        Raises:
            UserError: a key is missing, or asks for something this decoder does not implement.
        """
        _refuse_unimplemented(config)
        names = {
            "vocab_size": "vocab_size",
            "hidden_size": "hidden_size",
            "intermediate_size": "intermediate_size",
            "num_layers": "num_hidden_layers",
            "num_heads": "num_attention_heads",
        }
        for key in names.values():
            if config.get(key) is None:
                raise UserError(f"config.json: key {key} is missing; use the config.json of a Llama checkpoint")
        fields: dict[str, Any] = {field: config[key] for field, key in names.items()}
        fields["num_kv_heads"] = config.get("num_key_value_heads") or fields["num_heads"]
        fields["max_sequence_length"] = config.get("max_position_embeddings", 2048)
        fields["norm_eps"] = config.get("rms_norm_eps", 1e-6)
        fields["tie_embeddings"] = config.get("tie_word_embeddings", False)
        fields["init_std"] = config.get("initializer_range", 0.02)
        fields["rope_theta"], fields["rope_scaling"] = _read_rope(config)
        try:
            read = cls.model_validate(fields)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"])
            raise UserError(f"config.json: {place + ': ' if place else ''}{first['msg']}") from error
        head_dim = config.get("head_dim")
        if head_dim not in (None, read.head_dim):
            raise UserError(
                f"config.json: head_dim {head_dim} is not hidden_size / num_attention_heads ="
                f" {read.head_dim}, the only head size implemented; use another checkpoint"
            )
        return read


class PretrainConfig(Section):
    """Section of the pretraining step."""

    model: LlamaConfig = Field(description="Architecture.")
    training: TrainingConfig = Field(description="Batch, layout, optimizer, schedule.")

    @model_validator(mode="after")
    def _degrees_fit(self) -> Self:
        if problem := layout_problem(self.model, self.training.parallel.tensor):
            raise ValueError(problem)
        return self


class ContinueConfig(Section):
    """Section of the step that continues a pretraining; the architecture is the base's."""

    training: TrainingConfig = Field(description="Batch, layout, optimizer, schedule; steps count from here.")


def layout_problem(
    model: LlamaConfig, tensor: int, sequence_length: int | None = None, sequence_parallel: bool = False
) -> str | None:
    """What is wrong with splitting a model's matrices over some ranks, as one line, or None.

    Args:
        model: the architecture; a vocabulary that is not yet known fits.
        tensor: the tensor-parallel degree.
        sequence_length: positions in a row of the data, when known.
        sequence_parallel: whether positions are split as well.
    """
    sizes = [(model.num_kv_heads, "key-value heads"), (model.intermediate_size, "feed-forward width")]
    sizes += [(model.vocab_size, "vocabulary")] if model.vocab_size is not None else []
    common = math.gcd(*(size for size, _ in sizes))
    for size, name in sizes:
        if not size % tensor:
            continue
        what = f"{size} {name}" if name.endswith("heads") else f"{name} {size}"
        fix = f"use {joined(divisors(common))}"
        if name == "vocabulary" and not math.gcd(model.num_kv_heads, model.intermediate_size) % tensor:
            fix += f", or pad it: set model.vocab_size to {math.ceil(size / tensor) * tensor}"
        return f"training.parallel.tensor: {tensor} does not divide the model's {what}; {fix}"
    if sequence_parallel and sequence_length is not None and sequence_length % tensor:
        return (
            f"packing.sequence_length: {sequence_length} is no multiple of training.parallel.tensor {tensor}, over"
            " which sequence_parallel splits it; use a multiple or set training.parallel.sequence_parallel to false"
        )
    return None


_IMPLEMENTED: dict[str, tuple[Any, ...]] = {
    "model_type": ("llama",),
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "attention_dropout": (0, 0.0),
    "partial_rotary_factor": (1, 1.0),
    "quantization_config": (),
    "sliding_window": (),
}


def _refuse_unimplemented(config: Mapping[str, Any]) -> None:
    for key, allowed in _IMPLEMENTED.items():
        value = config.get(key)
        if value is not None and value not in allowed:
            wanted = f"only {allowed[0]!r} is" if allowed else "it is not"
            shown = repr(value) if len(repr(value)) < 60 else "{...}"
            raise UserError(
                f"config.json: {key} {shown} cannot be loaded, {wanted} implemented; use a plain Llama checkpoint"
            )


def _read_rope(config: Mapping[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """Theta and scaling fields from `rope_parameters` (transformers 5) or `rope_theta`/`rope_scaling` (4)."""
    parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = parameters.get("rope_theta", config.get("rope_theta", 10000.0))
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind == "default":
        _refuse_unimplemented({"partial_rotary_factor": parameters.get("partial_rotary_factor")})
        return theta, None
    if kind != "llama3":
        raise UserError(f"config.json: rope type {kind!r} is not implemented; use one with 'default' or 'llama3'")
    names = {
        "factor": "factor",
        "low_frequency_factor": "low_freq_factor",
        "high_frequency_factor": "high_freq_factor",
        "original_max_position": "original_max_position_embeddings",
    }
    return theta, {field: parameters[key] for field, key in names.items() if key in parameters}
