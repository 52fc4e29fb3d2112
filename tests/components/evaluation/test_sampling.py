"""Continuations equal those of transformers, end where they should, and repeat with their seed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from modelmill.components.core.errors import UserError
from modelmill.components.data.loader import open_rows
from modelmill.components.evaluation.config import EvaluationConfig
from modelmill.components.evaluation.sampling import (
    FolderCodec,
    configured_prompts,
    continue_prompts,
    generate,
    heldout_prompts,
)
from modelmill.components.llama.huggingface import load_huggingface
from tests.components.small_model import SmallModel


class Letters:
    """A codec of one letter a token: 1 is `a`; 0 ends a text."""

    def encode(self, text: str) -> list[int]:
        return [ord(letter) - 96 for letter in text]

    def decode(self, tokens: list[int]) -> str:
        return "".join(chr(token + 96) for token in tokens)


def successor(tokens: list[int]) -> torch.Tensor:
    """Logits of a model that writes the alphabet, over and over, and may say `z` instead."""
    logits = torch.full((27,), -50.0)
    logits[26] = 1.0
    logits[tokens[-1] % 26 + 1] = 2.0
    return logits


def test_greedy_equals_transformers(small_model: SmallModel) -> None:
    folder = Path(small_model.trained.uri) / "model"
    decoder, reference = load_huggingface(folder).eval(), AutoModelForCausalLM.from_pretrained(folder).eval()
    prompt = small_model.tokenizer.encode("The statement").ids

    def logits(tokens: list[int]) -> torch.Tensor:
        with torch.inference_mode():
            return decoder(torch.tensor([tokens]))[0, -1]

    ours = generate(logits, prompt, max_new_tokens=20, context_length=64, eos_token_id=0)
    inputs = torch.tensor([prompt])
    theirs = reference.generate(
        inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=20, do_sample=False, eos_token_id=0
    )
    assert ours == [token for token in theirs[0, len(prompt) :].tolist() if token != 0]


def test_generation_ends_at_the_limit_and_at_the_end_of_text() -> None:
    assert generate(successor, [1], max_new_tokens=3, context_length=9, eos_token_id=None) == [2, 3, 4]
    assert generate(successor, [1], max_new_tokens=9, context_length=9, eos_token_id=4) == [2, 3]


def test_only_the_context_is_seen() -> None:
    seen: list[int] = []

    def spy(tokens: list[int]) -> torch.Tensor:
        seen.append(len(tokens))
        return successor(tokens)

    generate(spy, [1, 2, 3], max_new_tokens=4, context_length=4, eos_token_id=None)
    assert seen == [3, 4, 4, 4]


def test_draws_follow_seed_temperature_and_top_k() -> None:
    def draw(seed: int, temperature: float = 1.0, top_k: int | None = None, length: int = 400) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        return [
            generate(
                lambda _: torch.tensor([0.0, 1.0, 2.0]),
                [0],
                max_new_tokens=1,
                context_length=1,
                eos_token_id=None,
                temperature=temperature,
                top_k=top_k,
                generator=generator,
            )[0]
            for _ in range(length)
        ]

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    assert set(draw(1, top_k=2)) == {1, 2}
    assert set(draw(1, top_k=1)) == {2}
    assert set(draw(1, temperature=0.05)) == {2}
    shares = np.bincount(draw(3, length=4000), minlength=3) / 4000
    np.testing.assert_allclose(shares, torch.tensor([0.0, 1.0, 2.0]).softmax(0).numpy(), atol=0.03)


def test_prompts_are_beginnings_of_heldout_documents(small_model: SmallModel) -> None:
    codec = FolderCodec(Path(small_model.trained.uri) / "model")
    rows = open_rows(small_model.tokens, "test")
    prompts = heldout_prompts(rows, codec, num_prompts=3, prompt_tokens=8, max_new_tokens=10, eos_token_id=0)
    stream = np.concatenate([rows[0], *(row[1:] for row in rows[1:])]).tolist()
    text = codec.decode(stream)
    assert len({prompt.text for prompt in prompts}) == 3
    for prompt in prompts:
        assert prompt.tokens[0] == 0, "a document begins after an end-of-text token"
        assert len(prompt.tokens) == 9
        assert prompt.reference is not None
        assert prompt.text + prompt.reference in text


def test_prompts_without_a_document_boundary_are_beginnings_of_rows() -> None:
    rows = np.arange(1, 25).reshape(4, 6)
    prompts = heldout_prompts(rows, Letters(), num_prompts=2, prompt_tokens=3, max_new_tokens=2, eos_token_id=0)
    assert [(prompt.text, prompt.reference) for prompt in prompts] == [("abc", "de"), ("mno", "pq")]
    assert heldout_prompts(rows, Letters(), num_prompts=0, prompt_tokens=3, max_new_tokens=2, eos_token_id=0) == []


def test_prompts_of_the_recipe() -> None:
    (prompt,) = configured_prompts(["ab"], Letters(), 0)
    assert (prompt.tokens, prompt.text, prompt.reference) == ([0, 1, 2], "ab", None)
    assert configured_prompts([""], Letters(), 0)[0].tokens == [0]
    with pytest.raises(UserError, match=r"evaluation.prompts.1: '' has no token"):
        configured_prompts(["a", ""], Letters(), None)


def test_records_hold_every_setting_and_do_not_depend_on_each_other() -> None:
    config = EvaluationConfig(num_samples=2, max_new_tokens=5, temperature=1.5, top_k=3, seed=7)
    prompts = configured_prompts(["a", "c", "e"], Letters(), None)
    options = {"context_length": 8, "eos_token_id": None}
    records = continue_prompts(prompts, successor, Letters(), config, **options)
    assert [record["prompt"] for record in records] == ["a", "c", "e"]
    assert records[0]["continuations"][0] == {"method": "greedy", "text": "bcdef"}
    seeds = [each["seed"] for record in records for each in record["continuations"][1:]]
    assert seeds == [7, 8, 9, 10, 11, 12]
    assert continue_prompts(prompts[:2], successor, Letters(), config, **options) == records[:2]
    more = config.model_copy(update={"seed": 8})
    assert continue_prompts(prompts, successor, Letters(), more, **options) != records
