"""Losses of answers and texts equal those of whole logits by hand, whatever is computed together."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from modelmill.components.core.errors import UserError
from modelmill.components.core.home import Home
from modelmill.components.core.manifest import Manifest, json_digest
from modelmill.components.data.documents import read_documents
from modelmill.components.data.instruction_rows import open_instructions, read_conversations
from modelmill.components.data.instructions import prepare_instructions
from modelmill.components.data.tokenizer_files import load_tokenizer
from modelmill.components.evaluation.answers import score_answers
from modelmill.components.evaluation.config import AnswerScoresConfig, GateConfig, TextScoresConfig
from modelmill.components.evaluation.gate import gate
from modelmill.components.evaluation.likelihood import Window, window_losses
from modelmill.components.evaluation.records import read_scores
from modelmill.components.evaluation.resampling import bootstrap_interval, bootstrap_ratio_interval
from modelmill.components.evaluation.texts import score_texts
from tests.components.data.instruction_data import config, tokenizer_in
from tests.components.evaluation.answering import POSITIONS, SHAPE, Answering, make_model, produce, save_model, wrapped

SETTINGS: dict[str, Any] = {"device": "cpu", "precision": "fp32", "resamples": 200}


def answers_section(**changes: Any) -> AnswerScoresConfig:
    return AnswerScoresConfig.model_validate({**SETTINGS, **changes})


def texts_section(**changes: Any) -> TextScoresConfig:
    return TextScoresConfig.model_validate({**SETTINGS, **changes})


def by_hand(folder: Path, tokens: list[int], mask: np.ndarray) -> float:
    """Nats of the masked tokens, from the whole logits of one sequence in fp64."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    with torch.inference_mode():
        logits = model(torch.tensor([tokens[:-1]])).logits[0]
    losses = F.cross_entropy(logits, torch.tensor(tokens[1:]), reduction="none").numpy()
    return float(losses[mask[1:]].sum())


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma2", "granite"])
def test_losses_of_any_family_and_batch(family: str) -> None:
    """Gemma 2 caps its logits and Granite scales them: the head's product alone would be wrong."""
    torch.manual_seed(3)
    own: dict[str, Any] = {
        "gemma2": {"head_dim": 8, "final_logit_softcapping": 2.0},
        "granite": {"logits_scaling": 4.0},
    }
    settings = {**SHAPE, "vocab_size": 97, "pad_token_id": 0, **own.get(family, {})}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings)).eval()
    generator = np.random.default_rng(0)
    windows = []
    for number in range(9):
        tokens = generator.integers(0, 97, 2 + 4 * number)
        windows.append(Window(number, tokens, (generator.random(len(tokens)) < 0.6) & (np.arange(len(tokens)) > 0)))
    names = [str(number) for number in range(9)]
    expected = []
    for window in windows:
        with torch.inference_mode():
            logits = model(torch.tensor([window.tokens[:-1].tolist()])).logits[0]
        losses = F.cross_entropy(logits, torch.from_numpy(window.tokens[1:]), reduction="none")
        expected.append(float(losses[torch.from_numpy(window.targets[1:])].sum()))
    for batch_tokens in (1, 50, 10_000):
        found = window_losses(wrapped(model), windows, names, batch_tokens)
        assert np.abs(found - expected).max() < 1e-4
        per_token = np.abs(found - expected) / np.maximum(1, [window.targets.sum() for window in windows])
        assert per_token.max() < 1e-5


def test_answers_are_scored_by_the_targets_of_training(home: Home, tmp_path: Path, answering: Answering) -> None:
    inputs = {"model": answering.model, "instructions": answering.instructions}
    made = produce(tmp_path / "a", score_answers, answers_section(), **inputs)
    found = read_scores(made, "scores")
    rows, said = (
        open_instructions(answering.instructions, "test"),
        list(read_conversations(answering.instructions, "test")),
    )
    assert made.counts["examples"] == len(said)
    assert made.counts["tokens"] == int(rows.places[:, 3].sum())
    nats, tokens, sizes = [], [], []
    for record, (row, first, length, targets) in zip(said, rows.places.tolist(), strict=True):
        place = found.ids.index(record["id"])
        answer = record["messages"][-1]["content"]
        assert found.references_digests[place] == json_digest([answer])[:16]
        part = slice(first, first + length)
        nats.append(by_hand(answering.folder, rows.tokens[row, part].tolist(), rows.loss_mask[row, part] != 0))
        tokens.append(targets)
        sizes.append(len(f"{answer}\n".encode()))  # the template closes a turn with a special token and a line end
        assert found.values["answer_loss"][place] == pytest.approx(nats[-1] / targets, abs=1e-5)
        bits = nats[-1] / math.log(2) / sizes[-1]
        assert found.values["answer_bits_per_byte"][place] == pytest.approx(bits, abs=1e-5)
    assert made.metrics["answer_loss"] == pytest.approx(sum(nats) / sum(tokens), abs=1e-5)
    assert made.metrics["answer_bits_per_byte"] == pytest.approx(sum(nats) / math.log(2) / sum(sizes), abs=1e-5)
    assert made.metrics["answer_loss_mean"] == pytest.approx(np.mean(np.array(nats) / tokens), abs=1e-5)
    assert made.metrics["answer_loss_lower"] < made.metrics["answer_loss"] < made.metrics["answer_loss_upper"]
    assert made.metadata == {
        "weights_digest": answering.model.metadata["weights_digest"],
        "dataset_digest": answering.instructions.digest,
        "scoring": {"split": "test", "train_on": "assistant"},
    }
    one = produce(tmp_path / "one", score_answers, answers_section(batch_tokens=1), **inputs)
    for name, column in read_scores(one, "scores").values.items():
        assert np.abs(column - found.values[name]).max() < 1e-5
    again = produce(tmp_path / "again", score_answers, answers_section(), **inputs)
    assert again.digest == made.digest
    few = produce(tmp_path / "few", score_answers, answers_section(max_examples=3), **inputs)
    assert set(read_scores(few, "scores").ids) == {said[place * len(said) // 3]["id"] for place in range(3)}


def test_texts_are_scored_in_windows(home: Home, tmp_path: Path, answering: Answering, text_corpus: Manifest) -> None:
    """Each token once; a window begins with the last token of the one before, a document with the end of text."""
    section = texts_section(max_documents=4, window_tokens=50)
    made = produce(tmp_path / "a", score_texts, section, model=answering.model, corpus=text_corpus)
    found, files = read_scores(made, "scores"), load_tokenizer(answering.model)
    texts = [text for batch in read_documents(text_corpus.path("test.arrow")) for text in batch]
    total, scored, size = 0.0, 0, 0
    for place in range(4):
        number = place * len(texts) // 4
        text, row = texts[number], found.ids.index(f"test-{number}")
        ids = [files.id_of("</s>"), *files.encoder.encode(text, add_special_tokens=False).ids]
        parts = [ids[first : first + 51] for first in range(0, len(ids) - 1, 50)]
        assert len(parts) > 1
        assert sum(len(part) - 1 for part in parts) == len(ids) - 1
        nats = sum(by_hand(answering.folder, part, np.ones(len(part), bool)) for part in parts)
        assert found.values["text_loss"][row] == pytest.approx(nats / (len(ids) - 1), abs=1e-5)
        bits = nats / math.log(2) / len(text.encode())
        assert found.values["text_bits_per_byte"][row] == pytest.approx(bits, abs=1e-5)
        total, scored, size = total + nats, scored + len(ids) - 1, size + len(text.encode())
    assert made.counts == {"examples": 4, "tokens": scored, "bytes": size}
    assert made.metrics["text_loss"] == pytest.approx(total / scored, abs=1e-5)
    assert made.metadata["scoring"] == {"split": "test", "window_tokens": 50}
    for batch_tokens in (1, 120):
        changed = texts_section(max_documents=4, window_tokens=50, batch_tokens=batch_tokens)
        other = produce(tmp_path / str(batch_tokens), score_texts, changed, model=answering.model, corpus=text_corpus)
        for name, column in read_scores(other, "scores").values.items():
            assert np.abs(column - found.values[name]).max() < 1e-5
    whole = texts_section(max_documents=1, window_tokens=None)
    made = produce(tmp_path / "whole", score_texts, whole, model=answering.model, corpus=text_corpus)
    assert made.metadata["scoring"]["window_tokens"] == POSITIONS


def test_a_model_that_forgets_breaks_the_guard(
    home: Home, tmp_path: Path, answering: Answering, text_corpus: Manifest
) -> None:
    model = AutoModelForCausalLM.from_pretrained(answering.folder)
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    louder = save_model(tmp_path / "louder", model, answering.tokenizer)
    scores = []
    for name, judged in (("base", answering.model), ("tuned", louder)):
        section = texts_section(max_documents=12, window_tokens=64)
        scores.append(produce(tmp_path / name, score_texts, section, model=judged, corpus=text_corpus))
    base, tuned = scores
    guard = {"metric": "text_bits_per_byte", "direction": "lower", "max_drop": 0.05}
    chosen = GateConfig.model_validate({"metric": "text_loss", "direction": "lower", "tie": "pass", "guards": [guard]})
    kept = produce(tmp_path / "kept", gate, chosen, candidate=base, reference=base)
    lost = produce(tmp_path / "lost", gate, chosen, candidate=tuned, reference=base)
    assert kept.metadata["passed"]
    assert not lost.metadata["passed"]
    assert kept.metadata["reference_weights_digest"] == answering.model.metadata["weights_digest"]


def test_scores_that_cannot_be_had_are_refused(
    home: Home, tmp_path: Path, answering: Answering, text_corpus: Manifest
) -> None:
    def refused(match: str, step: Any, section: Any, **upstream: Manifest) -> str:
        with pytest.raises(UserError, match=match) as raised:
            produce(tmp_path / "made", step, section, **upstream)
        return str(raised.value)

    model, instructions = answering.model, answering.instructions
    match = "^corpus: the validation split holds no document; raise corpus.validation_fraction"
    refused(match, score_texts, texts_section(split="validation"), model=model, corpus=text_corpus)
    prepared = config(answering.records, sequence_length=128, test_fraction=0.2)
    unsplit = produce(tmp_path / "unsplit", prepare_instructions, prepared, tokenizer=answering.tokenizer)
    match = "^instructions: the validation split holds no conversation"
    refused(match, score_answers, answers_section(split="validation"), model=model, instructions=unsplit)
    short = make_model(tmp_path / "short", answering.tokenizer, max_position_embeddings=32)
    match = r"^instructions.sequence_length: a conversation has \d+ tokens and the model 32 positions"
    refused(match, score_answers, answers_section(), model=short, instructions=instructions)
    small = make_model(tmp_path / "small", answering.tokenizer, vocab_size=300)
    refused("^model: its vocabulary has 300", score_texts, texts_section(), model=small, corpus=text_corpus)
    diverged = AutoModelForCausalLM.from_pretrained(answering.folder)
    with torch.no_grad():
        diverged.model.norm.weight.fill_(torch.nan)
    ill = save_model(tmp_path / "ill", diverged, answering.tokenizer)
    match = "^model: its loss on example 'test-0' is not finite"
    refused(match, score_texts, texts_section(max_documents=3), model=ill, corpus=text_corpus)
    first = next(read_conversations(instructions, "test"))["id"]
    match = f"^model: its loss on example '{first}' is not finite"
    refused(match, score_answers, answers_section(), model=ill, instructions=instructions)


def test_a_tokenizer_that_begins_texts_gives_its_start_token(
    home: Home, tmp_path: Path, text_corpus: Manifest
) -> None:
    tokenizer = tokenizer_in(tmp_path / "tokenizer", bos=True)
    model = make_model(tmp_path / "made", tokenizer)
    made = produce(tmp_path / "a", score_texts, texts_section(max_documents=1), model=model, corpus=text_corpus)
    text = next(read_documents(text_corpus.path("test.arrow")))[0]
    files = load_tokenizer(model)
    ids = [files.id_of("<s>"), *files.encoder.encode(text, add_special_tokens=False).ids][: POSITIONS + 1]
    nats = by_hand(Path(model.uri) / "model", ids, np.ones(len(ids), bool))
    rest = files.encoder.encode(text, add_special_tokens=False).ids[POSITIONS - 1 :]
    if len(rest) > 1:
        for first in range(0, len(rest) - 1, POSITIONS):
            part = rest[first : first + POSITIONS + 1]
            nats += by_hand(Path(model.uri) / "model", part, np.ones(len(part), bool))
    assert made.metrics["text_loss"] == pytest.approx(nats / made.counts["tokens"], abs=1e-5)


def test_intervals_of_ratios() -> None:
    generator = np.random.default_rng(0)
    above, ones = generator.gamma(2.0, 3.0, (80, 2)), np.ones((80, 2))
    options: dict[str, Any] = {"confidence": 0.9, "resamples": 300, "seed": 4}
    for ours, theirs in zip(
        bootstrap_ratio_interval(above, ones, **options), bootstrap_interval(above, **options), strict=True
    ):
        assert np.allclose(ours, theirs, rtol=1e-12)
    lower, upper = bootstrap_ratio_interval(above * 3, above, **options)
    assert np.allclose([lower, upper], 3.0), "a ratio that no example changes has no spread"
    inside = 0
    for trial in range(100):
        sizes = generator.integers(5, 50, 60).astype(float)
        sums = generator.normal(2.0 * sizes, np.sqrt(sizes))
        low, high = bootstrap_ratio_interval(sums[:, None], sizes[:, None], **{**options, "seed": trial})
        inside += bool(low[0] < 2.0 < high[0])
    assert 80 <= inside <= 98
