"""What a configuration accepts, counts and exchanges."""

import re

import pytest
import torch
from pydantic import ValidationError
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from modelmill.components.core.errors import UserError
from modelmill.components.llama.config import LlamaConfig, layout_problem
from modelmill.components.llama.model import LlamaDecoder

from .conftest import BASE, make_config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"num_heads": 3},
            "num_heads: 3 does not divide hidden_size 64 into heads of an even size; use 1, 2, 4, 8, 16, 32",
        ),
        (
            {"num_heads": 64},
            "num_heads: 64 does not divide hidden_size 64 into heads of an even size; use 1, 2, 4, 8, 16, 32",
        ),
        ({"num_kv_heads": 3}, "num_kv_heads: 3 does not divide num_heads 4; use 1, 2, 4"),
        ({"num_kv_heads": 8}, "num_kv_heads: 8 does not divide num_heads 4; use 1, 2, 4"),
        ({"hidden_size": 65}, "hidden_size: 65 is odd"),
        ({"num_layers": 0}, "greater than 0"),
        ({"hiden_size": 64}, "Extra inputs are not permitted"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "Input should be 'llama3'"),
        (
            {"rope_scaling": {"factor": 4.0, "low_frequency_factor": 4.0}},
            "high_frequency_factor: 4.0 must be greater than low_frequency_factor 4.0",
        ),
    ],
)
def test_wrong_configurations_name_the_field_and_the_choices(changes, message):
    with pytest.raises(ValidationError, match=re.escape(message)):
        make_config(**changes)


def test_key_value_heads_default_to_the_query_heads_and_a_config_is_frozen():
    config = make_config()
    assert config.num_kv_heads == 4
    with pytest.raises(ValidationError, match="frozen"):
        config.num_heads = 8


def test_the_vocabulary_may_come_later():
    config = LlamaConfig.model_validate({key: value for key, value in BASE.items() if key != "vocab_size"})
    for use in (config.num_parameters, config.to_huggingface, lambda: LlamaDecoder(config)):
        with pytest.raises(UserError, match="vocab_size: is not set"):
            use()
    assert config.model_copy(update={"vocab_size": 211}) == make_config()


def test_parameters_are_counted(config):
    model = LlamaDecoder(config, device="meta")
    assert config.num_parameters() == sum(p.numel() for p in model.parameters())
    embeddings = model.embedding.weight.numel() * (1 if config.tie_embeddings else 2)
    assert config.num_non_embedding_parameters() == config.num_parameters() - embeddings


def test_llama_sizes_are_the_published_ones():
    llama2_7b = LlamaConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_layers=32,
        num_heads=32,
        max_sequence_length=4096,
    )
    llama3_8b = LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_layers=32, num_heads=32, num_kv_heads=8,
        max_sequence_length=8192, rope_theta=500000.0,
    )  # fmt: skip
    assert llama2_7b.num_parameters() == 6_738_415_616
    assert llama3_8b.num_parameters() == 8_030_261_248


def test_flops_agree_with_torchs_counter(config):
    # The counter sees the full score matrix, as the formula does: neither halves it for the causal mask. The
    # math kernel is counted because the fused one recomputes scores in backward, which model FLOPs leave out.
    model = LlamaDecoder(config)
    tokens = torch.randint(0, config.vocab_size, (2, 48))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(tokens, tokens).backward()
    assert counter.get_total_flops() == pytest.approx(tokens.numel() * config.flops_per_token(48), rel=0.01)


@pytest.mark.parametrize(
    ("changes", "tensor", "message"),
    [
        (
            {"num_heads": 8, "num_kv_heads": 8, "vocab_size": 256},
            3,
            "training.parallel.tensor: 3 does not divide the model's 8 key-value heads; use 1, 2, 4, 8",
        ),
        (
            {"num_kv_heads": 4, "intermediate_size": 110, "vocab_size": 256},
            4,
            "training.parallel.tensor: 4 does not divide the model's feed-forward width 110; use 1 or 2",
        ),
        (
            {},
            2,
            "training.parallel.tensor: 2 does not divide the model's vocabulary 211; use 1, or pad it: set"
            " model.vocab_size to 212",
        ),
        (
            {"vocab_size": 212},
            2,
            "packing.sequence_length: 33 is no multiple of training.parallel.tensor 2, over which sequence_parallel"
            " splits it; use a multiple or set training.parallel.sequence_parallel to false",
        ),
    ],
)
def test_tensor_degrees_that_do_not_fit_name_those_that_do(changes, tensor, message):
    assert layout_problem(make_config(**changes), tensor, 33, True) == message
    assert layout_problem(make_config(**changes), 1, 33, True) is None


def test_tensor_degrees_that_fit():
    config = make_config(vocab_size=212)
    assert layout_problem(config, 2, 32, True) is None
    assert layout_problem(config, 2, 33, False) is None
    assert layout_problem(config.model_copy(update={"vocab_size": None}), 4, 32, True) is None


def test_huggingface_round_trip(config):
    assert LlamaConfig.from_huggingface(config.to_huggingface()) == config


@pytest.mark.parametrize("generation", ["rope_parameters", "rope_scaling"])
def test_both_generations_of_rope_keys_are_read(generation):
    config = make_config(rope_theta=500000.0, rope_scaling={"factor": 8.0, "original_max_position": 32})
    values = config.to_huggingface()
    for key in ("rope_parameters",) if generation == "rope_scaling" else ("rope_scaling", "rope_theta"):
        del values[key]
    assert LlamaConfig.from_huggingface(values) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "qwen2"}, "model_type 'qwen2'"),
        ({"attention_bias": True}, "attention_bias True"),
        ({"mlp_bias": True}, "mlp_bias True"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"attention_dropout": 0.1}, "attention_dropout 0.1"),
        ({"head_dim": 32}, "head_dim 32 is not hidden_size / num_attention_heads = 16"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope type 'yarn'"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "rope type 'linear'"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"hidden_size": None}, "key hidden_size is missing"),
        ({"num_attention_heads": 3}, "num_heads: 3 does not divide hidden_size 64"),
        ({"vocab_size": "many"}, "vocab_size"),
    ],
)
def test_a_huggingface_config_that_is_not_implemented_is_refused(changes, message):
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        LlamaConfig.from_huggingface({**make_config().to_huggingface(), **changes})
    assert "\n" not in str(caught.value)
