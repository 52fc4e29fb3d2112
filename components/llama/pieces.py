"""Where the tensors of a Hugging Face Llama checkpoint lie in the decoder's parameters."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from modelmill.components.llama.config import LlamaConfig

_PLAIN = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
}
_LAYER = {
    "attention_norm.weight": "input_layernorm.weight",
    "attention.output.weight": "self_attn.o_proj.weight",
    "feed_forward_norm.weight": "post_attention_layernorm.weight",
    "feed_forward.down.weight": "mlp.down_proj.weight",
}


class Piece(NamedTuple):
    """Where a Hugging Face tensor lies in a parameter.

    Attributes:
        name: of the Hugging Face tensor.
        groups: the parameter's rows form as many equal groups, and the tensor has a part in each.
        start: first row of that part, in its group.
        rows: of that part; None: the tensor is the whole parameter.
    """

    name: str
    groups: int = 1
    start: int = 0
    rows: int | None = None

    def view(self, parameter: Tensor) -> Tensor:
        """The tensor's rows: the parameter itself, or a view [groups, rows, D] of it."""
        if self.rows is None:
            return parameter
        return parameter.unflatten(0, (self.groups, -1))[:, self.start : self.start + self.rows]


def pieces(config: LlamaConfig, name: str) -> list[Piece]:
    """Hugging Face tensors making up the parameter `name`."""
    if name in _PLAIN:
        return [Piece(_PLAIN[name])]
    _, index, rest = name.split(".", 2)
    prefix = f"model.layers.{index}."
    if rest in _LAYER:
        return [Piece(prefix + _LAYER[rest])]
    if rest == "attention.qkv.weight":
        groups, head = config.num_kv_heads, config.head_dim
        query = config.num_heads // groups * head
        parts = [("self_attn.q_proj", query), ("self_attn.k_proj", head), ("self_attn.v_proj", head)]
    else:
        groups = config.feed_forward_groups
        half = config.intermediate_size // groups
        parts = [("mlp.gate_proj", half), ("mlp.up_proj", half)]
    found = []
    start = 0
    for part, rows in parts:
        found.append(Piece(f"{prefix}{part}.weight", groups, start, rows))
        start += rows
    return found
