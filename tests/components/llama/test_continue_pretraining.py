"""Pretraining that goes on from finished weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from modelmill.components.core.errors import UserError
from modelmill.components.core.manifest import Manifest
from modelmill.components.core.weights import weights_digest
from modelmill.components.data.documents import DocumentWriter
from modelmill.components.data.loader import BatchSource, open_rows
from modelmill.components.llama.config import ContinueConfig, LlamaConfig
from modelmill.components.llama.continue_pretraining import continue_pretraining
from modelmill.components.llama.huggingface import export_huggingface, load_huggingface
from modelmill.components.llama.model import LlamaDecoder
from modelmill.components.llama.pretrain import next_token_loss
from tests.components.training.samples import MODEL, VOCAB, make_tokenizer, make_tokens, training_config


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    folder = tmp_path_factory.mktemp("base")
    tokenizer = make_tokenizer(folder / "tokenizer").folder()
    config = LlamaConfig.model_validate({**MODEL, "vocab_size": VOCAB})
    export_huggingface(LlamaDecoder(config, seed=5), folder / "data" / "model", tokenizer_folder=tokenizer)
    digest = weights_digest(folder / "data" / "model")
    return Manifest.describe(folder / "data", kind="model", metadata={"weights_digest": digest, "reference": "there"})


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Two documents; their text matters to the list of records only."""
    folder = tmp_path_factory.mktemp("corpus")
    with DocumentWriter(folder / "train.arrow") as writer:
        for text in ("one text", "another text"):
            writer.append(text, len(text))
    return Manifest.describe(folder, kind="corpus")


def history(output: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (output / "history.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "parallel",
    [
        pytest.param({}, id="one"),
        pytest.param({"processes_per_node": 2, "shard": 2}, id="shards", marks=pytest.mark.slow),
    ],
)
def test_it_begins_where_the_base_ended(
    base: Manifest, corpus: Manifest, tmp_path: Path, home: object, parallel: dict[str, int]
) -> None:
    tokens = make_tokens(tmp_path / "tokens")
    output = tmp_path / "run" / "data"
    output.mkdir(parents=True)
    changes = {"parallel": parallel} if parallel else {}
    config = ContinueConfig(training=training_config(steps=4, log_every=1, precision="fp32", **changes))
    result = continue_pretraining(config, output, base=base, corpus=corpus, tokens=tokens)

    model = load_huggingface(Path(base.uri) / "model")
    source = BatchSource(open_rows(tokens, "train"), config.training.seed, config.training.global_batch_size)
    rows = torch.from_numpy(np.asarray(source.batch(0, 0, 1)).astype(np.int64))
    with torch.no_grad():
        expected = float(next_token_loss(model, rows))
    assert history(output)[0]["loss"] == pytest.approx(expected, rel=1e-5)
    assert result.metadata["base_digest"] == base.metadata["weights_digest"] != result.metadata["weights_digest"]
    assert result.metadata["base"] == "there"
    assert len((output / "training_records.txt").read_text().split()) == 2
    assert load_huggingface(output / "model").config.num_layers == MODEL["num_layers"]


def test_what_is_no_such_base_is_refused(base: Manifest, corpus: Manifest, tmp_path: Path, home: object) -> None:
    tokens = make_tokens(tmp_path / "tokens")
    copy = Path(shutil.copytree(base.uri, tmp_path / "copy"))
    settings = json.loads((copy / "model" / "config.json").read_text())
    (copy / "model" / "config.json").write_text(json.dumps({**settings, "model_type": "qwen2"}))
    (tmp_path / "out").mkdir()
    config = ContinueConfig(training=training_config())

    def refused(match: str, manifest: Manifest) -> None:
        with pytest.raises(UserError, match=match) as error:
            continue_pretraining(config, tmp_path / "out", base=manifest, corpus=corpus, tokens=tokens)
        assert "\n" not in str(error.value)

    foreign = Manifest.describe(copy, kind="model", metadata=base.metadata)
    refused("model_type is 'qwen2'", foreign)
    refused("the step that made them wrote", foreign.model_copy(update={"metadata": {"weights_digest": "0" * 64}}))
