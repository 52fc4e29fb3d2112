"""Weights go to transformers and back unchanged, and broken checkpoints say what is broken."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from modelmill.components.core.errors import UserError
from modelmill.components.core.weights import weights_digest
from modelmill.components.llama.huggingface import export_huggingface, load_huggingface, load_weights
from modelmill.components.llama.model import LlamaDecoder

from .conftest import make_config

TOKENS = torch.arange(96).reshape(2, 48) * 7 % 211


def upstream_model(config, seed=0):
    values = {
        key: value for key, value in config.to_huggingface().items() if key not in ("rope_theta", "rope_scaling")
    }
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**values)).eval()
    with torch.no_grad():
        # Its initialisation gives logits near zero, which would hide a wrong permutation.
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4.0)
            else:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@torch.no_grad()
def assert_same_logits(ours, upstream):
    expected = upstream(TOKENS).logits
    assert expected.std() > 0.05
    torch.testing.assert_close(ours(TOKENS), expected, rtol=0, atol=1e-5)


@pytest.fixture
def checkpoint(tmp_path):
    """An untied two-layer checkpoint of ours."""
    export_huggingface(LlamaDecoder(make_config(num_kv_heads=2)), tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def edit(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_import_gives_the_logits_of_transformers(config, tmp_path):
    upstream = upstream_model(config)
    upstream.save_pretrained(tmp_path)
    ours = load_huggingface(tmp_path)
    assert ours.config == config
    assert_same_logits(ours, upstream)


def test_export_gives_transformers_our_logits(config, tmp_path):
    ours = LlamaDecoder(config, seed=3)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.mul_(4.0) if parameter.dim() == 2 else parameter.add_(0.2 * torch.randn_like(parameter))
    export_huggingface(ours, tmp_path)
    upstream, report = transformers.LlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert_same_logits(ours, upstream.eval())
    for name, parameter in load_huggingface(tmp_path).state_dict().items():
        assert torch.equal(parameter, ours.state_dict()[name])


def test_older_config_keys_give_the_same_logits(tmp_path):
    config = make_config(rope_theta=500000.0, rope_scaling={"factor": 8.0, "original_max_position": 32})
    upstream = upstream_model(config)
    upstream.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    del values["rope_parameters"]
    values["rope_theta"] = 500000.0
    values["rope_scaling"] = config.to_huggingface()["rope_scaling"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert_same_logits(load_huggingface(tmp_path), upstream)


def test_shards_are_written_read_and_replaced(config, tmp_path):
    model = LlamaDecoder(config)
    export_huggingface(model, tmp_path, max_shard_bytes=60_000)
    shards = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(shards) > 2
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    assert_same_logits(model, transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval())
    tokens = model(TOKENS)
    assert torch.equal(load_huggingface(tmp_path)(TOKENS), tokens)
    digest = weights_digest(tmp_path)

    export_huggingface(model, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors"
    ]  # fmt: skip
    assert weights_digest(tmp_path) == digest


def test_equal_weights_give_equal_bytes(config, tmp_path):
    for name, seed in (("first", 5), ("second", 5), ("other", 6)):
        export_huggingface(LlamaDecoder(config, seed=seed), tmp_path / name)
    files = [path.name for path in (tmp_path / "first").iterdir()]
    assert all((tmp_path / "first" / f).read_bytes() == (tmp_path / "second" / f).read_bytes() for f in files)
    first, second, other = (weights_digest(tmp_path / name) for name in ("first", "second", "other"))
    assert first == second != other
    assert len(first) == 64


def test_dtype_can_change_on_the_way_out_and_in(checkpoint, tmp_path):
    model = load_huggingface(checkpoint)
    export_huggingface(model, tmp_path / "half", dtype=torch.bfloat16)
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    half = load_huggingface(tmp_path / "half")
    assert half.embedding.weight.dtype == half.cos.dtype == torch.bfloat16
    whole = load_huggingface(tmp_path / "half", dtype=torch.float32)
    assert torch.equal(whole.norm.weight, model.norm.weight.bfloat16().float())
    with pytest.raises(UserError, match=r"dtype: torch.int8 cannot be exported"):
        export_huggingface(model, tmp_path / "int8", dtype=torch.int8)


def test_tokenizer_files_and_special_tokens_travel_along(checkpoint, tmp_path):
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    with pytest.raises(UserError, match=r"tokenizer_folder: .* holds no tokenizer.json"):
        export_huggingface(load_huggingface(checkpoint), tmp_path / "out", tokenizer_folder=tokenizer)
    added = [{"id": 2, "content": "</s>"}, {"id": 1, "content": "<s>"}]
    (tokenizer / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"<pad>": 0}}, "added_tokens": added}))
    (tokenizer / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<s>", "eos_token": {"content": "</s>"}, "pad_token": "<pad>", "unk_token": None})
    )
    export_huggingface(load_huggingface(checkpoint), tmp_path / "out", tokenizer_folder=tokenizer)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (tokenizer / "tokenizer.json").read_bytes()
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    assert ids.items() <= json.loads((tmp_path / "out" / "config.json").read_text()).items()
    generation = transformers.GenerationConfig.from_pretrained(tmp_path / "out")
    assert generation.eos_token_id == 2


def test_a_failed_export_leaves_the_earlier_checkpoint(checkpoint, monkeypatch):
    before = {path.name: path.read_bytes() for path in checkpoint.iterdir()}

    def fail(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("modelmill.components.llama.huggingface.save_file", fail)
    with pytest.raises(OSError, match="No space"):
        export_huggingface(LlamaDecoder(make_config(), seed=9), checkpoint)
    assert {path.name: path.read_bytes() for path in checkpoint.iterdir()} == before


def test_weights_are_read_into_a_model_that_exists_if_it_is_of_that_architecture(checkpoint):
    model = LlamaDecoder(make_config(num_kv_heads=2, max_sequence_length=128), seed=9)
    load_weights(model, checkpoint)
    assert torch.equal(model(TOKENS), load_huggingface(checkpoint)(TOKENS))
    with pytest.raises(UserError, match=r"num_kv_heads is 2 in config.json and 4 in the model; use the architecture"):
        load_weights(LlamaDecoder(make_config()), checkpoint)


@pytest.mark.parametrize("keep", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_file_is_refused(checkpoint, keep):
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * keep)])
    with pytest.raises(UserError, match=r"model.safetensors is missing, corrupt or truncated"):
        load_huggingface(checkpoint)
    with pytest.raises(UserError, match=r"model.safetensors"):
        weights_digest(checkpoint)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop("model.layers.1.self_attn.k_proj.weight"),
            "model.layers.1.self_attn.k_proj.weight is missing",
        ),
        (lambda t: t.update(extra=torch.zeros(1)), "tensor extra is unexpected"),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(65)}),
            r"model.norm.weight has shape \[65\] where config.json implies \[64\]",
        ),
        (
            lambda t: t.update({"model.layers.0.mlp.up_proj.weight": torch.zeros(64, 112)}),
            r"up_proj.weight has shape \[64, 112\] where config.json implies \[112, 64\]",
        ),
        (lambda t: t.update({"model.norm.weight": torch.ones(64, dtype=torch.int8)}), "is torch.int8"),
    ],
)
def test_wrong_tensors_are_named(checkpoint, change, message):
    edit(checkpoint, change)
    with pytest.raises(UserError, match=message) as caught:
        load_huggingface(checkpoint)
    assert str(checkpoint) in str(caught.value)


def test_constants_of_old_checkpoints_are_passed_over(checkpoint):
    expected = load_huggingface(checkpoint)(TOKENS)
    edit(checkpoint, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    assert torch.equal(load_huggingface(checkpoint)(TOKENS), expected)


def test_a_tied_checkpoint_may_repeat_the_embedding_but_not_contradict_it(tmp_path):
    export_huggingface(LlamaDecoder(make_config(tie_embeddings=True)), tmp_path)
    edit(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    load_huggingface(tmp_path)
    edit(tmp_path, lambda t: t["lm_head.weight"].add_(1))
    with pytest.raises(UserError, match=r"lm_head.weight differs from model.embed_tokens.weight"):
        load_huggingface(tmp_path)


def test_pickles_are_never_opened(checkpoint):
    (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model.bin is a pickle"):
        load_huggingface(checkpoint)


def test_folders_that_are_no_checkpoints_are_named(checkpoint, tmp_path):
    with pytest.raises(UserError, match=r"config.json is missing"):
        load_huggingface(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"holds no tensor"):
        weights_digest(tmp_path)
    (checkpoint / "config.json").write_text("{")
    with pytest.raises(UserError, match="not readable JSON"):
        load_huggingface(checkpoint)


@pytest.mark.parametrize("weight_map", [{"a": "../model.safetensors"}, {}, None, {"a": 3}])
def test_an_index_cannot_point_elsewhere(checkpoint, weight_map):
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(UserError, match="no weight_map of plain file names"):
        load_huggingface(checkpoint)


def test_a_missing_shard_is_named(tmp_path):
    export_huggingface(LlamaDecoder(make_config()), tmp_path, max_shard_bytes=60_000)
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(UserError, match=f"{shard.name} is missing, corrupt or truncated"):
        load_huggingface(tmp_path)
