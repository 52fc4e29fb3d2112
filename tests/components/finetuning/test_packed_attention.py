"""Attention one conversation after the other is the attention of a masked row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaForCausalLM,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
)

from modelmill.components.core.manifest import Manifest
from modelmill.components.data.instruction_rows import open_instructions
from modelmill.components.finetuning import causal_lm, trained_model
from modelmill.components.finetuning.packed_attention import NAME, attend_by_conversation
from tests.components.finetuning.samples import BASE, finetune_config

CPU = torch.device("cpu")


def make_model(family: type[PreTrainedModel], **changes: Any) -> PreTrainedModel:
    torch.manual_seed(5)
    config = family.config_class(**{**BASE, **changes, "attn_implementation": "sdpa"})
    return family(config).to(torch.float64).eval()


def gradients(model: PreTrainedModel, rows: torch.Tensor) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = causal_lm.SupervisedModel(model)(rows)
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", [LlamaForCausalLM, Qwen3ForCausalLM], ids=lambda family: family.__name__)
def test_loss_and_gradients_are_those_of_masked_rows(family: type[PreTrainedModel], instructions: Manifest) -> None:
    packed = open_instructions(instructions, "train")
    assert len(packed.places) > len(packed), "no row holds several conversations"
    rows = torch.from_numpy(causal_lm.stack_rows(packed.take(slice(0, 20))))
    model = make_model(family)
    loss, expected = gradients(model, rows)
    assert attend_by_conversation(model)
    assert model.config._attn_implementation == NAME
    found_loss, found = gradients(model, rows)
    assert found_loss == pytest.approx(loss, rel=1e-12)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-10, msg=name)


def test_rows_without_positions_are_one_conversation_each() -> None:
    model, tokens = make_model(LlamaForCausalLM), torch.arange(20).reshape(2, 10)
    expected = causal_lm.last_hidden_states(model, tokens)
    assert attend_by_conversation(model)
    torch.testing.assert_close(causal_lm.last_hidden_states(model, tokens), expected)


def has_windows(family: type[PreTrainedModel]) -> PreTrainedModel:
    return make_model(family, use_sliding_window=True, sliding_window=3, max_window_layers=1)


@pytest.mark.parametrize("family", [MistralForCausalLM, Qwen2ForCausalLM], ids=lambda family: family.__name__)
def test_windows_stay_as_they_are(family: type[PreTrainedModel]) -> None:
    model = has_windows(family)
    tokens, positions = torch.arange(10).unsqueeze(0), torch.arange(5).repeat(2).unsqueeze(0)
    expected = causal_lm.last_hidden_states(model, tokens, positions)
    assert not attend_by_conversation(model)
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(causal_lm.last_hidden_states(model, tokens, positions), expected)


def test_windows_that_only_the_layers_know_of_are_seen() -> None:
    model = make_model(LlamaForCausalLM)
    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(
            lambda _, inputs, options: (inputs, {**options, "sliding_window": 3}), with_kwargs=True
        )
    assert not attend_by_conversation(model)
    assert model.config._attn_implementation == "sdpa"


def test_packed_training_on_the_cpu_uses_it_and_what_is_exported_does_not_know(llama: Path, tmp_path: Path) -> None:
    config = finetune_config(method="full")
    spec = {"method": "full", "base": {"folder": str(llama)}}
    for packed, device, name in (
        (True, CPU, NAME),
        (False, CPU, "sdpa"),
        (True, torch.device("cuda"), "sdpa"),  # loaded on the CPU in any case
    ):
        model, _ = trained_model.load(spec, config.training, packed=packed, device=device)
        assert model.config._attn_implementation == name
        model.save_pretrained(str(tmp_path / "model"))
        assert AutoModelForCausalLM.from_pretrained(str(tmp_path / "model")).config._attn_implementation == "sdpa"
