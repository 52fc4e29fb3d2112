"""One rank: the engine against a loop by hand, resuming, and what is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2ForCausalLM,
)

from modelmill.components.core.errors import UserError
from modelmill.components.core.manifest import Manifest
from modelmill.components.core.step import StepResult
from modelmill.components.core.weights import weights_digest
from modelmill.components.data.instruction_rows import InstructionSource, open_instructions
from modelmill.components.finetuning import adapters, causal_lm
from modelmill.components.finetuning.config import AdapterConfig, FinetuneConfig
from modelmill.components.finetuning.finetune import finetune, train
from modelmill.components.training.pretrained import load_causal_lm
from modelmill.components.training.schedule import learning_rate
from tests.components.finetuning.samples import (
    ADAPTER,
    BASE,
    LENGTH,
    finetune_config,
    make_base,
    make_instructions,
    model_manifest,
)
from tests.components.training.runs import Here, history


def run(config: FinetuneConfig, scratch: Path, instructions: Manifest, base: Path) -> tuple[Manifest, StepResult]:
    """The step, and the manifest that it becomes."""
    output = scratch / "data"
    output.mkdir(parents=True, exist_ok=True)
    result = finetune(config, output, instructions=instructions, base=model_manifest(base), launcher=Here(train))
    return Manifest.describe(output, kind=result.kind, counts=result.counts, metadata=result.metadata), result


@pytest.fixture(autouse=True)
def launched_now(home: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELMILL_LAUNCHED", "0")


def conversations(instructions: Manifest, step: int, batch: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Tokens and targets of every conversation of a global batch, each on its own."""
    rows = InstructionSource(open_instructions(instructions, "train"), 0, batch).batch(step)
    found = []
    for tokens, targets, documents in zip(*rows, strict=True):
        for number in range(documents.max() + 1):
            inside = documents == number
            if (targets[inside] >= 0).any():
                found.append((tokens[inside], targets[inside]))
    return found


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_the_engine_is_peft_with_a_loop_by_hand(
    exact: Path, instructions: Manifest, tmp_path: Path, method: str
) -> None:
    """No packing, no engine: peft on a plain model and torch's AdamW, from the same first weights."""
    config = finetune_config(method=method)
    made, _ = run(config, tmp_path, instructions, exact)
    model = first_adapters(exact, config).train()
    scaled = {n: p for n, p in model.named_parameters() if p.requires_grad}
    groups = [
        {"params": [p for n, p in scaled.items() if "lora_A" in n], "rate": 1.0, "weight_decay": 0.1},
        {"params": [p for n, p in scaled.items() if "lora_B" in n], "rate": 4.0, "weight_decay": 0.1},
        {"params": [p for p in scaled.values() if p.dim() == 1], "rate": 1.0, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], betas=(0.9, 0.95), eps=1e-5)
    losses = []
    for step in range(config.training.steps):
        sums = []
        batch = conversations(instructions, step, 8)
        for tokens, targets in batch:
            logits = model(input_ids=torch.from_numpy(tokens)[None]).logits[0]
            sums.append(torch.nn.functional.cross_entropy(logits, torch.from_numpy(targets), reduction="sum"))
        loss = sum(sums) / sum(int((targets >= 0).sum()) for _, targets in batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(scaled.values(), config.training.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * learning_rate(step, config.training)
        optimizer.step()
        losses.append(loss.item())
    assert [r["loss"] for r in history(tmp_path) if "loss" in r] == pytest.approx(losses, rel=1e-8)
    assert losses[-1] < losses[0]
    found = load_file(made.path("adapter/adapter_model.safetensors"))
    expected = peft.get_peft_model_state_dict(model)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value.detach(), rtol=1e-6, atol=1e-9)


def first_adapters(base: Path, config: FinetuneConfig) -> peft.PeftModel:
    """A model of peft with the first weights that the engine draws."""
    first = load_causal_lm(base, dtype=torch.float64, parameter="base")
    adapters.add_adapters(first, config.adapter, dora=config.method == "dora", seed=0)
    model = AutoModelForCausalLM.from_pretrained(str(base), dtype=torch.float64)
    settings = {"r": config.adapter.rank, "lora_alpha": config.adapter.alpha, "use_dora": config.method == "dora"}
    names = [name for name, _ in adapters.adapters(first)]
    made = peft.get_peft_model(model, peft.LoraConfig(target_modules=names, **settings))
    drawn = {name: p for name, p in first.named_parameters() if "lora_A" in name}
    for name, parameter in made.named_parameters():
        if "lora_A" in name:
            parameter.data.copy_(drawn[name.removeprefix("base_model.model.")])
    return made


def test_all_weights_follow_a_loop_by_hand(exact: Path, instructions: Manifest, tmp_path: Path) -> None:
    config = finetune_config(method="full", weight_decay=0.0)
    made, result = run(config, tmp_path, instructions, exact)
    model = AutoModelForCausalLM.from_pretrained(str(exact), dtype=torch.float64).train()
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), eps=1e-5, weight_decay=0.0)
    for step in range(6):
        sums = []
        batch = conversations(instructions, step, 8)
        for tokens, targets in batch:
            logits = model(input_ids=torch.from_numpy(tokens)[None]).logits[0]
            sums.append(torch.nn.functional.cross_entropy(logits, torch.from_numpy(targets), reduction="sum"))
        optimizer.zero_grad()
        (sum(sums) / sum(int((targets >= 0).sum()) for _, targets in batch)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.param_groups[0]["lr"] = learning_rate(step, config.training)
        optimizer.step()
    again = AutoModelForCausalLM.from_pretrained(str(made.path("model/config.json").parent), dtype=torch.float64)
    for (name, found), expected in zip(again.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9, msg=name)
    assert made.kind == "model"
    assert (tmp_path / "data" / "model" / "tokenizer.json").exists()
    assert result.metadata["weights_digest"] == weights_digest(tmp_path / "data" / "model")


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_an_adapter_loads_in_peft_with_the_same_logits(
    llama: Path, instructions: Manifest, tmp_path: Path, method: str
) -> None:
    made, _ = run(finetune_config(method=method), tmp_path, instructions, llama)
    folder = made.path("adapter/adapter_config.json").parent
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(str(llama)), str(folder)).eval()
    ours = load_causal_lm(llama, dtype=torch.float32, parameter="base")
    adapters.load_adapter(ours, folder)
    tokens = torch.arange(1, 60).view(1, -1)
    with torch.no_grad():
        found, expected = ours.eval()(input_ids=tokens).logits, theirs(input_ids=tokens).logits
        base = AutoModelForCausalLM.from_pretrained(str(llama))(input_ids=tokens).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert (expected - base).abs().max() > 0.05


def test_a_killed_run_ends_with_the_same_bits(
    llama: Path, instructions: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = finetune_config(adapter={**ADAPTER, "dropout": 0.2})
    run(config, tmp_path / "whole", instructions, llama)
    with monkeypatch.context() as patch:
        batch = causal_lm.SupervisedBatches.batch

        def dies(self: Any, step: int, rank: int, world: int) -> np.ndarray:
            if step == 5:  # two steps after the checkpoint of the third
                raise KeyboardInterrupt
            return batch(self, step, rank, world)

        patch.setattr(causal_lm.SupervisedBatches, "batch", dies)
        with pytest.raises(KeyboardInterrupt):
            run(config, tmp_path / "killed", instructions, llama)
    assert [r["step"] for r in history(tmp_path / "killed") if "loss" in r][-1] > 3
    run(config, tmp_path / "killed", instructions, llama)
    for name in ("history.jsonl", "data/adapter/adapter_model.safetensors"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.slow
def test_training_all_weights_needs_no_package_for_adapters() -> None:
    blocked = "import sys; sys.modules |= dict.fromkeys(('peft', 'bitsandbytes')); "
    code = f"{blocked}import modelmill.components.finetuning.rank as rank; print(rank.trained_model.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_only_the_adapter_is_trained(llama: Path) -> None:
    model = load_causal_lm(llama, dtype=torch.float32, parameter="base")
    names = adapters.add_adapters(model, AdapterConfig(**ADAPTER), dora=True, seed=0)
    assert len(names) == 2 * 7
    assert "lm_head" not in names
    rows = torch.arange(1, 2 * 3 * 9 + 1).view(2, 3, 9)
    rows[:, 2] = torch.arange(9)
    causal_lm.SupervisedModel(model)(rows).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == ("lora_" in name), name


def test_first_weights_depend_on_seed_and_name_only(llama: Path) -> None:
    found = []
    for seed, targets in ((0, "all-linear"), (0, ["down_proj", "self_attn.q_proj"]), (1, "all-linear")):
        model = load_causal_lm(llama, dtype=torch.float32, parameter="base")
        adapters.add_adapters(model, AdapterConfig(rank=4, targets=targets), dora=False, seed=seed)
        found.append({n: layer.lora_A["default"].weight for n, layer in adapters.adapters(model)})
    assert set(found[1]) == {f"model.layers.{n}.{t}" for n in (0, 1) for t in ("mlp.down_proj", "self_attn.q_proj")}
    for name, weight in found[1].items():
        assert torch.equal(weight, found[0][name])
        assert not torch.equal(weight, found[2][name])
        assert weight.abs().max() <= weight.shape[1] ** -0.5
    assert len({tuple(weight.flatten()[:3].tolist()) for weight in found[0].values()}) == len(found[0])


@pytest.mark.parametrize("family", [Qwen2ForCausalLM, MistralForCausalLM])
def test_other_families_train(family: type[PreTrainedModel], instructions: Manifest, tmp_path: Path) -> None:
    changes = {"sliding_window": 6} if family is MistralForCausalLM else {"tie_word_embeddings": True}
    base = make_base(tmp_path / "base", family, **changes)
    _, result = run(finetune_config(), tmp_path / "run", instructions, base)
    rows = [record["loss"] for record in history(tmp_path / "run") if "loss" in record]
    assert rows[-1] < rows[0]
    assert result.metadata["base_digest"] == weights_digest(base)


def refused(match: str, work: Callable[[], Any]) -> None:
    with pytest.raises(UserError, match=match) as error:
        work()
    assert "\n" not in str(error.value)


def test_what_does_not_fit_is_one_line(llama: Path, instructions: Manifest, tmp_path: Path) -> None:
    scratch = tmp_path / "run"

    def tried(match: str, config: FinetuneConfig, data: Manifest = instructions, base: Path = llama) -> None:
        refused(match, lambda: run(config, scratch, data, base))

    names = r"'q_porj' matches no linear layer .* it has down_proj, gate_proj, k_proj, o_proj, q_proj"
    tried(names, finetune_config(adapter={"targets": ["v_proj", "q_porj"]}))
    tried(r"global_batch_size: 64 is more than the", finetune_config(global_batch_size=64))
    short = make_base(tmp_path / "short", max_position_embeddings=16)
    tried(rf"sequence_length: {LENGTH} is more than the 16", finetune_config(), base=short)
    small = make_base(tmp_path / "small", vocab_size=50)
    tried(r"instructions.tokenizer: its 97 tokens are more than the 50", finetune_config(), base=small)
    empty = instructions.model_copy(update={"counts": {**instructions.counts, "train_rows": 0}})
    tried(r"the training split is empty", finetune_config(), empty)
    unchecked = instructions.model_copy(update={"counts": {**instructions.counts, "validation_rows": 0}})
    tried(r"validation split is empty", finetune_config(), unchecked)
    tried(r"is of kind tokens", finetune_config(), instructions.model_copy(update={"kind": "tokens"}))
    for name in ("full", "lora"):
        made = tmp_path / "run" / "data" / name
        assert not made.exists()


def test_a_foreign_or_damaged_base_is_refused(llama: Path, instructions: Manifest, tmp_path: Path) -> None:
    tokenizer = Manifest.describe(llama, kind="tokenizer")
    refused(
        "holds no model/ folder",
        lambda: finetune(finetune_config(), tmp_path, instructions=instructions, base=tokenizer),
    )
    told = model_manifest(llama).model_copy(update={"metadata": {"weights_digest": "0" * 64}})
    refused(
        "the step that made them wrote",
        lambda: finetune(finetune_config(), tmp_path, instructions=instructions, base=told),
    )
    lacking = Path(shutil.copytree(llama, tmp_path / "lacking"))
    weights = load_file(lacking / "model.safetensors")
    weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, lacking / "model.safetensors", metadata={"format": "pt"})
    refused("lacks tensor", lambda: run(finetune_config(), tmp_path / "run", instructions, lacking))
    foreign = Path(shutil.copytree(llama, tmp_path / "foreign"))
    config = json.loads((foreign / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    (foreign / "config.json").write_text(json.dumps(config))
    (foreign / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    refused("cannot be loaded", lambda: run(finetune_config(), tmp_path / "run", instructions, foreign))
    assert not (tmp_path / "ran").exists()


def test_a_checkpoint_on_another_base_is_refused(llama: Path, instructions: Manifest, tmp_path: Path) -> None:
    run(finetune_config(), tmp_path / "run", instructions, llama)
    other = Path(shutil.copytree(llama, tmp_path / "other"))
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"] += 1e-3
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    refused(
        "was written by another configuration", lambda: run(finetune_config(), tmp_path / "run", instructions, other)
    )


def test_models_that_the_loss_or_packing_would_falsify_are_refused(instructions: Manifest) -> None:
    sizes = {name: value for name, value in BASE.items() if name != "max_position_embeddings"}
    scaled = CohereForCausalLM(CohereConfig(**sizes, logit_scale=0.5))
    refused("scales or caps its logits", lambda: causal_lm.check_model(scaled, packed=False))
    recurrent = MambaForCausalLM(MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2))
    refused("mixes conversations that are packed", lambda: causal_lm.check_model(recurrent, packed=True))
    causal_lm.check_model(recurrent, packed=False)
    plain = GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4))
    causal_lm.check_model(plain, packed=True)
    refused("has no linear layer besides its head", lambda: adapters.find_targets(plain, AdapterConfig()))


def test_sections_refuse_what_means_nothing() -> None:
    for changes, match in (
        ({"method": "full", "adapter": {"rank": 3}}, "method full trains all weights"),
        ({"adapter": {"targets": []}}, "names no layer"),
        ({"precision": "fp8-mixed"}, "fp8-mixed is for pretraining"),
        ({"attention": "varlen", "precision": "bf16-mixed"}, "kernel of our own decoder"),
        ({"parallel": {"processes_per_node": 2, "tensor": 2}}, "splits our own decoder only"),
        ({"learning_rate": 1e-2, "steps": 0}, "steps"),
    ):
        with pytest.raises(ValueError, match=match):
            finetune_config(**changes)


def test_targets_of_a_row_that_begins_a_conversation_are_not_predicted_from_the_one_before(tmp_path: Path) -> None:
    data = make_instructions(tmp_path / "data")
    rows = open_instructions(data, "train")
    stacked = causal_lm.stack_rows(rows.take(slice(0, 20)))
    documents = rows.take(slice(0, 20)).documents
    for positions, numbers in zip(stacked[:, 2], documents, strict=True):
        expected = np.concatenate([np.arange((numbers == n).sum()) for n in np.unique(numbers)])
        assert np.array_equal(positions, expected)
