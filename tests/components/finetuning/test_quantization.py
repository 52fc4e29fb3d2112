"""Adapters over a 4-bit base, computed for real on the CPU."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel, Qwen2ForCausalLM

from modelmill.components.core.errors import UserError
from modelmill.components.core.manifest import Manifest
from modelmill.components.finetuning import adapters, job, quantization, trained_model
from modelmill.components.finetuning.config import AdapterConfig, MergeConfig, QuantizationConfig
from modelmill.components.finetuning.finetune import train
from modelmill.components.finetuning.merge import merge_adapter
from modelmill.components.training.pretrained import load_causal_lm
from modelmill.components.training.worker import StopRequestedError
from tests.components.finetuning.samples import ADAPTER, finetune_config, job_spec, make_base, model_manifest
from tests.components.finetuning.test_finetune import run
from tests.components.training.runs import single_rank

CPU, TOKENS = torch.device("cpu"), torch.arange(1, 60).view(1, -1)


@pytest.fixture(autouse=True)
def launched_now(home: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELMILL_LAUNCHED", "0")


@pytest.fixture(scope="session")
def biased(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base whose quantised layers have biases, wide enough for many blocks."""
    folder = tmp_path_factory.mktemp("bases") / "biased"
    make_base(folder, Qwen2ForCausalLM, hidden_size=64, intermediate_size=256)
    return folder


@pytest.fixture(scope="module")
def tuned(biased: Path, instructions: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    scratch = tmp_path_factory.mktemp("tuned")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MODELMILL_LAUNCHED", "0")
        patch.setenv("MODELMILL_HOME", str(scratch / "home"))
        return run(finetune_config(method="qlora"), scratch / "run", instructions, biased)[0]


def quantised(folder: Path, *, double: bool = True, compute: torch.dtype = torch.float32) -> PreTrainedModel:
    config = QuantizationConfig(double=double)
    return quantization.load_quantized(folder, config, compute=compute, dtype=torch.float32, device=CPU).eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def stored(layer: Linear4bit) -> int:
    """Bytes of a layer's weights and of what is needed to read them."""
    state = layer.weight.quant_state
    parts = [layer.weight.data, state.absmax]
    if state.nested:
        parts.append(state.state2.absmax)
    return sum(part.untyped_storage().nbytes() for part in parts)


@pytest.mark.parametrize(("double", "bits"), [(True, 4 + 8 / 64 + 32 / 64 / 256), (False, 4 + 32 / 64)])
def test_a_loaded_base_takes_little_more_than_4_bits_a_weight(biased: Path, double: bool, bits: float) -> None:
    model = quantised(biased, double=double)
    layers = list(quantization.four_bit_layers(model))
    assert len(layers) == 2 * 7
    assert not isinstance(model.get_output_embeddings(), Linear4bit)
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    assert 8 * sum(map(stored, layers)) / weights == pytest.approx(bits, rel=0.01)
    assert trained_model.sizes(model)["parameters"] == sum(
        p.numel() for p in AutoModelForCausalLM.from_pretrained(str(biased)).parameters()
    )


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_forward_pass_is_that_of_the_rounded_weights_and_the_adapter(
    tuned: Manifest, biased: Path, compute: torch.dtype
) -> None:
    model = quantised(biased, compute=compute)
    plain = load_causal_lm(biased, dtype=torch.float32, parameter="base").eval()
    before = logits(plain)
    for name, layer in model.named_modules():
        if isinstance(layer, Linear4bit):
            weight = plain.get_submodule(name).weight
            rounded = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            assert 0.02 < (rounded - weight).norm() / weight.norm() < 0.2
            weight.data.copy_(rounded)
    folder = tuned.path("adapter/adapter_config.json").parent
    for part in (model, plain):
        adapters.load_adapter(part, folder)
    found, expected = logits(model.eval()), logits(plain.eval())
    tolerance = 1e-5 if compute == torch.float32 else 0.03
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()
    assert (expected - before).abs().max() > 0.1


def test_training_lowers_the_loss_and_leaves_the_base_alone(
    tuned: Manifest, biased: Path, instructions: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = [json.loads(line) for line in tuned.path("history.jsonl").read_text().splitlines()]
    trained = [record["loss"] for record in losses if "loss" in record]
    assert trained[-1] < trained[0] - 0.1
    assert tuned.metadata["method"] == "qlora"
    assert tuned.metadata["quantization"] == {
        "type": "nf4",
        "double": True,
        "block_size": 64,
        "compute_dtype": "float32",
        "weights_dtype": "float32",
    }
    kept: list[PreTrainedModel] = []
    load = quantization.load_quantized

    def keep(*args: Any, **options: Any) -> PreTrainedModel:
        kept.append(load(*args, **options))
        return kept[-1]

    monkeypatch.setattr(quantization, "load_quantized", keep)
    again, _ = run(finetune_config(method="qlora"), tmp_path / "run", instructions, biased)
    fresh = dict(load_layers(load, biased))
    layers = {
        name.removesuffix(".base_layer"): layer
        for name, layer in kept[0].named_modules()
        if isinstance(layer, Linear4bit)
    }
    assert layers.keys() == fresh.keys()
    for name, layer in layers.items():
        assert torch.equal(layer.weight.data.view(torch.uint8), fresh[name].weight.data.view(torch.uint8))
        assert layer.weight.grad is None
    assert again.metadata["weights_digest"] == tuned.metadata["weights_digest"]


def load_layers(load: Any, folder: Path) -> list[tuple[str, Linear4bit]]:
    model = load(folder, QuantizationConfig(), compute=torch.float32, dtype=torch.float32, device=CPU)
    return [(name, layer) for name, layer in model.named_modules() if isinstance(layer, Linear4bit)]


def test_gradients_survive_a_validation(biased: Path) -> None:
    """On CPUs with bf16 instructions bitsandbytes repacks weights in evaluation mode, without a backward pass."""
    model = quantised(biased, compute=torch.bfloat16)
    adapters.add_adapters(model, AdapterConfig(**ADAPTER), dora=False, seed=0)
    logits(model.eval())
    model.train()(input_ids=TOKENS).logits.square().mean().backward()
    first = [p.grad for n, p in model.named_parameters() if "layers.0" in n and "lora_B" in n]
    assert len(first) == 7
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in first)


def test_a_run_that_is_continued_ends_with_the_same_bits(
    tuned: Manifest, biased: Path, instructions: Manifest, tmp_path: Path
) -> None:
    config = finetune_config(method="qlora")
    spec = job_spec(config, biased, instructions, tmp_path / "data")

    class Twice:
        """Told to stop when asked the fourth time."""

        calls = 0
        received = False

        def requested(self) -> bool:
            self.calls += 1
            return self.calls == 4

    context = replace(single_rank(tmp_path), stop=Twice())  # type: ignore[arg-type]
    with pytest.raises(StopRequestedError):
        train(context, spec, config.training)
    train(single_rank(tmp_path), spec, config.training)
    for name in ("history.jsonl", "adapter/adapter_model.safetensors"):
        assert (tmp_path / "data" / name).read_bytes() == tuned.path(name).read_bytes()
    other = finetune_config(method="qlora", quantization={"double": False})
    with pytest.raises(UserError, match="was written by another configuration"):
        train(single_rank(tmp_path), job_spec(other, biased, instructions, tmp_path / "data"), other.training)


def test_a_checkpoint_holds_adapters_only(tuned: Manifest) -> None:
    newest = sorted((Path(tuned.uri).parent / "checkpoints").glob("step-*"))[-1]
    (path,) = newest.glob("model-*.safetensors")
    assert {name.rsplit(".", 3)[-3] for name in load_file(path)} == {"lora_A", "lora_B"}


def test_the_adapter_loads_in_plain_peft_over_a_4_bit_base(tuned: Manifest, biased: Path) -> None:
    options = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    base = AutoModelForCausalLM.from_pretrained(
        str(biased), quantization_config=options, device_map={"": CPU}, dtype=torch.float32
    )
    for layer in quantization.four_bit_layers(base):
        layer.support_avx512bf16_for_cpu = False
    theirs = peft.PeftModel.from_pretrained(base, str(tuned.path("adapter/adapter_config.json").parent)).eval()
    ours = quantised(biased)
    adapters.load_adapter(ours, tuned.path("adapter/adapter_config.json").parent)
    torch.testing.assert_close(logits(ours.eval()), logits(theirs), rtol=0, atol=1e-5)


def merged(config: dict[str, str], tuned: Manifest, biased: Path, instructions: Manifest, output: Path) -> Any:
    output.mkdir(parents=True)
    made = merge_adapter(
        MergeConfig.model_validate(config),
        output,
        adapter=tuned,
        data=instructions,
        base=model_manifest(biased),
    )
    return made, logits(AutoModelForCausalLM.from_pretrained(str(output / "model"), dtype=torch.float32).eval())


def test_the_merged_model_is_the_one_that_was_trained(
    tuned: Manifest, biased: Path, instructions: Manifest, tmp_path: Path
) -> None:
    folder = tuned.path("adapter/adapter_config.json").parent
    models = {"trained": quantised(biased), "original": load_causal_lm(biased, dtype=torch.float32, parameter="base")}
    found = {}
    for into, model in models.items():
        made, found[into] = merged({"into": into}, tuned, biased, instructions, tmp_path / into)
        adapters.load_adapter(model, folder)
        expected = logits(model.eval())
        assert (found[into] - expected).abs().max() <= 1e-5 * expected.abs().max()
        assert max(made.metrics["logits_difference"], made.metrics["stored_difference"]) <= 1e-5
        assert made.metadata["quantization"] == tuned.metadata["quantization"]
        config = json.loads((tmp_path / into / "model" / "config.json").read_text())
        assert "quantization_config" not in config
    assert (found["trained"] - found["original"]).abs().max() > 0.01


def test_what_cannot_be_quantised_is_one_line(
    exact: Path, llama: Path, instructions: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = finetune_config(method="qlora")
    with pytest.raises(UserError, match=r"^method: .* fp64 weights, .* use lora"):
        run(config, tmp_path / "1", instructions, exact)
    with pytest.raises(UserError, match=r"no 4-bit kernels that train on 'mps'; use method lora"):
        quantization.load_quantized(
            llama, QuantizationConfig(), compute=torch.float32, dtype=None, device=torch.device("mps")
        )
    monkeypatch.setattr(job, "find_spec", lambda name: None if name == "bitsandbytes" else object())
    with pytest.raises(UserError, match=r"'qlora' needs the package bitsandbytes, .* install the extra 'finetune'"):
        run(config, tmp_path / "2", instructions, llama)
    monkeypatch.setattr(job, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"'dora' needs the package peft"):
        run(finetune_config(method="dora"), tmp_path / "3", instructions, llama)
    with pytest.raises(ValueError, match="quantization: method lora trains on unquantised weights"):
        finetune_config(quantization={"double": False})
    with pytest.raises(ValueError, match="no 4-bit kernels for 'neuron'"):
        finetune_config(method="qlora", accelerator="neuron")
