"""The Llama decoder as a torch module, with the projections that share an input fused into one product."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor
from torch.nn import functional as F

from modelmill.components.core.errors import UserError
from modelmill.components.llama.config import LlamaConfig, layout_problem
from modelmill.components.llama.functional import has_hooks, norm_linear, rms_norm, rotate_and_split, swiglu_linear
from modelmill.components.training.attention_kernels import Attend, AttentionKernel, ScaledDotProduct
from modelmill.components.training.collectives import (
    RankGroup,
    TensorParallel,
    copy,
    gather_linear,
    gather_replicated,
    local,
)
from modelmill.components.training.initialize import init_normal
from modelmill.components.training.loss import linear_cross_entropy
from modelmill.components.training.mesh import Mesh


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis with a learned scale (arXiv:1910.07467)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps
        self.tensor: TensorParallel | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        """Normalise [..., D] to [..., D]."""
        weight = local(self.weight)
        if self.tensor is not None and self.tensor.sequence_parallel:
            weight = copy(weight, self.tensor.group)  # each rank normalises positions of its own
        return rms_norm(hidden, weight, self.eps)


class ShardedLinear(nn.Linear):
    """A linear layer that computes with this rank's rows or columns; what `shard_tensors` makes of an `nn.Linear`."""

    def forward(self, input: Tensor) -> Tensor:
        """Map [..., I] to [..., O], where I or O is this rank's part."""
        return F.linear(input, local(self.weight))


class Attention(nn.Module):
    """Causal grouped-query attention; queries, keys and values come from one fused projection.

    Its rows are ordered by key-value group: the group's query heads, its key head, its value head. A contiguous
    slice of whole groups is then attention by itself, which is what tensor parallelism cuts.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads
        self.qkv = nn.Linear(
            config.hidden_size, (config.num_heads + 2 * config.num_kv_heads) * config.head_dim, bias=False
        )
        self.output = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.tensor: TensorParallel | None = None

    def forward(self, hidden: Tensor, norm: RMSNorm, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        """Attend within each row of `norm(hidden)`, [B, T, D]; `cos` and `sin` are [T, Dh / 2]."""
        qkv = _project(hidden, norm, self.qkv, self.tensor)
        query, key, value = rotate_and_split(qkv, cos, sin, self.num_heads, self.num_kv_heads)
        attended = attend(query, key, value)
        output = self.output(attended.transpose(1, 2).flatten(2))
        return output if self.tensor is None else self.tensor.leave(output)


class FeedForward(nn.Module):
    """SwiGLU feed-forward layer; gate and up come from one fused projection (arXiv:2002.05202).

    Its rows are ordered in `config.feed_forward_groups` groups of gate rows and then up rows, so that a contiguous
    slice of whole groups is a feed-forward layer by itself.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.groups = config.feed_forward_groups
        self.gate_up = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.tensor: TensorParallel | None = None

    def forward(self, hidden: Tensor, norm: RMSNorm) -> Tensor:
        """Map `norm(hidden)`, [B, T, D], to [B, T, D]."""
        output = swiglu_linear(_project(hidden, norm, self.gate_up, self.tensor), self.down, self.groups)
        return output if self.tensor is None else self.tensor.leave(output)


def _project(hidden: Tensor, norm: RMSNorm, linear: nn.Linear, tensor: TensorParallel | None) -> Tensor:
    """`linear(norm(hidden))`, of the whole sequence whatever part of it each rank holds."""
    if tensor is None:
        return norm_linear(hidden, norm, linear)
    if tensor.sequence_parallel and type(linear) is ShardedLinear and not has_hooks(linear):
        return gather_linear(norm(hidden), local(linear.weight), tensor.group)
    return linear(tensor.enter(norm(hidden)))


class DecoderLayer(nn.Module):
    """Pre-norm attention and feed-forward, each added to the residual stream."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attention = Attention(config)
        self.feed_forward_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.feed_forward = FeedForward(config)

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        """Map [B, T, D] to [B, T, D]; `cos` and `sin` are [T, Dh / 2]; `attend` knows the batch's documents.

        Under sequence parallelism this rank's positions [B, T / t, D] to the same.
        """
        hidden = hidden + self.attention(hidden, self.attention_norm, cos, sin, attend)
        return hidden + self.feed_forward(hidden, self.feed_forward_norm)


class LlamaDecoder(nn.Module):
    """Llama 2 and 3 decoder (arXiv:2307.09288, arXiv:2407.21783).

    Attributes:
        config: the architecture, with `vocab_size` set.
        layers: the `DecoderLayer`s, each callable as `layer(hidden, cos, sin, attend)`; wrap these to shard or
            checkpoint activations.
        attention_kernel: computes attention in all layers; torch's choice unless it is set to what
            `attention.select` returns.
        lm_head: the output projection, None when the token embedding is the head too.
        tensor: the ranks that share the matrices after `shard_tensors`, None before.
    """

    cos: Tensor
    sin: Tensor

    def __init__(
        self,
        config: LlamaConfig,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        """Build and initialise the decoder.

        Args:
            config: the architecture.
            device: where the parameters live; "meta" allocates and initialises nothing, for sharded or
                checkpointed starts (then `to_empty` and `init_weights`, or load the weights).
            dtype: of the parameters.
            seed: of `init_weights`.

        Raises:
            UserError: `config.vocab_size` is None.
        """
        super().__init__()
        self.config = config
        self.attention_kernel: AttentionKernel = ScaledDotProduct()
        self.tensor: TensorParallel | None = None
        # Built on meta first: torch's own default initialisation would be paid for and thrown away.
        with torch.device("meta"):
            self.embedding = nn.Embedding(config.known_vocab_size, config.hidden_size)
            self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_layers))
            self.norm = RMSNorm(config.hidden_size, config.norm_eps)
            self.lm_head: nn.Linear | None = None
            if not config.tie_embeddings:
                self.lm_head = nn.Linear(config.hidden_size, config.known_vocab_size, bias=False)
            self.to(dtype)
            self.reset_rope("meta")
        if torch.device(device).type != "meta":
            self.to_empty(device=device)
            self.init_weights(seed)

    @property
    def output_weight(self) -> Tensor:
        """The head's weight, [V, D]: the token embedding when tied."""
        return self.embedding.weight if self.lm_head is None else self.lm_head.weight

    def reset_rope(self, device: torch.device | str) -> None:
        """Compute the rotary tables `cos` and `sin`, [max_sequence_length, Dh / 2], on `device`."""
        cos, sin = rope_tables(self.config, device)
        dtype = self.embedding.weight.dtype
        self.register_buffer("cos", cos.to(dtype), persistent=False)
        self.register_buffer("sin", sin.to(dtype), persistent=False)

    @torch.no_grad()
    def init_weights(self, seed: int = 0) -> None:
        """Draw all weights: normal(0, init_std), norms 1.

        The two projections that write to the residual stream get `init_std / sqrt(2 * num_layers)`, so that the
        stream's variance does not grow with depth (GPT-2, Radford et al. 2019, section 2.3).

        Args:
            seed: decides the weights, whatever the mesh, the kind of device and what is sharded how.
        """
        residual_std = self.config.init_std / math.sqrt(2 * self.config.num_layers)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                writes_residual = name.endswith(("attention.output.weight", "feed_forward.down.weight"))
                std = residual_std if writes_residual else self.config.init_std
                init_normal(parameter, name=name, seed=seed, std=std)
        self.reset_rope(self.embedding.weight.device)

    @torch.no_grad()
    def shard_tensors(self, mesh: Mesh, sequence_parallel: bool) -> None:
        """Split the matrices over the mesh's tensor dimension; called by every rank, before any other sharding.

        Parameters become `DTensor`s on that dimension, with the names, shapes and order of rows they had. Projections
        that read the residual stream, the embedding and the head are cut by rows, those that write it by columns
        (Shoeybi et al. 2019, arXiv:1909.08053); norms stay whole. A model on the meta device stays there; real weights
        must be the same on every rank, and each keeps its part.

        Args:
            mesh: of the run; with a tensor dimension of 1 nothing happens.
            sequence_parallel: whether norms and residual stream are split by positions between the matrices
                (Korthikanti et al. 2022, arXiv:2205.05198).

        Raises:
            UserError: the degree does not divide heads, feed-forward width or vocabulary.
        """
        if (group := mesh.tensor_group) is None:
            return
        assert mesh.device_mesh is not None
        if problem := layout_problem(self.config, mesh.tensor):
            raise UserError(problem)
        for path, parameter in list(self.named_parameters()):
            owner, _, name = path.rpartition(".")
            part = distribute_tensor(parameter, mesh.device_mesh["tensor"], [_placement(path)], src_data_rank=None)
            self.get_submodule(owner).register_parameter(name, nn.Parameter(part, parameter.requires_grad))
        self.tensor = TensorParallel(RankGroup.of(group), sequence_parallel)
        for module in self.modules():
            if isinstance(module, RMSNorm | Attention | FeedForward):
                module.tensor = self.tensor
            if isinstance(module, Attention):
                module.num_heads //= mesh.tensor
                module.num_kv_heads //= mesh.tensor
            if isinstance(module, FeedForward):
                module.groups //= mesh.tensor
            if type(module) is nn.Linear:
                module.__class__ = ShardedLinear

    def hidden_states(self, tokens: Tensor, documents: Tensor | None = None) -> Tensor:
        """Final normalised hidden states.

        Args:
            tokens: [B, T] int64 token ids.
            documents: [B, T] int64 ids that rise along each row (see `documents.document_ids`): a position sees its
                own document only. Positions are not counted anew, as rotary embeddings know distances only.

        Returns:
            [B, T, D].

        Raises:
            UserError: T is greater than `max_sequence_length`, or cannot be split over the ranks.
        """
        hidden = self._states(tokens, documents)
        return hidden if self.tensor is None else self.tensor.whole(hidden)

    def _states(self, tokens: Tensor, documents: Tensor | None) -> Tensor:
        """`hidden_states`, under sequence parallelism of this rank's positions only."""
        length = tokens.shape[1]
        if length > self.config.max_sequence_length:
            raise UserError(
                f"sequence_length: {length} tokens is more than the model's max_sequence_length"
                f" {self.config.max_sequence_length}; shorten the sequences or raise max_sequence_length"
            )
        size = self.tensor.group.size if self.tensor is not None and self.tensor.sequence_parallel else 1
        if length % size:
            raise UserError(
                f"sequence_length: {length} tokens cannot be split over {size} tensor-parallel ranks;"
                " use a multiple, or set training.parallel.sequence_parallel to false"
            )
        cos, sin = self.cos[:length], self.sin[:length]
        attend = self.attention_kernel.plan(documents)
        hidden = self._embed(tokens)
        for layer in self.layers:
            hidden = layer(hidden, cos, sin, attend)
        return self.norm(hidden)

    def _embed(self, tokens: Tensor) -> Tensor:
        """Token embeddings [B, T, D], or this rank's positions of them."""
        if self.tensor is None:
            return self.embedding(tokens)
        # Each rank looks up the tokens of its part of the vocabulary, and the sum is what all have found.
        weight = local(self.embedding.weight)
        row = tokens - self.tensor.group.rank * weight.shape[0]
        elsewhere = (row < 0) | (row >= weight.shape[0])
        found = F.embedding(row.masked_fill(elsewhere, 0), weight)
        return self.tensor.leave(found.masked_fill(elsewhere.unsqueeze(-1), 0.0))

    def forward(self, tokens: Tensor, targets: Tensor | None = None, documents: Tensor | None = None) -> Tensor:
        """Logits, or the loss when the targets are given.

        Args:
            tokens: [B, T] int64 token ids.
            targets: [B, T] int64, the token that should follow each position (already shifted); -100 is left
                out of the loss.
            documents: [B, T] int64 ids that rise along each row, when positions are to see their own document only.

        Returns:
            Without targets the logits [B, T, V]; with them the mean cross entropy in nats over the targets that
            are not -100, a scalar, computed without ever holding the logits of more than one chunk.

        Raises:
            UserError: T is greater than `max_sequence_length`, or cannot be split over the ranks.
        """
        hidden, weight = self._states(tokens, documents), local(self.output_weight)
        if self.tensor is not None:
            hidden = self.tensor.enter(hidden)
        if targets is not None:
            group = None if self.tensor is None else self.tensor.group
            return linear_cross_entropy(hidden.flatten(0, 1), weight, targets.flatten(), group=group)
        logits = F.linear(hidden, weight)
        return logits if self.tensor is None else gather_replicated(logits, 2, self.tensor.group)


def _placement(path: str) -> Placement:
    """How tensor parallelism cuts a parameter."""
    if path.endswith("norm.weight"):
        return Replicate()
    return Shard(1 if path.endswith(("attention.output.weight", "feed_forward.down.weight")) else 0)


def rope_tables(config: LlamaConfig, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary angles, float32 [max_sequence_length, Dh / 2] each.

    Llama 3 scaling follows `apply_scaling` of Meta's reference implementation (see `RopeScaling`).
    """
    size = config.head_dim
    frequency = 1.0 / (config.rope_theta ** (torch.arange(0, size, 2, device=device, dtype=torch.float32) / size))
    scaling = config.rope_scaling
    if scaling is not None:
        turns = scaling.original_max_position * frequency / (2 * math.pi)
        low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
        keep = ((turns - low) / (high - low)).clamp(0.0, 1.0)
        frequency = (1 - keep) * frequency / scaling.factor + keep * frequency
    position = torch.arange(config.max_sequence_length, device=device, dtype=torch.float32)
    angle = position[:, None] * frequency
    return angle.cos(), angle.sin()
