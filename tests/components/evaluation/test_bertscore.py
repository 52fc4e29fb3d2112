"""BERTScore against loops written after the paper, whatever the batches; encoders that cannot be used are refused."""

from __future__ import annotations

import json
import math
import random
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoTokenizer

from modelmill.components.core.errors import UserError
from modelmill.components.evaluation.bertscore import Encoder, bert_scores
from modelmill.components.evaluation.config import BertScoreConfig
from tests.components.evaluation import encoders


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return encoders.bert(tmp_path_factory.mktemp("encoder"))


def sentences(count: int, seed: int) -> list[str]:
    generator = random.Random(seed)
    words = [word for word in encoders.WORDS if not word.startswith("#")]
    return [" ".join(generator.choices([*words, "cats", "zebra"], k=generator.randint(1, 12))) for _ in range(count)]


@cache
def loaded(folder: Path) -> tuple[Any, Any]:
    return AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()


def naive(
    folder: Path, reference: str, prediction: str, layer: int, weight: dict[int, float] | None
) -> tuple[float, float, float]:
    """Section 3 of the paper, one token at a time."""
    tokenizer, model = loaded(folder)

    def states(text: str) -> tuple[list[int], list[np.ndarray]]:
        ids = tokenizer(text)["input_ids"]
        with torch.no_grad():
            hidden = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[layer][0].double().numpy()
        return ids, [vector / np.linalg.norm(vector) for vector in hidden]

    def side(one: tuple[list[int], list[np.ndarray]], other: tuple[list[int], list[np.ndarray]]) -> float:
        total = norm = 0.0
        for token, vector in zip(*one, strict=True):
            share = 0.0 if token in (2, 3) else 1.0 if weight is None else weight[token]
            total += share * max(float(vector @ match) for match in other[1])
            norm += share
        return total / norm

    target, predicted = states(reference), states(prediction)
    precision, recall = side(predicted, target), side(target, predicted)
    return precision, recall, 2 * precision * recall / (precision + recall)


@pytest.mark.parametrize("idf", [False, True])
@pytest.mark.parametrize("layer", [None, 1])
def test_scores_are_those_of_the_paper(folder: Path, idf: bool, layer: int | None) -> None:
    references, predictions = sentences(12, 1), sentences(12, 2)
    weight = None
    if idf:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        held = [set(tokenizer(text)["input_ids"]) for text in references]
        number = len(references)
        weight = {token: math.log((number + 1) / (sum(token in ids for ids in held) + 1)) for token in range(40)}
    encoder = Encoder(BertScoreConfig(encoder=str(folder), layer=layer))
    scores = bert_scores(encoder, [[text] for text in references], predictions, idf=idf, batch_size=5)
    expected = [
        naive(folder, reference, prediction, 3 if layer is None else layer, weight)
        for reference, prediction in zip(references, predictions, strict=True)
    ]
    assert scores == pytest.approx(np.array(expected), abs=1e-5)


def test_batches_and_order_change_nothing(folder: Path) -> None:
    references, predictions = [[text] for text in sentences(30, 3)], sentences(30, 4)
    encoder = Encoder(BertScoreConfig(encoder=str(folder)))
    whole = bert_scores(encoder, references, predictions, idf=True, batch_size=64)
    assert bert_scores(encoder, references, predictions, idf=True, batch_size=1) == pytest.approx(whole, abs=1e-5)
    turned = bert_scores(encoder, references[::-1], predictions[::-1], idf=True, batch_size=7)[::-1]
    assert turned == pytest.approx(whole, abs=1e-5)


def test_equal_texts_score_one_and_empty_ones_nothing(folder: Path) -> None:
    encoder = Encoder(BertScoreConfig(encoder=str(folder)))
    references = [["the cat sat"], ["the cat sat"], ["big dog"], ["the cat sat"]]
    scores = bert_scores(encoder, references, ["the cat sat", " ", "", "slow tree"], idf=False, batch_size=2)
    assert scores[0] == pytest.approx([1.0, 1.0, 1.0], abs=1e-5)
    assert not scores[1:3].any()
    assert scores[3, 2] < 0.99


def test_of_several_references_the_best_counts(folder: Path) -> None:
    encoder = Encoder(BertScoreConfig(encoder=str(folder)))
    prediction, answers = "the quick brown fox", ["a slow tree", "the quick fox ran", "blue house"]
    each = bert_scores(encoder, [[text] for text in answers], [prediction] * 3, idf=False, batch_size=8)
    best = bert_scores(encoder, [answers], [prediction], idf=False, batch_size=2)
    assert best[0] == pytest.approx(each[each[:, 2].argmax()], abs=1e-5)


def test_where_no_token_is_rarer_all_count_alike(folder: Path) -> None:
    encoder = Encoder(BertScoreConfig(encoder=str(folder)))
    pairs = [["the cat"], ["the cat"]], ["the dog ran", "cat"]
    with_idf = bert_scores(encoder, *pairs, idf=True, batch_size=8)
    without = bert_scores(encoder, *pairs, idf=False, batch_size=8)
    assert with_idf[:, 1] == pytest.approx(without[:, 1], abs=1e-5)


def test_long_texts_are_cut_and_counted(folder: Path) -> None:
    encoder = Encoder(BertScoreConfig(encoder=str(folder)))
    long = " ".join(["cat"] * 100)
    scores = bert_scores(encoder, [[long], ["cat"]], [long + " dog", "cat"], idf=False, batch_size=2)
    assert scores[0] == pytest.approx([1.0, 1.0, 1.0], abs=1e-5)
    assert encoder.truncated == 2
    short = Encoder(BertScoreConfig(encoder=str(folder), max_length=3))
    assert bert_scores(short, [["cat dog"]], ["cat tree"], idf=False, batch_size=2)[0, 2] == pytest.approx(1.0)


@pytest.mark.parametrize("kind", ["roberta", "t5"])
def test_other_kinds_of_encoder(tmp_path: Path, kind: str) -> None:
    encoder = Encoder(BertScoreConfig(encoder=str(encoders.byte_level(tmp_path, kind)), layer=1))
    long = "cat " * 40
    references = [["the cat"], ["a dog"], [long], ["x"]]
    scores = bert_scores(encoder, references, ["the cat", "the cat", long, ""], idf=True, batch_size=2)
    assert scores[0] == pytest.approx([1.0, 1.0, 1.0], abs=1e-5)
    assert scores[1, 2] < 0.99
    assert scores[2, 2] == pytest.approx(1.0, abs=1e-5)
    assert not scores[3].any()
    assert encoder.truncated == (2 if kind == "roberta" else 0), "positions of RoBERTa begin behind the padding id"
    first, second = (text.ids for text in encoder.tokenize(["cat", "the cat"]))
    assert first[1] == second[2], "the first word is read like one behind a space"


def refusal(path: Path, **config: int) -> str:
    with pytest.raises(UserError) as raised:
        Encoder(BertScoreConfig(encoder=str(path), **config))  # type: ignore[arg-type]
    return str(raised.value)


def test_folders_that_hold_no_encoder(folder: Path, tmp_path: Path) -> None:
    assert "is not a folder" in refusal(tmp_path / "nothing")
    assert "has no config.json" in refusal(tmp_path)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickled")
    assert "no weights in safetensors" in refusal(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:1000])
    assert refusal(tmp_path).startswith(f"bertscore.encoder: {tmp_path} cannot be loaded")
    assert "max_length: 33 is more than the 32 tokens the encoder can read" in refusal(folder, max_length=33)
    assert "layer: 4 is more than the encoder's 3 blocks" in refusal(folder, layer=4)


def test_weights_that_are_missing_or_not_finite(folder: Path, tmp_path: Path) -> None:
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = load_file(folder / "model.safetensors")
    name = "encoder.layer.1.output.dense.weight"
    save_file({key: value for key, value in weights.items() if key != name}, tmp_path / "model.safetensors")
    assert f"lacks 1 weights, the first is {name}" in refusal(tmp_path)
    save_file({**weights, name: weights[name] * math.nan}, tmp_path / "model.safetensors")
    encoder = Encoder(BertScoreConfig(encoder=str(tmp_path)))
    with pytest.raises(UserError, match="its hidden states are not finite"):
        bert_scores(encoder, [["cat"]], ["dog"], idf=False, batch_size=1)


def test_a_config_that_asks_for_foreign_code_is_refused(folder: Path, tmp_path: Path) -> None:
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "foreign", "auto_map": {"AutoModel": "foreign.Model", "AutoConfig": "foreign.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "foreign.py").write_text("raise SystemExit('foreign code ran')")
    assert "cannot be loaded" in refusal(tmp_path)
