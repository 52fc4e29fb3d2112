"""Activation memory modes: what runs again, what is kept, and that gradients stay the same; how it is measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from modelmill.components.core.errors import UserError
from modelmill.components.core.recipe import Section, validate
from modelmill.components.llama.config import LlamaConfig
from modelmill.components.llama.model import LlamaDecoder
from modelmill.components.training import activations
from modelmill.components.training.blocks import blocks
from modelmill.components.training.memory_tracker import saved_for_backward, track
from modelmill.components.training.options import ActivationMemory, EveryNLayers, MemoryBudget, activation_label
from modelmill.components.training.precision import set_precision
from tests.components.training.samples import training_config

EAGER: list[ActivationMemory] = ["full", "selective", "selective_matmul", EveryNLayers(every_n_layers=2)]
LAYERS, LENGTH, VOCAB = 3, 48, 64


class Options(Section):
    activation_memory: ActivationMemory = "none"


class Operators(TorchDispatchMode):
    """Counts the operators that run, by name without overload."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func._schema.name.removeprefix("aten::")] += 1
        return func(*args, **(kwargs or {}))

    @property
    def matmuls(self) -> int:
        return sum(self.counts[name] for name in ("mm", "bmm", "addmm"))

    @property
    def attention(self) -> int:
        return self.counts["_scaled_dot_product_flash_attention_for_cpu"]


def decoder(dtype: torch.dtype = torch.float32) -> LlamaDecoder:
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=80,
        num_layers=LAYERS,
        num_heads=4,
        num_kv_heads=2,
        max_sequence_length=LENGTH,
    )
    return LlamaDecoder(config, dtype=dtype, seed=3)


def transformers_model(dtype: torch.dtype = torch.float32) -> nn.Module:
    """A model of another architecture, with biases, dropout and a cache that it fills unless told otherwise.

    No dropout in the attention, which would then be composed of products.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": VOCAB, "n_positions": LENGTH, "n_embd": 32, "n_layer": LAYERS, "n_head": 4}
    config = GPT2Config(**sizes, attn_pdrop=0.0, use_cache=True, bos_token_id=0, eos_token_id=0)
    torch.manual_seed(3)
    return GPT2LMHeadModel(config).to(dtype).train()


def rows() -> Tensor:
    return torch.randint(0, VOCAB, (2, LENGTH + 1), generator=torch.Generator().manual_seed(7))


def loss_of(model: nn.Module, precision: str = "fp32") -> Tensor:
    tokens = rows()
    torch.manual_seed(11)  # of dropout, where there is any
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
        if isinstance(model, LlamaDecoder):
            return model(tokens[:, :-1], tokens[:, 1:])
        return model(input_ids=tokens[:, :-1], labels=tokens[:, 1:]).loss


def gradients(model: nn.Module, precision: str = "fp32") -> dict[str, Tensor]:
    loss_of(model, precision).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def operators(mode: ActivationMemory, precision: str = "fp32") -> Operators:
    """What one forward and backward pass of the decoder runs."""
    model = decoder()
    activations.apply(model, mode)
    with Operators() as counted:
        gradients(model, precision)
    return counted


@pytest.mark.parametrize("precision", ["fp32", "bf16-mixed"])
@pytest.mark.parametrize("build", [decoder, transformers_model])
def test_gradients_are_the_same_bits(build: Callable[[], nn.Module], precision: str) -> None:
    expected = gradients(build(), precision)
    for mode in EAGER:
        model = build()
        activations.apply(model, mode)
        found = gradients(model, precision)
        assert found.keys() == expected.keys(), mode  # the names of parameters did not change
        for name, gradient in expected.items():
            assert torch.equal(found[name], gradient), (mode, name)


@pytest.mark.parametrize("precision", ["fp32", "bf16-mixed"])
def test_what_runs_again(precision: str) -> None:
    none, full = operators("none", precision), operators("full", precision)
    selective, matmul = operators("selective", precision), operators("selective_matmul", precision)
    second = operators(EveryNLayers(every_n_layers=2), precision)
    # The last product of a composed block is needed by nothing in it, so the second pass stops before.
    products = {"fp32": 4, "bf16-mixed": 3}[precision]
    assert full.matmuls - none.matmuls == products * LAYERS
    assert full.attention - none.attention == LAYERS
    assert selective.matmuls == matmul.matmuls == none.matmuls
    assert selective.attention == none.attention
    assert matmul.attention - none.attention == LAYERS
    for pointwise in ("mul", "silu", "linalg_vector_norm", "rsqrt_"):
        assert none.counts[pointwise] < selective.counts[pointwise] == full.counts[pointwise], pointwise
    assert second.matmuls - none.matmuls == products * 2  # blocks 0 and 2 of three


@pytest.mark.parametrize("mode", ["selective", "selective_matmul"])
def test_products_in_fp8_are_kept_too(mode: ActivationMemory) -> None:
    counts, expected = {}, {}
    for each in ("none", "full", mode):
        model = decoder()
        set_precision(model, "fp8-mixed")
        activations.apply(model, each)
        with Operators() as counted:
            expected[each] = gradients(model, "bf16-mixed")
        counts[each] = counted.counts["_scaled_mm"]
    assert 0 < counts["none"] == counts[mode] < counts["full"]
    assert all(torch.equal(expected["none"][name], expected[mode][name]) for name in expected["none"])


def test_a_policy_of_packets_would_keep_nothing() -> None:
    """Why `activations` compares names: the policy as it is often written silently is full checkpointing."""

    def packets(context: object, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        keep = operator in (torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.addmm)
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    model = decoder()
    for layer in model.layers:
        context = partial(create_selective_checkpoint_contexts, packets)
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, context_fn=context)
    with Operators() as counted:
        gradients(model)
    assert counted.matmuls == operators("full").matmuls > operators("none").matmuls


def test_a_variant_that_writes_into_an_argument_is_never_kept() -> None:
    decide = partial(activations._decide, activations.MATMULS, None)
    assert decide(torch.ops.aten.mm.default) is CheckpointPolicy.MUST_SAVE
    assert decide(torch.ops.aten.mm.dtype) is CheckpointPolicy.MUST_SAVE
    assert decide(torch.ops.aten.mm.out) is CheckpointPolicy.PREFER_RECOMPUTE
    assert activations.MATMULS < activations.COMPUTE_HEAVY
    wrong = [name for name in activations.COMPUTE_HEAVY if not hasattr(*_namespace_and_name(name))]
    assert set(wrong) <= {"torch_attn::_varlen_attn"}  # registered when its module is imported


def _namespace_and_name(qualified: str) -> tuple[Any, str]:
    namespace, _, name = qualified.partition("::")
    return getattr(torch.ops, namespace), name


@pytest.mark.parametrize("build", [decoder, transformers_model])
def test_bytes_saved_for_backward_fall_from_none_to_full(build: Callable[[], nn.Module]) -> None:
    saved = {}
    for mode in ("none", *EAGER):
        model = build()
        activations.apply(model, mode)
        gradients(model, "bf16-mixed")
        saved[activation_label(mode)] = saved_for_backward(partial(loss_of, model, "bf16-mixed"))[1]
    assert saved["full"] < saved["selective_matmul"] < saved["selective"] < saved["none"]
    assert saved["full"] < saved["every_2_layers"] < saved["none"]


def test_saved_bytes_agree_with_the_hooks_of_autograd() -> None:
    """Two ways to count: at the allocator, and by the storages autograd packs, weights and inputs left out."""
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8), nn.ReLU())
    inputs = torch.randn(5, 8)
    outside = {tensor.untyped_storage().data_ptr() for tensor in (inputs, *model.parameters())}
    packed: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in outside:
            packed[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = model(inputs)  # as long as it lives, no address is used twice
    _, saved = saved_for_backward(lambda: model(inputs))
    assert sum(packed.values()) == saved == 4 * (5 * 16 + 5 * 8), kept.shape


def test_tracked_memory_is_exact_and_counts_storages_once() -> None:
    before = torch.ones(1000)
    with track() as use:
        first = torch.ones(1000, dtype=torch.float64)  # 8000 bytes
        view = first.view(10, 100)
        second = torch.ones(500)  # 2000
        del first, view
        third = torch.ones(100)  # 400
        second.mul_(2)
    assert (use.peak, use.held) == (10_000, 2_400), third.shape
    with track() as use:
        del before, third  # not made here
        fourth = torch.ones(10)
    assert (use.peak, use.held) == (40, 40), fourth.shape


def test_blocks_are_the_list_with_the_most_parameters() -> None:
    model = decoder()
    assert blocks(model) == list(model.layers)
    assert len(blocks(transformers_model())) == LAYERS
    assert blocks(nn.Linear(2, 2)) == []
    with pytest.raises(UserError, match=r"training\.activation_memory: the model has no list of blocks"):
        activations.apply(nn.Linear(2, 2), "full")


@pytest.mark.parametrize(
    "mode", ["none", "full", "selective", "selective_matmul", {"every_n_layers": 2}, {"budget": 0.5}], ids=str
)
def test_a_mode_survives_json(mode: Any) -> None:
    options = Options.model_validate({"activation_memory": mode})
    assert options.model_dump(mode="json") == {"activation_memory": mode}
    assert Options.model_validate_json(options.model_dump_json()) == options
    assert training_config(activation_memory=mode, parallel={"processes_per_node": 1}).deciding() == (
        training_config(parallel={"processes_per_node": 1}).deciding()
    )


@pytest.mark.parametrize(
    "mode",
    [
        "half",
        None,
        2,
        {"every_n_layers": 0},
        {"every": 2},
        {"budget": 1.1},
        {"budget": -0.1},
        {"budget": float("nan")},
    ],
    ids=str,
)
def test_a_wrong_mode_is_answered_with_the_forms(mode: Any) -> None:
    with pytest.raises(UserError) as caught:
        validate(Options, {"activation_memory": mode})
    message = str(caught.value)
    assert message.startswith(f"activation_memory: {mode!r} is no activation memory mode; use none, full, selective,")
    assert message.endswith("{every_n_layers: 1 or more} or {budget: 0 to 1}")


def test_a_budget_is_refused_with_tensor_parallelism() -> None:
    with pytest.raises(ValueError, match=r"activation_memory \{budget: 0.5\} .* parallel.tensor 2; use selective"):
        training_config(activation_memory={"budget": 0.5}, parallel={"tensor": 2})
    training_config(activation_memory="selective", parallel={"tensor": 2})


def test_a_budget_without_a_compiler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CXX", "c++-of-nobody")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"training\.activation_memory: .* no C\+\+ compiler 'c\+\+-of-nobody'"):
        activations.apply(decoder(), MemoryBudget(budget=0.5))


def test_blocks_trace_whole_and_agree_in_float64() -> None:
    """What a compiler sees: the decoder's hand-written functions step aside, and nothing breaks the graph."""
    expected, model = gradients(decoder(torch.float64)), decoder(torch.float64)
    for layer in model.layers:
        layer.forward = torch.compile(layer.forward, backend="aot_eager", fullgraph=True)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-11, atol=1e-13)


def _ranks_agree(rank: int, folder: str) -> None:
    """On one of two ranks: every mode under DDP and FSDP2 gives the bits of the same layout without a mode."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    grid = init_device_mesh("cpu", (2,))

    def run(mode: ActivationMemory, sharded: bool) -> dict[str, Tensor]:
        model = decoder()
        activations.apply(model, mode)  # before sharding
        wrapped: nn.Module = model
        if sharded:
            for layer in (*model.layers, model):
                fully_shard(layer, mesh=grid)
        else:
            wrapped = DistributedDataParallel(model)
        tokens = rows()[rank : rank + 1]
        wrapped(tokens[:, :-1], tokens[:, 1:]).backward()
        found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
        return {name: grad.to_local() if isinstance(grad, DTensor) else grad for name, grad in found.items()}

    for sharded in (False, True):
        expected = run("none", sharded)
        assert len(expected) == len(list(decoder().parameters()))
        for mode in EAGER:
            found = run(mode, sharded)
            assert all(torch.equal(found[name], gradient) for name, gradient in expected.items()), (sharded, mode)
    dist.destroy_process_group()


@pytest.mark.slow
def test_modes_go_with_data_parallelism_and_sharding(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_ranks_agree, args=(str(tmp_path),), nprocs=2)


@pytest.mark.slow
def test_compiled_blocks_keep_what_the_budget_allows() -> None:
    """Both budgets in one process, one after the other: the second must not find the code of the first."""
    torch._dynamo.reset()
    expected, saved = gradients(decoder(torch.float64)), {}
    for budget in (0.0, 1.0):
        model = decoder(torch.float64)
        activations.apply(model, MemoryBudget(budget=budget))
        for name, gradient in gradients(model).items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-11, atol=1e-13)
        saved[budget] = saved_for_backward(partial(loss_of, model))[1]
    assert saved[0.0] < saved[1.0] / 2


@pytest.mark.slow
def test_compiled_blocks_of_a_transformers_model_agree() -> None:
    torch._dynamo.reset()
    model, other = transformers_model().eval(), transformers_model().eval()  # compiled dropout draws other numbers
    activations.apply(other, MemoryBudget(budget=0.5))
    expected = gradients(model)
    for name, gradient in gradients(other).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)
