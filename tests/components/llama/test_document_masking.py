"""A packed row with document masking is each of its documents alone: logits, loss and gradients."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from modelmill.components.data.loader import BatchSource, open_rows
from modelmill.components.llama.config import LlamaConfig
from modelmill.components.llama.huggingface import load_huggingface
from modelmill.components.llama.model import LlamaDecoder
from modelmill.components.llama.pretrain import masked_next_token_loss, next_token_loss, pretrain, train
from modelmill.components.training import activations, attention_kernels
from modelmill.components.training.attention import AttentionNeeds, make_kernel
from modelmill.components.training.attention_kernels import Attend, DocumentwiseFlash
from modelmill.components.training.documents import document_ids, document_lengths, document_mask
from modelmill.components.training.launch import LAUNCHED_VARIABLE
from tests.components.training.runs import Here
from tests.components.training.samples import VOCAB, make_tokenizer, make_tokens, pretrain_config

from .conftest import make_config

EOS = 0
CPU = torch.device("cpu")


def rows() -> Tensor:
    """Packed rows [3, 41]: one document, many, and one whose last input is an end-of-text."""
    tokens = torch.randint(1, 211, (3, 41), generator=torch.Generator().manual_seed(4))
    tokens[1, [0, 3, 4, 20, 40]] = EOS
    tokens[2, [17, 39]] = EOS
    return tokens


def exact_decoder(config: LlamaConfig, kernel: str = "flash") -> LlamaDecoder:
    """In float64 throughout: rotary tables in float32 would know distances to 1e-7 only."""
    model = LlamaDecoder(config, dtype=torch.float64, seed=3)
    size = config.head_dim
    exponents = torch.arange(0, size, 2, dtype=torch.float64) / size
    angle = torch.arange(config.max_sequence_length, dtype=torch.float64)[:, None] * config.rope_theta**-exponents
    model.cos, model.sin = angle.cos(), angle.sin()
    model.attention_kernel = make_kernel(kernel, AttentionNeeds(CPU, torch.float64, size))
    return model


def alone(model: LlamaDecoder, tokens: Tensor) -> list[Tensor]:
    """Logits of each document of one row of inputs [T], run by itself from position 0."""
    lengths = document_lengths(document_ids(tokens[None], EOS))
    return [model(document[None])[0] for document in tokens.split(lengths)]


@pytest.mark.parametrize("kernel", ["flash", "math", "sdpa"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_logits_and_gradients_are_those_of_each_document_alone(kv_heads: int, kernel: str) -> None:
    model = exact_decoder(make_config(num_kv_heads=kv_heads), kernel)
    inputs, targets = rows()[:, :-1], rows()[:, 1:]
    logits = model(inputs, documents=document_ids(inputs, EOS))
    expected = torch.stack([torch.cat(alone(model, row)) for row in inputs])
    torch.testing.assert_close(logits, expected, rtol=1e-12, atol=1e-13)

    parameters = list(model.parameters())
    loss = masked_next_token_loss(model, rows(), eos=EOS)
    wanted = torch.nn.functional.cross_entropy(expected.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=0)
    for name, found, right in zip(
        (name for name, _ in model.named_parameters()),
        torch.autograd.grad(loss, parameters),
        torch.autograd.grad(wanted, parameters),
        strict=True,
    ):
        torch.testing.assert_close(found, right, rtol=1e-10, atol=1e-14, msg=lambda text, name=name: f"{name}: {text}")


def test_masking_changes_what_crosses_documents_and_nothing_else() -> None:
    model = exact_decoder(make_config(num_kv_heads=2))
    inputs = rows()[:, :-1]
    masked, whole = model(inputs, documents=document_ids(inputs, EOS)), model(inputs)
    torch.testing.assert_close(masked[0], whole[0])
    torch.testing.assert_close(masked[2, :18], whole[2, :18])
    assert ((masked[2, 18:] - whole[2, 18:]).abs().amax(-1) > 1e-3).all()
    assert not torch.isclose(next_token_loss(model, rows()), masked_next_token_loss(model, rows(), eos=EOS))


def test_no_position_sees_another_document() -> None:
    model = exact_decoder(make_config(num_kv_heads=2))
    inputs = rows()[:, :-1]
    documents = document_ids(inputs, EOS)
    embedded = model.embedding.weight[inputs].detach().requires_grad_()
    model.embedding.forward = lambda _tokens: embedded  # type: ignore[method-assign]
    logits = model(inputs, documents=documents)
    for position in (0, 3, 4, 5, 20, 21, 39):
        (reached,) = torch.autograd.grad(logits[1, position].square().sum(), embedded, retain_graph=True)
        seen = reached.abs().sum(-1) > 0
        wanted = torch.zeros_like(seen)
        wanted[1] = document_mask(documents)[1, 0, position]
        assert torch.equal(seen, wanted), position


MODES: list[Any] = ["full", "selective", "selective_matmul"]


@pytest.mark.parametrize("mode", MODES)
def test_masking_under_activation_checkpointing(mode: Any) -> None:
    def gradients(model: LlamaDecoder) -> list[Tensor]:
        return list(torch.autograd.grad(masked_next_token_loss(model, rows(), eos=EOS), list(model.parameters())))

    plain, checkpointed = (exact_decoder(make_config(num_kv_heads=2)) for _ in range(2))
    activations.apply(checkpointed, mode)
    for expected, found in zip(gradients(plain), gradients(checkpointed), strict=True):
        assert torch.equal(expected, found)


def test_documents_are_planned_once_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    plans: list[Tensor | None] = []

    class Counting(DocumentwiseFlash):
        def plan(self, documents: Tensor | None = None) -> Attend:
            plans.append(documents)
            return super().plan(documents)

    model = LlamaDecoder(make_config(num_layers=3))
    model.attention_kernel = Counting()
    masked_next_token_loss(model, rows(), eos=EOS)
    assert len(plans) == 1


def test_masked_flash_attention_makes_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_documents: Tensor) -> Tensor:
        raise AssertionError("a mask of T x T pairs")

    monkeypatch.setattr(attention_kernels, "document_mask", refuse)
    model = LlamaDecoder(make_config())
    model.attention_kernel = make_kernel("flash", AttentionNeeds(CPU, torch.float32, 16))
    partial(masked_next_token_loss, eos=EOS)(model, rows()).backward()


def test_pretraining_masks_training_and_validation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step itself: its first training loss and its validation loss are those of masked rows."""
    monkeypatch.setenv("MODELMILL_HOME", str(tmp_path / "home"))
    monkeypatch.setenv(LAUNCHED_VARIABLE, "0")
    tokens, tokenizer = make_tokens(tmp_path / "tokens"), make_tokenizer(tmp_path / "tokenizer")
    config = pretrain_config(
        document_masking=True, attention="math", steps=1, warmup_steps=0, parallel={"processes_per_node": 1}
    )
    output = tmp_path / "attempt" / "data"
    output.mkdir(parents=True)
    result = pretrain(config, output, tokenizer=tokenizer, tokens=tokens, launcher=Here(train))

    training = config.training
    model = LlamaDecoder(config.model.model_copy(update={"vocab_size": VOCAB}), seed=training.seed)
    batch = BatchSource(open_rows(tokens, "train"), training.seed, training.global_batch_size).batch(0, 0, 1)
    first = torch.from_numpy(batch.astype(np.int64))
    assert result.metrics["train_loss"] == pytest.approx(
        masked_next_token_loss(model, first, eos=EOS).item(), rel=1e-6
    )
    assert result.metrics["train_loss"] != pytest.approx(next_token_loss(model, first).item(), rel=1e-6)

    trained = load_huggingface(output / "model")
    held_out = torch.from_numpy(open_rows(tokens, "validation")[: training.validation_rows].astype(np.int64))
    masked, whole = masked_next_token_loss(trained, held_out, eos=EOS), next_token_loss(trained, held_out)
    assert result.metrics["validation_loss"] == pytest.approx(masked.item(), rel=1e-6)
    assert result.metrics["validation_loss"] != pytest.approx(whole.item(), rel=1e-6)
