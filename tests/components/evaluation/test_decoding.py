"""Continuations with a cache equal those without and those of transformers, and depend on nothing but the example."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LogitsProcessorList,
    PreTrainedModel,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from modelmill.components.core.errors import UserError
from modelmill.components.evaluation import sampling
from modelmill.components.evaluation.config import GenerateConfig
from modelmill.components.evaluation.decoding import Continuation, choose_tokens, continue_batch, uniforms
from tests.components.evaluation.answering import SHAPE, wrapped

VOCABULARY, ENDS = 97, frozenset(range(1, 9))
PROMPTS = [[int(token) for token in np.random.default_rng(n).integers(10, 97, 2 + 3 * n % 17)] for n in range(7)]
NAMES = [f"question {number}" for number in range(len(PROMPTS))]
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "mistral": {"sliding_window": 6},
    "gpt_neox": {},
    "gemma2": {"head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8, "tie_word_embeddings": False},
}


def make(family: str) -> PreTrainedModel:
    torch.manual_seed(3)
    settings = {**SHAPE, "vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(family, **settings, **FAMILIES[family])
    )
    return model.eval()


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return make("llama")


def written(model: PreTrainedModel, places: list[int], **options: Any) -> list[Continuation]:
    settings = GenerateConfig.model_validate({"max_new_tokens": 16, **options})
    prompts, names = [PROMPTS[place] for place in places], [NAMES[place] for place in places]
    return continue_batch(wrapped(model), prompts, names, settings, vocab_size=VOCABULARY, end_tokens=ENDS)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_greedy_equals_transformers_and_a_loop_without_cache(family: str) -> None:
    model = make(family)
    found = written(model, list(range(len(PROMPTS))))

    def next_logits(tokens: list[int]) -> torch.Tensor:
        with torch.inference_mode():
            return model(torch.tensor([tokens]), use_cache=False).logits[0, -1]

    for prompt, ours in zip(PROMPTS, found, strict=True):
        inputs = torch.tensor([prompt])
        options: dict[str, Any] = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": sorted(ENDS)}
        theirs = model.generate(inputs, attention_mask=torch.ones_like(inputs), pad_token_id=0, **options)
        added = theirs[0, len(prompt) :].tolist()
        assert ours.tokens == (added[:-1] if added[-1] in ENDS else added)
        assert ours.ended == (added[-1] in ENDS)
        slow = sampling.generate(
            next_logits, prompt, max_new_tokens=len(ours.tokens), context_length=99, eos_token_id=None
        )
        assert ours.tokens == slow
    lengths = {len(answer.tokens) for answer in found}
    assert len(lengths) > 2, "rows must have left the batch at several places"


@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_neither_batch_nor_order_changes_an_answer(llama: PreTrainedModel, temperature: float) -> None:
    everyone = list(range(len(PROMPTS)))
    options: dict[str, Any] = {"temperature": temperature, "seed": 3}
    options |= {"top_k": 40, "top_p": 0.95} if temperature else {}
    together = written(llama, everyone, **options)
    assert written(llama, everyone[::-1], **options) == together[::-1]
    assert [written(llama, [place], **options)[0] for place in everyone] == together
    assert (written(llama, everyone, **{**options, "seed": 4}) == together) is (not temperature)


def test_examples_draw_their_own_numbers() -> None:
    drawing = GenerateConfig(temperature=1.0, max_new_tokens=50)
    first, second = uniforms(drawing, "a"), uniforms(drawing, "b")
    assert ((first >= 0) & (first < 1)).all()
    assert not np.isin(first, second).any()
    longer = uniforms(GenerateConfig(temperature=1.0, max_new_tokens=80), "a")
    assert (longer[:50] == first).all(), "a longer limit changes no token before it"


def test_ended_rows_leave_the_batch(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, forward = [], llama.forward

    def spied(*args: Any, **values: Any) -> Any:
        sizes.append(len(values["input_ids"]))
        return forward(*args, **values)

    monkeypatch.setattr(llama, "forward", spied)
    found = written(llama, list(range(len(PROMPTS))))
    steps = [len(answer.tokens) + answer.ended for answer in found]
    needed = [sum(step > place for step in steps) for place in range(max(steps))]
    assert len(sizes) == max(steps)
    assert all(size * 3 <= need * 4 or size - need < 1 for size, need in zip(sizes, needed, strict=True))
    assert sizes[-1] < sizes[0]


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7},
        {"temperature": 1.0, "top_k": 5},
        {"temperature": 1.5, "top_p": 0.6},
        {"temperature": 0.9, "top_k": 12, "top_p": 0.8},
        {"temperature": 1.0, "top_p": 1e-6},
    ],
    ids=["temperature", "top_k", "top_p", "both", "tiny"],
)
def test_draws_have_the_probabilities_of_transformers(options: dict[str, Any]) -> None:
    logits = torch.randn(1, 30, generator=torch.Generator().manual_seed(1)) * 2
    warpers = LogitsProcessorList([TemperatureLogitsWarper(options["temperature"])])
    if "top_k" in options:
        warpers.append(TopKLogitsWarper(options["top_k"]))
    if "top_p" in options:
        warpers.append(TopPLogitsWarper(options["top_p"]))
    expected = warpers(torch.zeros(1, 1), logits.clone()).softmax(-1)[0].numpy()
    number = 20_000
    draws = (torch.arange(number).double() + 0.5) / number
    chosen = choose_tokens(logits.expand(number, -1), GenerateConfig.model_validate(options), draws)
    shares = np.bincount(chosen.numpy(), minlength=30) / number
    assert np.abs(shares - expected).max() < 2 / number + 1e-6
    assert (shares[expected == 0] == 0).all()


def test_the_ends_of_the_range_of_draws_are_tokens_too() -> None:
    logits = torch.tensor([[0.0, 1.0, -torch.inf, 2.0]]).expand(2, -1)
    draws = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert choose_tokens(logits, GenerateConfig(temperature=1.0), draws).tolist() == [3, 0]


def test_tokens_beyond_the_tokenizer_are_never_written(llama: PreTrainedModel) -> None:
    settings = GenerateConfig(max_new_tokens=30)
    found = continue_batch(wrapped(llama), PROMPTS, NAMES, settings, vocab_size=50, end_tokens=())
    assert all(len(answer.tokens) == 30 and max(answer.tokens) < 50 for answer in found)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_name_the_example(temperature: float) -> None:
    model = make("llama")
    with torch.no_grad():  # only a prompt that holds this token meets it
        model.get_input_embeddings().weight[PROMPTS[4][1]] = torch.nan
    ill = next(name for name, prompt in zip(NAMES, PROMPTS, strict=True) if PROMPTS[4][1] in prompt)
    with pytest.raises(UserError, match=f"^model: its logits for example '{ill}' are not finite after 0 new tokens"):
        written(model, list(range(len(PROMPTS))), temperature=temperature)


def test_settings_without_effect_are_refused() -> None:
    with pytest.raises(ValueError, match="temperature: 0 takes the most likely token"):
        GenerateConfig(top_k=5)
    assert GenerateConfig(seed=4).decoding() == {"max_new_tokens": 256, "temperature": 0.0}
    assert GenerateConfig(temperature=1, seed=4).decoding()["seed"] == 4
