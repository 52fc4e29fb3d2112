"""Merging: the same model as base and adapter, for the right base only, and accepted by what comes after."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from modelmill.components.core.errors import UserError
from modelmill.components.core.home import Home
from modelmill.components.core.manifest import Manifest
from modelmill.components.core.weights import weights_digest
from modelmill.components.evaluation.config import EvaluationConfig
from modelmill.components.evaluation.heldout import evaluate_heldout
from modelmill.components.finetuning import adapters
from modelmill.components.finetuning.config import MergeConfig
from modelmill.components.finetuning.merge import merge_adapter
from modelmill.components.llama.huggingface import load_huggingface
from modelmill.components.registry.config import FetchModelConfig, RegisterConfig
from modelmill.components.registry.fetch_model import fetch_model
from modelmill.components.registry.register import register_model
from modelmill.components.training.pretrained import load_causal_lm, stored_dtype
from tests.components.finetuning.samples import finetune_config, model_manifest
from tests.components.finetuning.test_finetune import run
from tests.components.training.samples import make_tokens


@pytest.fixture(autouse=True)
def launched_now(home: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELMILL_LAUNCHED", "0")


def merged(
    base: Path, adapter: Manifest, instructions: Manifest, output: Path, **changes: object
) -> tuple[Manifest, dict[str, float]]:
    output.mkdir(parents=True)
    config = MergeConfig.model_validate(changes)
    result = merge_adapter(config, output, adapter=adapter, data=instructions, base=model_manifest(base))
    counts = result.counts
    return Manifest.describe(output, kind=result.kind, counts=counts, metadata=result.metadata), result.metrics


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("name", ["llama", "exact"])
def test_the_merged_model_has_the_logits_of_base_and_adapter(
    request: pytest.FixtureRequest, instructions: Manifest, tmp_path: Path, method: str, name: str
) -> None:
    base = request.getfixturevalue(name)
    before = weights_digest(base)
    adapter, _ = run(finetune_config(method=method), tmp_path / "run", instructions, base)
    made, metrics = merged(base, adapter, instructions, tmp_path / "merged" / "data")
    assert metrics["logits_difference"] <= 1e-5
    assert metrics["stored_difference"] <= 1e-5
    dtype = torch.float64 if name == "exact" else torch.float32
    folder = made.path("model/config.json").parent
    plain = AutoModelForCausalLM.from_pretrained(str(folder), dtype=dtype).eval()
    tuned = load_causal_lm(base, dtype=dtype, parameter="base").eval()
    tokens = torch.arange(1, 60).view(1, -1)
    with torch.no_grad():
        untuned = tuned(input_ids=tokens).logits
        adapters.load_adapter(tuned, adapter.path("adapter/adapter_config.json").parent)
        expected, found = tuned(input_ids=tokens).logits, plain(input_ids=tokens).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 if name == "llama" else 1e-11)
    assert (expected - untuned).abs().max() > 0.05
    assert weights_digest(base) == before
    assert made.metadata["weights_digest"] == weights_digest(folder) != before
    kept = {name: made.metadata[name] for name in ("method", "base", "base_digest", "dataset_digest", "template")}
    assert kept == {name: adapter.metadata[name] for name in kept}
    assert kept["method"] == method
    assert {key.split(".")[-1] for key in load_file(folder / "model.safetensors")} <= {"weight", "bias"}


def test_a_base_in_bf16_is_merged_in_fp32_and_stored_as_it_was(
    half: Path, instructions: Manifest, tmp_path: Path
) -> None:
    adapter, _ = run(finetune_config(precision="bf16-mixed"), tmp_path / "run", instructions, half)
    made, metrics = merged(half, adapter, instructions, tmp_path / "merged" / "data")
    assert metrics["logits_difference"] <= 1e-5 < metrics["stored_difference"] < 0.1
    weights = load_file(made.path("model/model.safetensors"))
    assert stored_dtype(made.path("model/config.json").parent) == torch.bfloat16
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}


def test_merging_is_refused_where_it_would_be_wrong(
    llama: Path, exact: Path, instructions: Manifest, tmp_path: Path
) -> None:
    adapter, _ = run(finetune_config(), tmp_path / "run", instructions, llama)
    with pytest.raises(UserError, match=r"base: .* the adapter was trained on"):
        merged(exact, adapter, instructions, tmp_path / "1" / "data")
    with pytest.raises(UserError, match=r"merging.tolerance: the merged model's logits differ"):
        merged(llama, adapter, instructions, tmp_path / "2" / "data", tolerance=1e-12)
    none = instructions.counts | {"validation_rows": 0, "test_rows": 0}
    with pytest.raises(UserError, match=r"no \(0, 25\) arrays"):
        merged(llama, adapter, instructions.model_copy(update={"counts": none}), tmp_path / "3" / "data")
    with pytest.raises(UserError, match="is of kind tokenizer"):
        merged(llama, adapter.model_copy(update={"kind": "tokenizer"}), instructions, tmp_path / "4" / "data")
    path = adapter.path("adapter/adapter_model.safetensors")
    weights = load_file(path)
    weights.pop(sorted(weights)[0])
    save_file(weights, path)
    damaged = Manifest.describe(tmp_path / "run" / "data", kind="adapter", metadata=adapter.metadata)
    with pytest.raises(UserError, match=r"and its configuration differ in model\.layers"):
        merged(llama, damaged, instructions, tmp_path / "5" / "data")


def test_a_model_is_passed_on(llama: Path, instructions: Manifest, tmp_path: Path) -> None:
    tuned, _ = run(finetune_config(method="full"), tmp_path / "run", instructions, llama)
    made, _ = merged(llama, tuned, instructions, tmp_path / "merged" / "data")
    assert made.digest == tuned.digest
    assert made.metadata["method"] == "full"
    assert made.metadata["base_digest"] == weights_digest(llama)
    assert made.path("history.jsonl").samefile(tuned.path("history.jsonl"))


def test_an_adapter_with_other_settings_of_peft_is_merged(llama: Path, instructions: Manifest, tmp_path: Path) -> None:
    adapter, _ = run(finetune_config(), tmp_path / "run", instructions, llama)
    path = adapter.path("adapter/adapter_config.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "use_rslora": True}))
    scaled = Manifest.describe(tmp_path / "run" / "data", kind="adapter", metadata=adapter.metadata)
    made, _ = merged(llama, scaled, instructions, tmp_path / "merged" / "data")
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(str(llama)), str(path.parent)).eval()
    plain = AutoModelForCausalLM.from_pretrained(str(made.path("model/config.json").parent)).eval()
    tokens = torch.arange(1, 60).view(1, -1)
    with torch.no_grad():
        torch.testing.assert_close(plain(tokens).logits, theirs(tokens).logits, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_a_merged_model_is_evaluated_registered_and_tuned_again(
    store_home: Home, llama: Path, instructions: Manifest, tmp_path: Path
) -> None:
    adapter, _ = run(finetune_config(), tmp_path / "run", instructions, llama)
    made, _ = merged(llama, adapter, instructions, tmp_path / "merged" / "data")
    folder = made.path("model/config.json").parent
    decoder, upstream = load_huggingface(folder), AutoModelForCausalLM.from_pretrained(str(folder))
    tokens = torch.arange(1, 25).view(1, -1)
    with torch.no_grad():
        torch.testing.assert_close(decoder(tokens), upstream(input_ids=tokens).logits, rtol=0, atol=1e-4)

    rows = make_tokens(tmp_path / "tokens")
    judged = tmp_path / "evaluation"
    judged.mkdir()
    evaluation = evaluate_heldout(
        EvaluationConfig(num_prompts=0, max_new_tokens=4, prompts=()), judged, model=made, tokens=rows
    )
    report = Manifest.describe(judged, kind=evaluation.kind, metrics=evaluation.metrics, metadata=evaluation.metadata)
    entered = tmp_path / "registered" / "data"
    entered.mkdir(parents=True)
    registration = register_model(RegisterConfig(name="tuned"), entered, model=made, evaluation=report)
    assert registration.metadata["weights_digest"] == weights_digest(folder)

    taken = tmp_path / "taken" / "data"
    taken.mkdir(parents=True)
    fetch_model(FetchModelConfig(reference=f"models:/tuned/{registration.metadata['version']}"), taken)
    assert weights_digest(taken / "model") == weights_digest(folder)
    _, again = run(finetune_config(), tmp_path / "again", instructions, taken / "model")
    assert again.metadata["base_digest"] == weights_digest(folder)
