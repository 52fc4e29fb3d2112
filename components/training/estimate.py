"""Memory, FLOPs and time of a training run, worked out before it starts. Torch-free arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from modelmill.components.training.config import Precision, TrainingConfig
from modelmill.components.training.options import EveryNLayers, MemoryBudget

_GIB = 2**30

# Dense peaks in FLOP/s of one device by (bf16, fp32), and its memory in GiB. Sparsity is never counted.
# H100 SXM and H200: NVIDIA data sheets (bf16 1,979 with sparsity; fp32 outside the tensor cores 67).
# A100: NVIDIA data sheet. B200: NVIDIA HGX B200 data sheet (4.5 PFLOP/s bf16 with sparsity, 75 TFLOP/s fp32 a GPU).
# L4: NVIDIA data sheet (242 TFLOP/s bf16 with sparsity).
# trn1: AWS instance page, 3,040 TFLOP/s bf16 and 760 fp32 for 32 cores. trn2: 20.8 PFLOP/s of 16 chips are fp8;
# bf16 is 667 and fp32 181 a chip of 8 cores, 96 GiB (AWS Neuron documentation, Trainium2 architecture).
_DEVICES: dict[str, tuple[float, float, float]] = {
    "h100": (989.4e12, 66.9e12, 80),
    "h200": (989.4e12, 66.9e12, 141),
    "b200": (2250e12, 75e12, 180),
    "a100": (312e12, 19.5e12, 40),
    "a100-80gb": (312e12, 19.5e12, 80),
    "l4": (121e12, 30.3e12, 24),
    "trn1-core": (95e12, 23.75e12, 16),
    "trn2-core": (83.4e12, 22.6e12, 12),
    "trn2-logical-core": (166.8e12, 45.2e12, 24),  # two cores, as a process has them by default (LNC=2)
}

# Bytes a parameter: weight, gradient, and the two moments of AdamW. Mixed precision keeps everything in fp32 and
# casts weights as it goes; with stochastic rounding everything is bf16, moments included.
_BYTES: dict[Precision, tuple[int, int, int]] = {
    "fp32": (4, 4, 8),
    "bf16-mixed": (4, 4, 8),
    "bf16-stochastic": (2, 2, 4),
    "fp8-mixed": (4, 4, 8),
}
_BYTES_OF_8BIT_MOMENTS = 2 * (1 + 4 / 256)  # a code each, and an fp32 scale for every block of 256


class DecoderSizes(Protocol):
    """What the estimates read of a model's configuration; `LlamaConfig` has it."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def known_vocab_size(self) -> int: ...
    def num_parameters(self) -> int: ...
    def flops_per_token(self, sequence_length: int) -> int: ...


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes one device holds at the height of a training step."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations

    @property
    def gib(self) -> float:
        """Total in GiB, as devices are sold."""
        return self.total / _GIB


def estimate_memory(model: DecoderSizes, training: TrainingConfig, sequence_length: int) -> MemoryEstimate:
    """Memory of one device.

    Weights, gradients and the two AdamW moments are parameters x bytes (fp32 and bf16-mixed 4 + 4 + 8,
    bf16-stochastic 2 + 2 + 4, moments in 8 bits 2.03), divided by tensor x pipeline x shard, whole on every replica.
    Their bytes are exact but for one step counter a parameter tensor, for uneven shards, and for the vectors and small
    matrices that 8-bit states keep in fp32. On top of shards come what is gathered of them, see `_gathered`.
    Activations: see `activation_bytes`. Left out: the allocator's fragmentation, the device's own context, collective
    buffers, and what a kernel needs while it runs.

    Args:
        model: with `vocab_size` known.
        training: precision, micro-batch and degrees.
        sequence_length: tokens of a row.
    """
    parallel = training.parallel
    parameters = model.num_parameters() / (parallel.tensor * parallel.pipeline * parallel.shard)
    whole_weights, whole_gradients = _gathered(model, training)
    weight, gradient, in_full = _BYTES[training.precision]
    moments = _BYTES_OF_8BIT_MOMENTS if training.optimizer_state == "8bit" else in_full
    return MemoryEstimate(
        weights=int(parameters * weight) + whole_weights,
        gradients=int(parameters * gradient) + whole_gradients,
        optimizer=int(parameters * moments),
        activations=activation_bytes(model, training, sequence_length),
    )


def _gathered(model: DecoderSizes, training: TrainingConfig) -> tuple[int, int]:
    """Bytes of weights and gradients that a device of a sharded run holds whole at the height of a step.

    Weights: embedding, head and last norm from the first use to the end of the backward pass, the block that runs, and
    the next one, which is gathered meanwhile; blocks in bf16 under mixed precision, all else as it is stored.
    Gradients: those of the block that runs, before they are reduced in fp32. The head's is among the activations.
    """
    parallel = training.parallel
    if parallel.shard == 1:
        return 0, 0
    weight, _, _ = _BYTES[training.precision]
    block = _block_parameters(model) / parallel.tensor
    root = (model.num_parameters() - model.num_layers * _block_parameters(model)) / parallel.tensor
    width = 2 if training.precision.endswith("-mixed") else weight
    return int(root * weight + 2 * block * width), int(block * 4)


def _block_parameters(model: DecoderSizes) -> int:
    heads = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    return model.hidden_size * (heads + model.hidden_size + 3 * model.intermediate_size + 2)


def activation_bytes(model: DecoderSizes, training: TrainingConfig, sequence_length: int) -> int:
    """Bytes of activations at the height of the backward pass of one micro-batch.

    `saved_bytes`, and for a checkpointed block what its second forward pass makes anew: the last block's, which
    is the first to run again, while all others still hold what they saved. The gradients that pass through it
    (about w x (2 I + D) a token) are left out, like all that an operator needs while it runs.
    """
    kept, plain = _layer_bytes(model, training)
    mode, hidden, inner = training.activation_memory, model.hidden_size, model.intermediate_size
    width, stream = _widths(training.precision)
    again: float
    if mode == "none":
        again = 0
    elif mode == "full":
        again = plain
    elif isinstance(mode, EveryNLayers):
        again = 0 if (model.num_layers - 1) % mode.every_n_layers else plain
    elif isinstance(mode, MemoryBudget):
        again = max(0, plain - kept)
    else:  # what is kept anyway: the input, the fused gate and up projection, and the attention
        attention = width * hidden + 4 * model.num_heads if mode == "selective" else 0
        again = plain - stream * hidden - width * 2 * inner - attention
    tokens = training.micro_batch_size * sequence_length
    return saved_bytes(model, training, sequence_length) + int(tokens * again / training.parallel.tensor)


def saved_bytes(model: DecoderSizes, training: TrainingConfig, sequence_length: int) -> int:
    """Bytes kept from the forward for the backward pass of one micro-batch.

    With D hidden, I intermediate, H and K heads and key-value heads of size Dh, for each token and layer that is not
    checkpointed:

        fp32 on a CPU    4 x (3 D + (H + 2 K) Dh + 2 I + H + 2), norms and SwiGLU recomputed
        fp32 elsewhere   the same + 4 x 2 D, norms kept
        mixed            4 x (2 D + H + 2) + 2 x (3 D + (H + 2 K) Dh + 4 I), a residual stream in fp32
                         (with stochastic rounding in bf16)

    and, with s bytes an element of the stream and w of a product, for one that is:

        full                s D
        selective_matmul    s D + w ((H + 2 K) Dh + 2 D + 2 I)
        selective           the same + w D + 4 H
        budget b            s D + b (the intermediates of composed operators, as of mixed above, - s D) at most

    and once: the last hidden state, its gradient, and the head's weight gradient [V, D] in fp32, which the chunked
    loss makes in the forward pass. Mixed precision adds a bf16 copy of the weights of blocks that
    are neither checkpointed nor sharded. Attention is the memory-efficient kind: no T x T scores. Tensor parallelism
    divides all of it (with sequence parallelism); a pipeline of P stages holds L / P layers of P micro-batches.
    """
    parallel, mode, layers = training.parallel, training.activation_memory, model.num_layers
    kept, plain = _layer_bytes(model, training)
    if isinstance(mode, EveryNLayers):
        checkpointed = -(-layers // mode.every_n_layers)
    else:
        checkpointed = 0 if mode == "none" else layers
    whole = 1.0 if isinstance(mode, MemoryBudget) and mode.budget else 1 - checkpointed / layers
    cast = whole * 2 * model.num_parameters() / parallel.pipeline if training.precision.endswith("-mixed") else 0.0
    if parallel.shard > 1:  # gathered in bf16 and dropped after use, but for the head
        cast = min(cast, 2 * model.hidden_size * model.known_vocab_size)
    tokens = training.micro_batch_size * sequence_length
    in_flight = min(parallel.pipeline, training.accumulation_steps)
    of_layers = checkpointed * kept + (layers - checkpointed) * plain
    head = 4 * model.hidden_size * (2 * tokens + model.known_vocab_size)
    return int((tokens * of_layers / parallel.pipeline * in_flight + head + cast) / parallel.tensor)


def _layer_bytes(model: DecoderSizes, training: TrainingConfig) -> tuple[float, int]:
    """Saved bytes of one token in a layer under the mode, and in one that nothing is done to; see `saved_bytes`."""
    hidden, inner, mode = model.hidden_size, model.intermediate_size, training.activation_memory
    heads = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    width, stream = _widths(training.precision)
    composed = stream * 2 * hidden + 4 * (model.num_heads + 2) + width * (3 * hidden + heads + 4 * inner)
    plain = composed
    if training.precision == "fp32":  # the hand-written gradients
        plain -= width * 2 * inner
        plain -= width * 2 * hidden if training.accelerator in ("auto", "cpu") else 0
    if isinstance(mode, MemoryBudget):
        return stream * hidden + mode.budget * (composed - stream * hidden), composed
    kept = stream * hidden
    if mode in ("selective", "selective_matmul"):
        kept += width * (heads + 2 * hidden + 2 * inner)
    if mode == "selective":
        kept += width * hidden + 4 * model.num_heads
    return kept, plain


def _widths(precision: Precision) -> tuple[int, int]:
    """Bytes of an element of a product and of the residual stream."""
    return (2 if precision != "fp32" else 4), (2 if precision == "bf16-stochastic" else 4)


def training_flops(model: DecoderSizes, training: TrainingConfig, sequence_length: int) -> int:
    """Floating-point operations of the whole run, forward and backward (see `LlamaConfig.flops_per_token`)."""
    tokens = training.steps * training.global_batch_size * sequence_length
    return tokens * model.flops_per_token(sequence_length)


def training_seconds(flops: float, devices: int, peak: float, mfu: float) -> float:
    """Seconds of training at a given utilisation: `flops / (devices x peak x mfu)`.

    Args:
        flops: of the whole run.
        devices: that share it.
        peak: FLOP/s of one device, from `peak_flops` or a measured matrix product.
        mfu: model FLOPs utilisation in (0, 1]; 0.3 to 0.5 is usual on GPUs for dense decoders.

    Raises:
        ValueError: `mfu` is outside (0, 1], or another argument is not positive.
    """
    if not 0 < mfu <= 1 or min(flops, devices, peak) <= 0:
        raise ValueError(f"flops {flops}, devices {devices} and peak {peak} must be positive and mfu {mfu} in (0, 1]")
    return flops / (devices * peak * mfu)


def known_devices() -> list[str]:
    """Names `peak_flops` and `device_gib` know."""
    return sorted(_DEVICES)


def peak_flops(device: str, precision: Precision) -> float | None:
    """Dense peak FLOP/s of one device for the precision's matrix products.

    Args:
        device: one of `known_devices`, or what torch calls the device (`NVIDIA H100 80GB HBM3`).
        precision: of the run; fp8-mixed has the peak of bf16, in which part of its products run.

    Returns:
        None when the device is not in the table (a CPU never is: measure it).
    """
    entry = _entry(device)
    if entry is None:
        return None
    return entry[1] if precision == "fp32" else entry[0]


def device_gib(device: str) -> float | None:
    """Memory of one device in GiB, or None when it is not in the table."""
    entry = _entry(device)
    return entry[2] if entry else None


def _entry(device: str) -> tuple[float, float, float] | None:
    name = device.lower()
    if name in _DEVICES:
        return _DEVICES[name]
    found = next((key for key in ("h100", "h200", "b200", "a100") if key in name), None)
    if found == "a100" and "80gb" in name:
        found = "a100-80gb"
    # PCIe and NVL boards of these GPUs have other peaks; better no figure than a wrong one.
    return None if found is None or "pcie" in name or "nvl" in name or "gb200" in name else _DEVICES[found]
