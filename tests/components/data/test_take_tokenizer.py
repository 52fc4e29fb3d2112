"""The tokenizer of a model, for text that the model is trained on further."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from modelmill.components.core.errors import UserError
from modelmill.components.core.manifest import Manifest
from modelmill.components.data.config import TakeTokenizerConfig
from modelmill.components.data.tokenizer import take_tokenizer


def model_with(tokenizer: Manifest, folder: Path) -> Manifest:
    shutil.copytree(tokenizer.uri, folder / "model")
    return Manifest.describe(folder, kind="model")


def test_the_models_tokenizer_is_taken_over(tokenizer: Manifest, corpus: Manifest, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    model = model_with(tokenizer, tmp_path / "data")
    result = take_tokenizer(TakeTokenizerConfig(), tmp_path / "out", model=model, corpus=corpus)
    assert result.counts == tokenizer.counts
    assert result.metadata == tokenizer.metadata
    assert result.metrics["bytes_per_token"] > 1


def test_without_an_end_of_text_token_it_wants_a_name(tokenizer: Manifest, corpus: Manifest, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    model_with(tokenizer, folder)
    path = folder / "model" / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    name = settings.pop("eos_token")
    path.write_text(json.dumps(settings))
    model = Manifest.describe(folder, kind="model")
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="declares no end-of-text token"):
        take_tokenizer(TakeTokenizerConfig(), tmp_path / "out", model=model, corpus=corpus)
    named = take_tokenizer(TakeTokenizerConfig(eos_token=name), tmp_path / "out", model=model, corpus=corpus)
    assert named.metadata["eos_token_id"] == tokenizer.metadata["eos_token_id"]
