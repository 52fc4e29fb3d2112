"""The plan's figures against what a real model and optimizer hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from modelmill.components.llama.config import LlamaConfig
from modelmill.components.llama.model import LlamaDecoder
from modelmill.components.training import activations, estimate
from modelmill.components.training.memory_tracker import saved_for_backward
from modelmill.components.training.optimizer import make_optimizer
from modelmill.components.training.options import ActivationMemory, EveryNLayers
from tests.components.training.samples import training_config

SHAPES: dict[str, dict[str, Any]] = {
    "grouped, tied": {"num_heads": 4, "num_kv_heads": 2, "num_layers": 2, "tie_embeddings": True},
    "untied, deeper": {"num_heads": 4, "num_layers": 5, "intermediate_size": 352, "hidden_size": 128},
}


def model_config(shape: str) -> LlamaConfig:
    base = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 176, "max_sequence_length": 96}
    return LlamaConfig.model_validate({**base, **SHAPES[shape]})


def one_step(config: LlamaConfig) -> tuple[LlamaDecoder, torch.optim.AdamW]:
    model = LlamaDecoder(config)
    optimizer = make_optimizer(model, training_config())
    rows = torch.randint(0, config.known_vocab_size, (2, 97))
    model(rows[:, :-1], rows[:, 1:]).backward()
    optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("shape", list(SHAPES))
def test_weights_gradients_and_moments_are_exact(shape: str) -> None:
    config = model_config(shape)
    model, optimizer = one_step(config)
    memory = estimate.estimate_memory(config, training_config(), 96)
    parameters = list(model.parameters())
    assert memory.weights == sum(p.nbytes for p in parameters)
    assert memory.gradients == sum(p.grad.nbytes for p in parameters if p.grad is not None)
    moments = [v for state in optimizer.state.values() for key, v in state.items() if key != "step"]
    assert memory.optimizer == sum(value.nbytes for value in moments)


def saved_by(config: LlamaConfig, mode: ActivationMemory, precision: str) -> int:
    """Bytes that the forward pass of a model leaves behind for the backward pass."""
    model = LlamaDecoder(config)
    activations.apply(model, mode)
    rows = torch.randint(0, config.known_vocab_size, (4, 97))

    def forward() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
            return model(rows[:, :-1], rows[:, 1:])

    forward().backward()  # lazily made buffers are not the step's
    return saved_for_backward(forward)[1]


@pytest.mark.parametrize("shape", list(SHAPES))
@pytest.mark.parametrize("precision", ["fp32", "bf16-mixed"])
@pytest.mark.parametrize(
    "mode", ["none", "full", "selective", "selective_matmul", EveryNLayers(every_n_layers=2)], ids=str
)
def test_saved_bytes_are_within_a_tenth_of_what_is_held(shape: str, precision: str, mode: ActivationMemory) -> None:
    config = model_config(shape)
    training = training_config(
        micro_batch_size=4, precision=precision, activation_memory=mode, parallel={"processes_per_node": 1}
    )
    assert estimate.saved_bytes(config, training, 96) == pytest.approx(saved_by(config, mode, precision), rel=0.1)


def test_the_height_adds_one_block_run_again() -> None:
    config = model_config("untied, deeper")

    def sizes(mode: Any) -> tuple[int, int]:
        training = training_config(activation_memory=mode, parallel={"processes_per_node": 1})
        return estimate.saved_bytes(config, training, 96), estimate.activation_bytes(config, training, 96)

    (none, none_height), (full, full_height) = sizes("none"), sizes("full")
    assert none == none_height
    stream = 4 * config.hidden_size * 2 * 96  # of the micro-batch of 2
    assert full_height - full == pytest.approx((none - full) / config.num_layers + stream, abs=2)
    fifth = sizes({"every_n_layers": 5})  # of five blocks only the first, whose turn comes last
    assert full < fifth[0] == fifth[1] < none
    matmul, selective = sizes("selective_matmul"), sizes("selective")
    assert full < matmul[0] < selective[0]
    assert full_height < matmul[1] < selective[1]
    assert sizes({"budget": 0})[0] == full < sizes({"budget": 0.5})[0] < sizes({"budget": 1})[0]


def test_degrees_divide_what_they_should() -> None:
    config = model_config("untied, deeper")
    whole = estimate.estimate_memory(config, training_config(parallel={"processes_per_node": 1}), 96)
    split = estimate.estimate_memory(config, training_config(parallel={"processes_per_node": 4, "tensor": 4}), 96)
    assert split.weights * 4 == pytest.approx(whole.weights, abs=4)
    assert split.activations * 4 == pytest.approx(whole.activations, abs=4)
    copies = estimate.estimate_memory(config, training_config(parallel={"processes_per_node": 4}), 96)
    assert copies == whole  # a copy of the model a process: data parallelism saves nothing here


@pytest.mark.parametrize("shape", list(SHAPES))
@pytest.mark.parametrize("precision", ["fp32", "bf16-mixed"])
def test_shards_divide_all_but_what_is_gathered(shape: str, precision: str) -> None:
    config, model = model_config(shape), LlamaDecoder(model_config(shape), device="meta")
    whole = estimate.estimate_memory(config, training_config(parallel={"processes_per_node": 1}), 96)
    parallel = {"processes_per_node": 4, "shard": 4}
    split = estimate.estimate_memory(config, training_config(parallel=parallel, precision=precision), 96)
    block = sum(p.numel() for p in model.layers[0].parameters())
    root = sum(p.numel() for p in model.parameters()) - len(model.layers) * block
    assert split.optimizer == whole.optimizer / 4
    # Two blocks are gathered at a time, and one has its gradient before that is shared out.
    assert split.weights == whole.weights / 4 + 4 * root + 2 * block * (2 if precision == "bf16-mixed" else 4)
    assert split.gradients == whole.gradients / 4 + 4 * block
    # Sharded, no bf16 copy of the blocks' weights is kept for the backward pass.
    replicated = training_config(parallel={"processes_per_node": 4}, precision=precision)
    saved = estimate.activation_bytes(config, replicated, 96) - split.activations
    head = config.known_vocab_size * config.hidden_size
    assert saved == (2 * (config.num_parameters() - head) if precision == "bf16-mixed" else 0)


def test_the_published_run_in_figures() -> None:
    llama2_7b = LlamaConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_layers=32,
        num_heads=32,
        num_kv_heads=32,
        max_sequence_length=4096,
    )
    training = training_config(
        steps=429_153,
        global_batch_size=1024,
        micro_batch_size=1,
        parallel={"nodes": 128, "processes_per_node": 32, "tensor": 8},
        precision="bf16-stochastic",
        accelerator="neuron",
    )
    memory = estimate.estimate_memory(llama2_7b, training, 4096)
    assert memory.weights == pytest.approx(6.738e9 * 2 / 8, rel=1e-3)
    assert memory.gib < (estimate.device_gib("trn1-core") or 0)  # it did fit
    flops = estimate.training_flops(llama2_7b, training, 4096)
    assert flops == pytest.approx(1.8e12 * 6 * 6.607e9 * (1 + 32 * 4096 * 4096 * 12 / (6 * 6.607e9)), rel=0.01)
    seconds = estimate.training_seconds(flops, 4096, estimate.peak_flops("trn1-core", "bf16-stochastic") or 0, 0.4)
    assert seconds == pytest.approx(flops / (4096 * 95e12 * 0.4))


@pytest.mark.parametrize(
    ("name", "precision", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16-mixed", 989.4e12),
        ("NVIDIA H100 80GB HBM3", "fp32", 66.9e12),
        ("NVIDIA H200", "bf16-mixed", 989.4e12),
        ("NVIDIA A100-SXM4-80GB", "bf16-mixed", 312e12),
        ("NVIDIA H100 PCIe", "bf16-mixed", None),
        ("cpu", "fp32", None),
        ("NVIDIA GeForce RTX 3090", "fp32", None),
    ],
)
def test_peaks_by_what_torch_calls_the_device(name: str, precision: Any, peak: float | None) -> None:
    assert estimate.peak_flops(name, precision) == peak


def test_memory_of_the_two_a100_boards_differs() -> None:
    assert estimate.device_gib("NVIDIA A100-SXM4-80GB") == 80
    assert estimate.device_gib("NVIDIA A100-SXM4-40GB") == 40
    assert "trn2-core" in estimate.known_devices()


@pytest.mark.parametrize("mfu", [0.0, 1.5, -0.1])
def test_an_impossible_utilisation_is_refused(mfu: float) -> None:
    with pytest.raises(ValueError, match="mfu"):
        estimate.training_seconds(1e15, 1, 1e12, mfu)
