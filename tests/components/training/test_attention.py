"""Attention kernels against attention written out, the forms documents take, and which kernels are present."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from modelmill.components.core.errors import UserError
from modelmill.components.llama.config import LlamaConfig
from modelmill.components.training import attention, attention_kernels
from modelmill.components.training.attention import AttentionNeeds, make_kernel, present, select
from modelmill.components.training.attention_kernels import DocumentwiseFlash, Flex, ScaledDotProduct
from modelmill.components.training.config import check_run
from modelmill.components.training.documents import (
    cumulative_lengths,
    document_blocks,
    document_ids,
    document_lengths,
    document_mask,
    most_documents,
)
from tests.components.training.samples import MODEL, make_tokens, training_config

CPU = torch.device("cpu")
EOS = 0
ON_CPU = ["flash", "math", "sdpa"]


def needs(device: torch.device = CPU, **changes: Any) -> AttentionNeeds:
    return AttentionNeeds(device, **{"dtype": torch.float32, "head_dim": 16, **changes})


def written_out(query: Tensor, key: Tensor, value: Tensor, visible: Tensor) -> Tensor:
    """Softmax attention from its definition; `visible` is bool [B, T, T]."""
    groups = query.shape[1] // key.shape[1]
    key, value = (torch.stack([t[:, h // groups] for h in range(query.shape[1])], 1) for t in (key, value))
    scores = torch.einsum("bhqd,bhkd->bhqk", query, key) / query.shape[-1] ** 0.5
    return torch.einsum("bhqk,bhkd->bhqd", scores.masked_fill(~visible[:, None], -torch.inf).softmax(-1), value)


def visible_pairs(documents: Tensor) -> Tensor:
    """Pairs that see each other, one by one, bool [B, T, T]."""
    ids = documents.tolist()
    length = len(ids[0])
    return torch.tensor([[[k <= q and row[q] == row[k] for k in range(length)] for q in range(length)] for row in ids])


def inputs(kv_heads: int, dtype: torch.dtype, rows: int = 3, length: int = 21) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [
        torch.randn(rows, heads, length, 16, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()
        for heads in (4, kv_heads, kv_heads)
    ]


def gradients(output: Tensor, tensors: list[Tensor]) -> tuple[Tensor, ...]:
    weights = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).to(output.dtype).view(output.shape)
    return torch.autograd.grad((output * weights).sum(), tensors)


# Rows whose documents begin at the first token, end at the last, hold one token, or are the whole row.
TOKENS = torch.tensor(
    [
        [5, 4, 0, 3, 3, 3, 0, 0, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 0],
        [0, 4, 6, 3, 3, 3, 1, 1, 2, 0, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2],
        [1, 4, 6, 3, 3, 3, 1, 1, 2, 1, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2],
    ]
)


def test_the_end_of_text_belongs_to_the_document_it_ends() -> None:
    documents = document_ids(TOKENS, EOS)
    assert documents[0].tolist() == [0, 0, 0, 1, 1, 1, 1, 2, *[3] * 13]
    assert documents[1].tolist() == [0, *[1] * 9, *[2] * 11]
    assert documents[2].tolist() == [0] * 21
    assert document_lengths(documents) == [3, 4, 1, 13, 1, 9, 11, 21]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-13), (torch.float32, 2e-6), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("name", ON_CPU)
def test_every_kernel_of_a_cpu_computes_attention(
    name: str, dtype: torch.dtype, bound: float, kv_heads: int, masked: bool
) -> None:
    documents = document_ids(TOKENS, EOS) if masked else None
    tensors = inputs(kv_heads, dtype)
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    whole = torch.zeros_like(TOKENS)
    expected = written_out(*exact, visible_pairs(whole if documents is None else documents))  # type: ignore[call-arg]
    output = make_kernel(name, needs()).plan(documents)(*tensors)
    assert output.dtype == dtype
    torch.testing.assert_close(output.double(), expected, rtol=bound, atol=bound)
    for found, wanted in zip(gradients(output, tensors), gradients(expected, exact), strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=bound, atol=2 * bound)


def test_flash_attention_takes_one_document_a_row_as_it_is() -> None:
    kernel = DocumentwiseFlash()
    assert kernel.plan(torch.zeros(3, 21, dtype=torch.int64)) is kernel
    assert kernel.plan() is kernel


def test_compiled_blocks_are_not_compiled_anew_for_other_documents() -> None:
    kernel, compilations = DocumentwiseFlash(), []

    def backend(graph: torch.fx.GraphModule, _inputs: list[Tensor]) -> Any:
        compilations.append(graph)
        return graph.forward

    @torch.compile(backend=backend)
    def block(attend: Any, tensors: list[Tensor]) -> Tensor:
        return attend(*(2 * tensor for tensor in tensors)).sin()

    tensors = inputs(2, torch.float64)
    generator = torch.Generator().manual_seed(1)
    for number in range(6):
        documents = torch.randint(2, (3, 21), generator=generator).cumsum(1)
        found = block(kernel.plan(documents), tensors)
        if number == 1:
            compiled = len(compilations)
        doubled = [2 * tensor for tensor in tensors]
        torch.testing.assert_close(found, written_out(*doubled, visible_pairs(documents)).sin())  # type: ignore[call-arg]
    assert len(compilations) == compiled


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 420), st.integers(0, 2**32 - 1), st.floats(0, 0.2))
def test_block_mask_is_that_of_the_pairs(length: int, seed: int, share: float) -> None:
    ends = torch.rand(2, length, generator=torch.Generator().manual_seed(seed)) < share
    documents = ends.cumsum(1)

    def visible(row: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (documents[row, query] == documents[row, key])

    wanted = create_block_mask(visible, 2, None, length, length, device="cpu")
    found = document_blocks(documents)
    assert found.shape == wanted.shape
    for part in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(found, part), getattr(wanted, part)), part
    for part in ("kv", "full_kv", "q", "full_q"):
        for row in range(2):
            for query, count in enumerate(getattr(found, f"{part}_num_blocks")[row, 0].tolist()):
                chosen = [getattr(mask, f"{part}_indices")[row, 0, query, :count].tolist() for mask in (found, wanted)]
                assert chosen[0] == chosen[1], part


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("masked", [False, True])
def test_flex_attention_computes_attention(masked: bool, kv_heads: int) -> None:
    """Forward only: torch has no backward pass of FlexAttention on a CPU."""
    documents = torch.zeros(2, 200, dtype=torch.int64)
    documents[0, 70:] = 1
    documents[0, 180:] = 2
    tensors = [tensor.detach() for tensor in inputs(kv_heads, torch.float64, rows=2, length=200)]
    found = Flex().plan(documents if masked else None)(*tensors)
    expected = written_out(*tensors, visible_pairs(documents if masked else torch.zeros_like(documents)))  # type: ignore[call-arg]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
def test_flex_attention_is_compiled_once_for_all_documents() -> None:
    """As on a GPU, but forward only and through the C++ compiler."""
    from torch._dynamo.utils import counters

    compiled, graphs = attention_kernels._compiled_flex(), []
    for seed in range(3):
        documents = (torch.rand(1, 200, generator=torch.Generator().manual_seed(seed)) < 0.03).cumsum(1)
        tensors = [tensor.detach() for tensor in inputs(2, torch.float32, rows=1, length=200)]
        found = compiled(*tensors, block_mask=document_blocks(documents), enable_gqa=True)
        torch.testing.assert_close(found, written_out(*tensors, visible_pairs(documents)), rtol=1e-5, atol=1e-5)  # type: ignore[call-arg]
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[-1]


def varlen_stand_in(query: Tensor, key: Tensor, value: Tensor, starts: Tensor, longest: int) -> Tensor:
    """What a kernel for sequences laid end to end computes, one sequence after the other."""
    output = torch.full_like(query, torch.nan)
    for begin, end in zip(starts.tolist(), starts[1:].tolist(), strict=False):
        assert end - begin <= longest
        if end > begin:
            parts = [t[begin:end].transpose(0, 1)[None] for t in (query, key, value)]
            visible = torch.ones(1, end - begin, end - begin, dtype=torch.bool).tril()
            output[begin:end] = written_out(*parts, visible)[0].transpose(0, 1)
    return output


def flash3_stand_in() -> ModuleType:
    """The functions of FlashAttention-3's package with their signatures, computed on a CPU."""
    module = ModuleType("flash_attn_interface")

    def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, causal: bool, deterministic: bool) -> Tensor:
        assert (causal, deterministic) == (True, True)
        visible = torch.ones(len(q), q.shape[1], q.shape[1], dtype=torch.bool).tril()
        return written_out(*(t.transpose(1, 2) for t in (q, k, v)), visible).transpose(1, 2)  # type: ignore[call-arg]

    def flash_attn_varlen_func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        causal: bool,
        deterministic: bool,
    ) -> tuple[Tensor, None]:
        assert (causal, deterministic, max_seqlen_q) == (True, True, max_seqlen_k)
        assert cu_seqlens_q is cu_seqlens_k
        return varlen_stand_in(q, k, v, cu_seqlens_q, max_seqlen_q), None

    module.flash_attn_func, module.flash_attn_varlen_func = flash_attn_func, flash_attn_varlen_func  # type: ignore[attr-defined]
    return module


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", ["varlen", "flash3"])
def test_kernels_for_sequences_end_to_end_get_the_documents(
    name: str, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their layouts and lengths, with the GPU's part of the work done on the CPU."""
    monkeypatch.setattr(attention_kernels, "_varlen", varlen_stand_in)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", flash3_stand_in())
    documents = document_ids(TOKENS, EOS) if masked else torch.zeros_like(TOKENS)
    tensors = inputs(2, torch.float64)
    kernel = make_kernel(name, needs(deterministic=True), most=4)
    found = kernel.plan(documents if masked else None)(*tensors)
    expected = written_out(*tensors, visible_pairs(documents))  # type: ignore[call-arg]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_cumulative_lengths_have_one_size() -> None:
    documents = document_ids(TOKENS, EOS)
    starts = [0, 3, 7, 8, 21, 22, 31, 42]
    assert cumulative_lengths(documents, 12).tolist() == starts + [63] * 5
    assert cumulative_lengths(documents, 8).tolist() == [*starts, 63]
    assert cumulative_lengths(documents, 8).dtype == torch.int32
    assert cumulative_lengths(torch.zeros(1, 3, dtype=torch.int64), 9).tolist() == [0] + [3] * 9
    with pytest.raises(RuntimeError, match="more documents in a batch than in the data"):
        cumulative_lengths(documents, 7)


def test_most_documents_of_a_data_set_bounds_every_batch() -> None:
    rows = np.random.default_rng(2).integers(0, 6, (3000, 22)).astype("<u2")
    rows[2500, :20] = EOS
    counted = max(int(row.max()) + 1 for row in document_ids(torch.from_numpy(rows[:, :-1].astype(np.int64)), EOS))
    assert most_documents(rows, EOS) == counted == 21
    assert most_documents(np.full((2, 22), 5), EOS) == 1
    last = np.full((2, 22), 5)
    last[:, -2:] = EOS
    assert most_documents(last, EOS) == 1  # nothing follows the last input


def test_mask_is_shared_by_the_heads() -> None:
    documents = document_ids(TOKENS, EOS)
    assert document_mask(documents).shape == (3, 1, 21, 21)
    assert torch.equal(document_mask(documents)[:, 0], visible_pairs(documents))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_present_on_a_cpu(dtype: torch.dtype, masked: bool) -> None:
    found = present(needs(dtype=dtype, masked=masked, deterministic=True, grouped=True))
    assert [name for name, reason in found.items() if reason is None] == ["math", "sdpa", "flash"]
    assert all("needs an NVIDIA GPU" in reason for reason in found.values() if reason is not None)


def test_auto_logs_its_choice(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "modelmill"):
        assert select("auto", needs()) == DocumentwiseFlash()
    assert caplog.messages == ["attention: flash (auto, on cpu)"]


def test_probing_draws_no_random_numbers() -> None:
    before = torch.get_rng_state()
    present(needs(masked=True))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["efficient", "cudnn", "flex", "varlen", "flash3"])
def test_absent_kernel_is_an_error_that_lists_those_present(name: str) -> None:
    with pytest.raises(UserError) as error:
        select(name, needs())
    message = str(error.value)
    assert message.startswith(f"training.attention: '{name}' needs an NVIDIA GPU, and this run is on cpu")
    assert message.endswith("; present here: math, sdpa, flash; use one of these or auto")
    assert "\n" not in message


def test_kernel_that_fails_when_called_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Tensor:
        raise RuntimeError("no kernel image is available.\nCompile with `TORCH_USE_CUDA_DSA`")

    monkeypatch.setattr(ScaledDotProduct, "__call__", broken)
    assert attention.refusal("flash", needs()) == "fails here (no kernel image is available)"


GPU = torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A GPU that is not there: its capability is told, the calls on it are left out."""

    def make(capability: tuple[int, int], packages: tuple[str, ...] = ()) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
        monkeypatch.setattr(attention, "_tried", lambda _name, _needs: None)
        monkeypatch.setattr(attention.importlib.util, "find_spec", lambda name: name if name in packages else None)

    return make


@pytest.mark.parametrize(
    ("capability", "packages", "changes", "chosen", "reasons"),
    [
        ((9, 0), ("flash_attn_interface", "triton"), {}, "flash3", {}),
        ((9, 0), ("triton",), {}, "flash", {"flash3": "package flash_attn_interface"}),
        ((8, 0), ("flash_attn_interface",), {}, "flash", {"flash3": "Hopper", "flex": "package triton"}),
        ((7, 5), (), {}, "efficient", {"flash": "8.0 or more, and this GPU has 7.5", "varlen": "8.0 or more"}),
        ((9, 0), (), {"dtype": torch.float32}, "efficient", {"flash": "not in float32", "flash3": "not in float32"}),
        ((9, 0), ("triton",), {"masked": True}, "flex", {"flash": "cannot mask documents", "efficient": "mask doc"}),
        ((8, 0), (), {"masked": True}, "varlen", {"flex": "package triton", "cudnn": "cannot mask documents"}),
        ((9, 0), (), {"deterministic": True}, "flash", {"cudnn": "deterministic"}),
    ],
)
def test_choice_on_a_gpu_follows_its_capability(
    gpu: Any,
    caplog: pytest.LogCaptureFixture,
    capability: tuple[int, int],
    packages: tuple[str, ...],
    changes: dict[str, Any],
    chosen: str,
    reasons: dict[str, str],
) -> None:
    gpu(capability, packages)
    wanted = needs(GPU, **{"dtype": torch.bfloat16, "head_dim": 64, **changes})
    found = present(wanted)
    for name, words in reasons.items():
        assert words in (found[name] or ""), (name, found[name])
    assert found[chosen] is None
    with caplog.at_level(logging.INFO, "modelmill"):
        select("auto", wanted)
    assert caplog.messages == [f"attention: {chosen} (auto, on cuda)"]


def test_rows_are_counted_only_for_a_kernel_that_needs_the_number(gpu: Any) -> None:
    gpu((8, 0))
    wanted = needs(GPU, dtype=torch.bfloat16, masked=True)
    assert select("auto", wanted, most_documents=lambda: 7) == attention_kernels.Varlen(7)

    def unread() -> int:
        raise AssertionError("the rows are read for nothing")

    assert select("math", wanted, most_documents=unread) == make_kernel("math", wanted)
    assert select("varlen", needs(GPU, dtype=torch.bfloat16), most_documents=unread) == attention_kernels.Varlen(1)


def test_other_devices_leave_the_choice_to_torch(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "modelmill"):
        assert select("auto", needs(torch.device("meta"), masked=True)) == ScaledDotProduct()
    assert caplog.messages == ["attention: sdpa (auto, on meta)"]


def test_the_kernel_does_not_decide_the_weights_and_masking_does() -> None:
    def deciding(**changes: Any) -> dict[str, Any]:
        return training_config(**changes).deciding()

    assert deciding(attention="math") == deciding() != deciding(document_masking=True)


def test_masking_needs_tokens_that_name_the_end_of_text(tmp_path: Path) -> None:
    tokens = make_tokens(tmp_path / "tokens")
    model = LlamaConfig.model_validate(MODEL)
    check_run(model, training_config(document_masking=True), tokens)
    del tokens.metadata["eos_token_id"]
    check_run(model, training_config(), tokens)
    with pytest.raises(UserError, match=r"training\.document_masking: true .* use false"):
        check_run(model, training_config(document_masking=True), tokens)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"attention": "cudnn", "precision": "bf16-mixed"}, "cudnn has no deterministic backward pass; set determ"),
        ({"attention": "flash3"}, "flash3 computes in bf16 and precision is fp32; use precision bf16-mixed"),
        ({"attention": "efficient", "document_masking": True}, "efficient cannot mask documents; set document_m"),
        ({"attention": "eager"}, "attention"),
    ],
)
def test_kernels_that_cannot_do_what_the_recipe_says(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        training_config(**changes)
