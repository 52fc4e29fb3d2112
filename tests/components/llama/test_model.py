"""The decoder by itself: initialisation, shapes, limits, and the paths that save memory."""

import math

import pytest
import torch
from torch.nn import functional as F

from modelmill.components.core.errors import UserError
from modelmill.components.llama.functional import norm_linear, rms_norm, rotate_and_split, swiglu_linear
from modelmill.components.llama.model import LlamaDecoder, RMSNorm

from .conftest import make_config
from .test_loss import LargestTensor


def test_projections_onto_the_residual_stream_start_smaller():
    config = make_config(hidden_size=256, intermediate_size=512, num_layers=8, num_kv_heads=2, init_std=0.02)
    model = LlamaDecoder(config, seed=1)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert (parameter == 1).all()
            continue
        residual = name.endswith(("attention.output.weight", "feed_forward.down.weight"))
        std = 0.02 / math.sqrt(16) if residual else 0.02
        assert parameter.std().item() == pytest.approx(std, rel=0.02), name
        assert abs(parameter.mean().item()) < 4 * std / math.sqrt(parameter.numel()), name


def test_initialisation_follows_the_seed():
    first, second, other = (LlamaDecoder(make_config(), seed=seed) for seed in (7, 7, 8))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.embedding.weight, other.embedding.weight)
    later = LlamaDecoder(make_config(), device="meta").to_empty(device="cpu")
    later.init_weights(7)
    tokens = torch.randint(0, 211, (1, 8))
    assert torch.equal(later(tokens), first(tokens))


def test_an_untrained_model_predicts_uniformly(config):
    model = LlamaDecoder(config)
    tokens = torch.randint(0, 211, (4, 33))
    assert model(tokens[:, :-1], tokens[:, 1:]).item() == pytest.approx(math.log(211), abs=0.05)


def test_shapes_and_loss(config):
    model = LlamaDecoder(config)
    tokens = torch.randint(0, 211, (3, 17))
    targets = torch.randint(0, 211, (3, 17))
    targets[1] = -100
    logits = model(tokens)
    assert logits.shape == (3, 17, 211)
    assert model.hidden_states(tokens).shape == (3, 17, 64)
    torch.testing.assert_close(model(tokens, targets), F.cross_entropy(logits.flatten(0, 1), targets.flatten()))


def test_attention_is_causal(config):
    model = LlamaDecoder(config).eval()
    tokens = torch.randint(0, 211, (1, 24))
    changed = tokens.clone()
    changed[0, 12] = (changed[0, 12] + 1) % 211
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :12], after[:, :12])
    assert not torch.allclose(before[:, 12:], after[:, 12:])


def test_a_sequence_that_is_too_long_is_refused():
    model = LlamaDecoder(make_config(max_sequence_length=8))
    with pytest.raises(UserError, match="9 tokens is more than the model's max_sequence_length 8"):
        model(torch.zeros(1, 9, dtype=torch.int64))


def test_rotary_tables_are_not_saved_but_projections_are_fused():
    names = set(LlamaDecoder(make_config(num_layers=1, tie_embeddings=True), device="meta").state_dict())
    assert names == {
        "embedding.weight",
        "layers.0.attention_norm.weight",
        "layers.0.attention.qkv.weight",
        "layers.0.attention.output.weight",
        "layers.0.feed_forward_norm.weight",
        "layers.0.feed_forward.gate_up.weight",
        "layers.0.feed_forward.down.weight",
        "norm.weight",
    }


def test_a_training_step_never_makes_the_logits():
    config = make_config(vocab_size=4096, hidden_size=16, intermediate_size=16, num_heads=2, num_layers=1)
    model = LlamaDecoder(config)
    tokens = torch.randint(0, 4096, (32, 64))
    with LargestTensor() as recorded:
        model(tokens, tokens).backward()
    assert recorded.elements == 512 * 4096 < tokens.numel() * 4096


def test_hand_written_gradients_match_finite_differences():
    def double(*shape):
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    angles = torch.randn(5, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: rotate_and_split(x, angles.cos(), angles.sin(), 4, 2), double(2, 5, 48))


@pytest.mark.parametrize("hooked", [False, True])
def test_recomputing_paths_equal_calling_the_modules(hooked):
    hidden = torch.randn(2, 5, 12, requires_grad=True)
    norm, linear, down = RMSNorm(12, 1e-5), torch.nn.Linear(12, 20, bias=False), torch.nn.Linear(10, 12, bias=False)
    torch.nn.init.normal_(norm.weight)
    calls = []
    if hooked:
        for module in (linear, down):
            module.register_forward_hook(lambda *_: calls.append(1))
    parameters = (hidden, norm.weight, linear.weight, down.weight)

    ours = swiglu_linear(norm_linear(hidden, norm, linear), down)
    gate, up = F.linear(F.rms_norm(hidden, (12,), norm.weight, 1e-5), linear.weight).chunk(2, -1)
    expected = F.linear(F.silu(gate) * up, down.weight)
    torch.testing.assert_close(ours, expected)
    grad = torch.randn_like(ours)
    torch.testing.assert_close(
        torch.autograd.grad(ours, parameters, grad), torch.autograd.grad(expected, parameters, grad)
    )
    assert len(calls) == (2 if hooked else 0)


def test_rms_norm_alone_equals_torchs():
    hidden, weight = torch.randn(3, 7, 16, requires_grad=True), torch.randn(16, requires_grad=True)
    ours, expected = rms_norm(hidden, weight, 1e-6), F.rms_norm(hidden, (16,), weight, 1e-6)
    torch.testing.assert_close(ours, expected)
    grad = torch.randn_like(ours)
    torch.testing.assert_close(
        torch.autograd.grad(ours, (hidden, weight), grad), torch.autograd.grad(expected, (hidden, weight), grad)
    )


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_stays_close_to_float32(config, autocast):
    model = LlamaDecoder(config)
    tokens = torch.randint(0, 211, (2, 32))
    exact = model(tokens, tokens)
    exact.backward()
    expected = model.layers[0].attention.qkv.weight.grad.clone()
    model.zero_grad()
    if not autocast:
        model.to(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss = model(tokens, tokens)
    loss.backward()
    torch.testing.assert_close(loss, exact, rtol=1e-2, atol=1e-2)
    found = model.layers[0].attention.qkv.weight.grad
    assert (found.float() - expected).norm() < 0.05 * expected.norm()


def test_activation_checkpointing_of_the_layers_changes_nothing():
    model = LlamaDecoder(make_config(num_kv_heads=2))
    tokens = torch.randint(0, 211, (2, 16))
    model(tokens, tokens).backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    for layer in model.layers:
        forward = layer.forward
        layer.forward = lambda *args, forward=forward: torch.utils.checkpoint.checkpoint(
            forward, *args, use_reentrant=False
        )
    model(tokens, tokens).backward()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
