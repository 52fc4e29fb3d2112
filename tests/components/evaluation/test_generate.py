"""The step `generate`: answers on disk, endings, killed and resumed runs, and what it refuses."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from modelmill.components.core.errors import UserError
from modelmill.components.core.home import Home
from modelmill.components.core.manifest import Manifest
from modelmill.components.core.step import options_of
from modelmill.components.data.instruction_prompts import read_prompts
from modelmill.components.data.instructions import prepare_instructions
from modelmill.components.data.tokenizer_files import load_tokenizer
from modelmill.components.evaluation import decoding, sampling
from modelmill.components.evaluation.config import GateConfig, GenerateConfig, GenerationScoresConfig
from modelmill.components.evaluation.gate import gate
from modelmill.components.evaluation.generate import generate
from modelmill.components.evaluation.generation import score_generations
from modelmill.components.evaluation.records import read_generations
from modelmill.components.llama.huggingface import load_huggingface
from tests.components.data.instruction_data import CHATML, config, tokenizer_in, untagged
from tests.components.evaluation.answering import EARLY_ENDS, Answering, make_model, produce, save_model
from tests.components.small_model import SmallModel

SETTINGS: dict[str, Any] = {"max_new_tokens": 12, "device": "cpu", "precision": "fp32"}


def section(**changes: Any) -> GenerateConfig:
    return GenerateConfig.model_validate({**SETTINGS, **changes})


def answers(made: Manifest) -> dict[str, str]:
    return {example.id: example.prediction for example in read_generations(made)}


def test_answers_stand_beside_prompts_and_references(home: Home, tmp_path: Path, answering: Answering) -> None:
    made = produce(tmp_path / "a", generate, section(), model=answering.model, instructions=answering.instructions)
    prompts = list(read_prompts(answering.instructions, answering.model, "test"))
    examples = read_generations(made)
    assert made.kind == "generations"
    assert [(e.id, e.prompt, e.references) for e in examples] == [(p.id, p.text, (p.reference,)) for p in prompts]
    assert examples[0].prompt.endswith("<|im_start|>assistant\n")
    assert len({example.prediction for example in examples}) > 5
    assert not any("<|" in example.prediction for example in examples), "special tokens are no part of an answer"
    assert made.counts["examples"] == answering.instructions.counts["test_conversations"] == len(examples)
    assert made.counts["prompt_tokens"] == sum(len(prompt.tokens) for prompt in prompts)
    assert 0 < made.counts["unended"] < len(examples)
    assert made.counts["truncated"] == 0
    assert made.counts["generated_tokens"] < 12 * len(examples)
    assert made.metadata == {
        "weights_digest": answering.model.metadata["weights_digest"],
        "dataset_digest": answering.instructions.digest,
        "split": "test",
        "decoding": {"max_new_tokens": 12, "temperature": 0.0},
    }
    shown = made.path("samples.md").read_text()
    assert shown.count("\n## ") == 5
    assert examples[0].id in shown
    few = produce(
        tmp_path / "few",
        generate,
        section(max_examples=4, split="validation", preview_examples=0),
        model=answering.model,
        instructions=answering.instructions,
    )
    everyone = [prompt.id for prompt in read_prompts(answering.instructions, answering.model, "validation")]
    assert list(answers(few)) == [everyone[place * len(everyone) // 4] for place in range(4)]


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_the_size_of_batches_changes_no_byte(
    home: Home, tmp_path: Path, answering: Answering, temperature: float
) -> None:
    made = [
        produce(
            tmp_path / str(size),
            generate,
            section(batch_tokens=size, temperature=temperature, max_examples=10),
            model=answering.model,
            instructions=answering.instructions,
        )
        for size in (1, 300, 100_000)
    ]
    assert made[0].digest == made[1].digest == made[2].digest


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(
    home: Home, tmp_path: Path, answering: Answering, monkeypatch: pytest.MonkeyPatch, temperature: float
) -> None:
    assert options_of(generate).resumable
    chosen = section(batch_tokens=300, temperature=temperature, max_examples=16)
    inputs = {"model": answering.model, "instructions": answering.instructions}
    undisturbed = produce(tmp_path / "whole", generate, chosen, **inputs)
    computed: list[list[str]] = []
    continue_batch = decoding.continue_batch

    def spied(model: Any, prompts: Any, names: list[str], *rest: Any, **values: Any) -> Any:
        if len(computed) == 2:
            raise KeyboardInterrupt
        computed.append(names)
        return continue_batch(model, prompts, names, *rest, **values)

    monkeypatch.setattr(decoding, "continue_batch", spied)
    with pytest.raises(KeyboardInterrupt):
        produce(tmp_path / "killed", generate, chosen, **inputs)
    journal = tmp_path / "killed" / "data.batches.jsonl"
    with journal.open("a") as file:
        file.write('{"batch":2,"answers":[{"tok')  # what a kill in the middle of a line leaves
    before = set(chain.from_iterable(computed))
    computed[:] = [[], [], []]
    resumed = produce(tmp_path / "killed", generate, chosen, **inputs)
    after = set(chain.from_iterable(computed))
    assert before
    assert after
    assert not before & after
    assert before | after == set(answers(resumed))
    assert resumed.digest == undisturbed.digest


def test_a_journal_of_other_settings_is_not_taken(home: Home, tmp_path: Path, answering: Answering) -> None:
    inputs = {"model": answering.model, "instructions": answering.instructions}
    first = answers(produce(tmp_path / "a", generate, section(max_examples=3), **inputs))
    again = answers(produce(tmp_path / "a", generate, section(max_examples=3, temperature=1.5), **inputs))
    assert first.keys() == again.keys()
    assert first != again


def test_an_answer_ends_with_any_known_end(
    home: Home, tmp_path: Path, answering: Answering, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[set[int]] = []
    continue_batch = decoding.continue_batch

    def spied(*given: Any, end_tokens: set[int], **values: Any) -> Any:
        seen.append(end_tokens)
        return continue_batch(*given, end_tokens=end_tokens, **values)

    monkeypatch.setattr(decoding, "continue_batch", spied)
    produce(
        tmp_path / "a", generate, section(max_examples=2), model=answering.model, instructions=answering.instructions
    )
    files = load_tokenizer(answering.model)
    assert seen[0] == {*EARLY_ENDS, files.id_of("</s>"), files.id_of("<|im_end|>"), 1}
    assert files.id_of("<|im_end|>") not in (*EARLY_ENDS, 1)


def test_an_exported_pretrained_model_answers_as_our_decoder_does(
    home: Home, tmp_path: Path, small_model: SmallModel, answering: Answering
) -> None:
    template = {"kind": "prompt", "text": "{prompt}\n{completion}"}
    prepared = config(answering.records, sequence_length=63, test_fraction=0.2, template=template)
    made = produce(tmp_path / "p", prepare_instructions, prepared, tokenizer=small_model.trained)
    found = produce(tmp_path / "g", generate, section(max_examples=3), model=small_model.trained, instructions=made)
    folder = Path(small_model.trained.uri) / "model"
    decoder, codec = load_huggingface(folder).eval(), sampling.FolderCodec(folder)

    def next_logits(tokens: list[int]) -> torch.Tensor:
        with torch.inference_mode():
            return decoder(torch.tensor([tokens]))[0, -1]

    for example in read_generations(found):
        tokens = codec.encode(example.prompt)[-(64 - 12) :]
        expected = sampling.generate(next_logits, tokens, max_new_tokens=12, context_length=64, eos_token_id=0)
        assert example.prediction == codec.decode(expected).strip()
    assert any(len(codec.encode(example.prompt)) > 52 for example in read_generations(found)) is bool(
        found.counts["truncated"]
    )


def test_prompts_without_room_lose_their_beginning(home: Home, tmp_path: Path, answering: Answering) -> None:
    prompts = list(read_prompts(answering.instructions, answering.model, "test"))
    lengths = sorted(len(prompt.tokens) for prompt in prompts)
    room = lengths[len(lengths) // 2]
    model = make_model(tmp_path / "short", answering.tokenizer, max_position_embeddings=room + 12)
    made = produce(tmp_path / "a", generate, section(), model=model, instructions=answering.instructions)
    assert made.counts["truncated"] == sum(length > room for length in lengths) > 0
    assert made.counts["prompt_tokens"] == sum(min(length, room) for length in lengths)
    with pytest.raises(UserError, match=f"^generation.max_new_tokens: {room + 12} leaves no room"):
        produce(
            tmp_path / "b",
            generate,
            section(max_new_tokens=room + 12),
            model=model,
            instructions=answering.instructions,
        )


def test_scores_of_differently_made_answers_are_not_compared(home: Home, tmp_path: Path, answering: Answering) -> None:
    scored = []
    for name, temperature in (("greedy", 0.0), ("drawn", 1.0)):
        chosen = section(temperature=temperature, max_examples=12)
        made = produce(tmp_path / name, generate, chosen, model=answering.model, instructions=answering.instructions)
        scoring = GenerationScoresConfig(metrics=("token_f1",), resamples=100)
        scored.append(produce(tmp_path / f"{name}-scores", score_generations, scoring, generations=made))
    assert scored[0].metadata["scoring"]["decoding"] == {"max_new_tokens": 12, "temperature": 0.0}
    assert scored[0].metadata["weights_digest"] == answering.model.metadata["weights_digest"]
    with pytest.raises(UserError, match=r"^candidate: was scored with decoding"):
        produce(tmp_path / "gate", gate, GateConfig(metric="token_f1"), candidate=scored[0], reference=scored[1])


def other_tokenizer(folder: Path, more: str = "") -> Manifest:
    """With two signs in each other's place, or with one more token."""
    made = tokenizer_in(folder, untagged(CHATML))
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    words = content["model"]["vocab"]
    if more:
        words[more] = max(words.values()) + 1
    else:
        words["?"], words["."] = words["."], words["?"]
    path.write_text(json.dumps(content))
    return Manifest.describe(folder, kind=made.kind)


def test_what_does_not_belong_together_is_refused(home: Home, tmp_path: Path, answering: Answering) -> None:
    def refused(match: str, model: Manifest = answering.model, **changes: Any) -> None:
        instructions = changes.pop("instructions", answering.instructions)
        with pytest.raises(UserError, match=match):
            produce(tmp_path / "made", generate, section(**changes), model=model, instructions=instructions)

    empty = config(answering.records, sequence_length=128, validation_fraction=0.2)
    unsplit = produce(tmp_path / "unsplit", prepare_instructions, empty, tokenizer=answering.tokenizer)
    refused(
        "^instructions: the test split holds no conversation; raise instructions.test_fraction", instructions=unsplit
    )
    longer = make_model(tmp_path / "longer", other_tokenizer(tmp_path / "more", "qzqz"))
    size = load_tokenizer(longer).vocab_size
    refused(f"of {size - 1} entries, the model's has {size}; prepare the instructions with this", longer)
    swapped = make_model(tmp_path / "swapped", other_tokenizer(tmp_path / "tokenizer"))
    refused("^instructions: conversation 1 was made with another tokenizer than the model's", swapped)
    small = make_model(tmp_path / "small", answering.tokenizer, vocab_size=300)
    refused(r"^model: its vocabulary has 300 entries and its tokenizer \d+", small)
    if not torch.cuda.is_available():
        refused("^device: cuda is not in this machine", device="cuda")
    bare = Manifest.describe(answering.records.parent / "tokenizer", kind="tokenizer")
    refused("holds no model/ folder", bare)


def test_a_diverged_model_names_the_example(home: Home, tmp_path: Path, answering: Answering) -> None:
    model = AutoModelForCausalLM.from_pretrained(answering.folder)
    with torch.no_grad():
        model.lm_head.weight[7] = torch.nan
    made = save_model(tmp_path / "diverged", model, answering.tokenizer)
    first = [prompt.id for prompt in read_prompts(answering.instructions, made, "test")]
    with pytest.raises(UserError, match=r"^model: its logits for example '([0-9a-f]{32})' are not finite") as raised:
        produce(tmp_path / "a", generate, section(), model=made, instructions=answering.instructions)
    assert str(raised.value).split("'")[1] in first


def test_a_damaged_model_is_refused_in_one_line(home: Home, tmp_path: Path, answering: Answering) -> None:
    made = make_model(tmp_path / "damaged", answering.tokenizer)
    settings = json.loads((tmp_path / "damaged" / "model" / "config.json").read_text())
    (tmp_path / "damaged" / "model" / "config.json").write_text(json.dumps({**settings, "num_hidden_layers": 3}))
    made = Manifest.describe(tmp_path / "damaged", kind="model")
    with pytest.raises(UserError, match=r"^model: .* lacks tensor model.layers.2.\S+ \(\d+ in all\)"):
        produce(tmp_path / "a", generate, section(), model=made, instructions=answering.instructions)
